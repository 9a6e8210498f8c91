"""Suggests a learning rate: python -m foundry_jax.cli.lr_finder --config=configs/tiny.py --check

On 2 CPU cores: 40 s, and 1 to 2 minutes more with --check.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from foundry_jax import command


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.cli.lr_finder",
        description="Trains a few steps at exponentially growing learning rates and suggests one from the losses.",
        epilog="Any config key can be set, such as --config.data.batch_size=64.",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:MUTATIONS]", help="such as configs/tiny.py:mla")
    parser.add_argument("--min", type=float, default=1e-6, metavar="RATE", help="the first rate (default: 1e-6)")
    parser.add_argument("--max", type=float, default=1.0, metavar="RATE", help="the last rate (default: 1)")
    parser.add_argument("--steps", type=int, default=200, help="how many rates (default: 200)")
    parser.add_argument("--check", action="store_true", help="also run a short bracket around the suggestion")
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder for lr_finder.json and .png; by default named in runs/lr-finder/"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return command.parse(parser, argv)


def main() -> None:
    """The command."""
    flags, overrides = parse_arguments(sys.argv[1:])
    # Imported here: --help must not wait for JAX.
    from foundry_jax import compilation, config
    from foundry_jax.runfolder import encode_json
    from foundry_jax.search import lr_finder, space

    settings = config.load(flags.config, overrides)
    path, _, argument = flags.config.partition(":")
    name = ",".join([pathlib.Path(path).stem, *filter(None, [argument]), *overrides])
    out = flags.out or pathlib.Path("runs") / "lr-finder" / space.slug(name)
    compilation.enable_cache()
    found = lr_finder.find(settings, low=flags.min, high=flags.max, num_steps=flags.steps, check=flags.check)
    paths = lr_finder.write(found, out)
    if flags.json:
        print(json.dumps(encode_json(found | {"files": [str(path) for path in paths]})))
    else:
        print(summary(found, paths))


def summary(found: dict[str, Any], paths: list[pathlib.Path]) -> str:
    """Returns the suggestion in a few lines."""
    suggestion, check = found["suggestion"], found["check"]
    lines = [
        f"suggested learning rate {suggestion['learning_rate']:.2g}, by {suggestion['rule']} of the smoothed loss; "
        f"the config has {found['config']['learning_rate']:g}",
        f"{found['ended']}; other rules: "
        + ", ".join(f"{rule} {rate:.2g}" for rule, rate in found["rules"].items() if rule != suggestion["rule"]),
    ]
    if check:
        losses = ", ".join(f"{float(rate):.2g}: {loss:.4f}" for rate, loss in check["losses"].items())
        lines.append(f"bracket of {check['steps']} steps, training loss of the last fifth: {losses}")
        lines.append(
            f"best {check['best']:.2g}; the suggestion is {check['factor']:.2g} times that, "
            f"and {check['behind']:.4f} nats behind"
        )
    return "\n".join([*lines, f"written: {', '.join(map(str, paths))}"])


if __name__ == "__main__":
    command.restart_with_huge_pages()
    command.run(main)
