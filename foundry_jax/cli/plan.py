"""Shows how a config would be laid out: python -m foundry_jax.cli.plan --config=configs/baseline.py --devices=256"""

import argparse
import collections
import dataclasses
import json
import math
import re
import sys
from typing import Any

from foundry_jax.errors import run_command

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
GIB = 1 << 30


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m foundry_jax.cli.plan",
        description="Prints the sharding strategy, the reason, and where every parameter would lie.",
        epilog="Any config key can be set, such as --config.sharding.fsdp=8.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:MUTATIONS]")
    parser.add_argument("--devices", type=int, default=1, help="number of devices to plan for (default: 1)")
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="GiB of one device: says what fits")
    parser.add_argument("--vocab-size", type=int, help="if the config leaves it to the tokenizer; default: data.vocab_size")
    parser.add_argument("--compile", action="store_true", help="compile the step for that many virtual CPU devices")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags, rest = parser.parse_known_args(argv)
    wrong = [text for text in rest if not text.startswith("--config.")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if flags.devices < 1:
        parser.error(f"--devices={flags.devices} must be 1 or more")
    return flags, [text.removeprefix("--config.") for text in rest]


def main() -> None:
    """The command."""
    flags, overrides = parse_arguments(sys.argv[1:])
    # Imported here: --help must not wait for JAX, and the number of virtual devices is fixed before it starts.
    import jax

    from foundry_jax import config as config_lib
    from foundry_jax.train import require_even_batches, with_vocabulary

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", flags.devices)
    config = config_lib.load(flags.config, overrides)
    config = with_vocabulary(config, flags.vocab_size or config.model.vocab_size or config.data.vocab_size)
    report = decide(config, flags.devices, flags.device_memory)
    if flags.compile:
        require_even_batches(config, report["plan"])
        report["compiled"] = compile_report(config, report["plan"])
    if flags.json:
        report["plan"] = dataclasses.asdict(report["plan"])
        print(json.dumps(report))
    else:
        show(report)


def decide(config, num_devices: int, device_gib: float | None) -> dict[str, Any]:
    """Returns the plan, the table of parameters and the memory estimate.

    Raises:
        UserError: an axis size or variant that does not fit.
    """
    import jax

    from foundry_jax import compilation, sharding
    from foundry_jax.model import transformer
    from foundry_jax.train_step import Program

    transformer.check(config.model)
    num_params = transformer.num_params(config.model)
    plan = sharding.plan(num_params, num_devices, config.sharding)
    state, _, _ = compilation.abstract_inputs(Program.of(config), plan, (1, 1))
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        local = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        name = "/".join(key.key for key in path)
        rows.append({"name": name, "shape": list(leaf.shape), "spec": str(leaf.sharding.spec), "bytes_per_device": local})
    micro_batch = config.data.batch_size // config.optimizer.accumulation_steps
    memory = sharding.estimate_memory(config.model, num_params, plan, micro_batch)
    report = {
        "plan": plan,
        "num_params": num_params,
        "params": rows,
        "memory": dataclasses.asdict(memory) | {"total": memory.total},
    }
    if device_gib is not None:
        budget = int(device_gib * GIB)
        fitting = sharding.strategies_that_fit(config.model, num_params, num_devices, micro_batch, budget, config.sharding)
        report |= {"fits": memory.total <= budget, "strategies_that_fit": fitting}
    return report


def compile_report(config, plan) -> dict[str, Any]:
    """Returns the collectives of the compiled step and the bytes per device that XLA plans for."""
    import jax

    from foundry_jax import compilation
    from foundry_jax.train_step import Program

    with plan.context():
        batch_shape = (config.data.batch_size, config.model.context_length)
        compiled = compilation.compile_train_step(Program.of(config), plan, batch_shape)
    found = re.findall(rf"= \S+ ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "backend": jax.default_backend(),
        "collectives": dict(collections.Counter(found)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def show(report: dict[str, Any]) -> None:
    """Prints a report for people."""
    import rich.console
    import rich.table

    console = rich.console.Console(soft_wrap=True, highlight=False)
    plan, memory = report["plan"], report["memory"]
    console.print(f"strategy: {plan.strategy}, because {plan.reason}")
    console.print(f"mesh: data={plan.data} fsdp={plan.fsdp} tensor={plan.tensor}")
    table = rich.table.Table("parameter", "shape", "PartitionSpec", "bytes per device", box=None)
    for row in report["params"]:
        shape = "x".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, row["spec"].removeprefix("PartitionSpec"), f"{row['bytes_per_device']:,}")
    console.print(table)
    console.print(f"{report['num_params']:,} parameters; estimated per device, in GiB:")
    console.print(", ".join(f"{name} {size / GIB:.3f}" for name, size in memory.items()))
    if "fits" in report:
        fitting = [f"{name} ({size / GIB:.2f} GiB)" for name, size in report["strategies_that_fit"].items()]
        verdict = "fits" if report["fits"] else "does not fit"
        console.print(f"{plan.strategy} {verdict}; fitting: {', '.join(fitting) or 'none; use more devices or remat'}")
    if "compiled" in report:
        compiled = report["compiled"]
        counts = ", ".join(f"{count} {name}" for name, count in compiled["collectives"].items()) or "no collectives"
        console.print(f"compiled for virtual {compiled['backend']} devices: {counts}")
        console.print(
            f"per device: arguments {compiled['argument_bytes'] / GIB:.3f} GiB, "
            f"temporaries {compiled['temporary_bytes'] / GIB:.3f} GiB"
        )


if __name__ == "__main__":
    run_command(main)
