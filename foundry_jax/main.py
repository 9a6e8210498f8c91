"""Trains one configuration: python -m foundry_jax.main --config=configs/tiny.py:mla,lr=3e-4"""

import argparse
import hashlib
import json
import pathlib
import re
import sys

from foundry_jax import command

MAX_NAME_LENGTH = 120  # of a default run folder; file systems stop at 255 bytes


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides ("optimizer.learning_rate=3e-4") of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.main",
        description="Trains one configuration, or goes on where its run folder stopped.",
        epilog="Any config key can be set: --config.optimizer.learning_rate=3e-4. "
        "Exit codes: 0 done, 1 a mistake in what was asked, 75 stopped with a checkpoint.",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:MUTATIONS]", help="such as configs/tiny.py:mla,lr=3e-4"
    )
    parser.add_argument("--workdir", help="run folder; by default runs/ and the config's name and mutations")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, to stdout")
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes (Slurm, TPU pod, Kubernetes)"
    )
    return command.parse(parser, argv)


def default_workdir(spec: str, overrides: list[str]) -> pathlib.Path:
    """Returns runs/<config name and everything that was changed>, so that the same command finds its run again."""
    path, _, argument = spec.partition(":")
    parts = [pathlib.Path(path).stem, *filter(None, [argument]), *overrides]
    name = re.sub(r"[^\w.=+-]+", "-", "-".join(parts))
    if len(name) > MAX_NAME_LENGTH:
        name = f"{name[:MAX_NAME_LENGTH]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return pathlib.Path("runs") / name


def main() -> None:
    """The command."""
    flags, overrides = parse_arguments(sys.argv[1:])
    # Imported here: --help must not wait for JAX.
    import jax

    from foundry_jax import compilation, config, train

    settings = config.load(flags.config, overrides)
    if flags.distributed:
        jax.distributed.initialize()
    compilation.enable_cache()
    result = train.run(settings, flags.workdir or default_workdir(flags.config, overrides))
    print(json.dumps(result) if flags.json else summary(result))


def summary(result: dict) -> str:
    """Returns a run's result in a few lines."""
    validation, seconds = result["validation"], result["seconds"]
    bits = f", {validation['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in validation else ""
    mfu = f", {result['mfu']:.0%} of peak" if result["mfu"] else ""
    compiled = result["compilations"]
    averaged = f"of averaged weights {validation['ema_loss']:.4f}"
    total, trained = result["num_params"], result["num_trained_params"]
    parameters = f"{total:,} parameters" if trained == total else f"{total:,} parameters ({trained:,} trained)"
    return "\n".join(
        [
            f"validation loss {validation['loss']:.4f} nats per token{bits}; {averaged}",
            f"{parameters}, {result['tokens']:,} tokens, {result['tokens_per_second']:,.0f} tokens per second{mfu}",
            "seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
            f"compilation cache: {compiled['hits']} hits, {compiled['misses']} misses",
        ]
    )


if __name__ == "__main__":
    command.restart_with_huge_pages()
    command.run(main)
