"""Shows how a config would be laid out: python -m foundry_jax.cli.plan --config=configs/baseline.py --devices=256"""

import argparse
import dataclasses
import json
import sys
from typing import Any

from foundry_jax import command

GIB = 1 << 30


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.cli.plan",
        description="Prints the sharding strategy, the reason, and where every parameter would lie.",
        epilog="Any config key can be set, such as --config.sharding.fsdp=8.",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:MUTATIONS]")
    parser.add_argument("--devices", type=int, default=1, help="number of devices to plan for (default: 1)")
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="GiB of one device: says what fits")
    parser.add_argument("--vocab-size", type=int, help="default: model.vocab_size, or data.vocab_size if that is 0")
    parser.add_argument("--compile", action="store_true", help="compile the step for that many virtual CPU devices")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags, overrides = command.parse(parser, argv)
    if flags.devices < 1:
        parser.error(f"--devices={flags.devices} must be 1 or more")
    return flags, overrides


def main() -> None:
    """The command."""
    flags, overrides = parse_arguments(sys.argv[1:])
    # Imported here: --help must not wait for JAX, and the number of virtual devices is fixed before it starts.
    import jax

    from foundry_jax import config as config_lib
    from foundry_jax import forecast, train
    from foundry_jax.model import transformer

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", flags.devices)
    config = config_lib.load(flags.config, overrides)
    vocab_size = flags.vocab_size or config.model.vocab_size or config.data.vocab_size
    config = train.with_vocabulary(config, vocab_size)
    plan = forecast.plan_of(config, flags.devices)
    rows = forecast.param_table(config, plan)
    memory = forecast.memory(config, plan)
    report = {
        "plan": dataclasses.asdict(plan),
        "num_params": transformer.num_params(config.model),
        "num_trained_params": forecast.num_trained_params(config),
        "params": [dataclasses.asdict(row) for row in rows],
        "memory": dataclasses.asdict(memory) | {"total": memory.total},
    }
    if flags.device_memory is not None:
        budget = int(flags.device_memory * GIB)
        report["fits"] = memory.total <= budget
        report["strategies_that_fit"] = forecast.strategies_that_fit(config, flags.devices, budget)
    if flags.compile:
        train.require_even_batches(config, plan)
        report["compiled"] = forecast.compiled_step(config, plan)
    if flags.json:
        print(json.dumps(report))
    else:
        show(report)


def show(report: dict[str, Any]) -> None:
    """Prints a report for people."""
    import rich.console
    import rich.table

    console = rich.console.Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)
    plan, memory = report["plan"], report["memory"]
    console.print(f"strategy: {plan['strategy']}, because {plan['reason']}")
    console.print(f"mesh: data={plan['data']} fsdp={plan['fsdp']} tensor={plan['tensor']}")
    table = rich.table.Table("parameter", "shape", "PartitionSpec", "bytes per device", box=None)
    for row in report["params"]:
        table.add_row(row["name"], "x".join(map(str, row["shape"])), row["spec"], f"{row['bytes_per_device']:,}")
    console.print(table)
    total, trained = report["num_params"], report["num_trained_params"]
    counts = f"{total:,} parameters" if trained == total else f"{total:,} parameters in all, {trained:,} trained"
    console.print(f"{counts}; estimated per device, in GiB:")
    console.print(", ".join(f"{name} {size / GIB:.3f}" for name, size in memory.items()))
    if "fits" in report:
        fitting = [f"{name} ({size / GIB:.2f} GiB)" for name, size in report["strategies_that_fit"].items()]
        verdict = "fits" if report["fits"] else "does not fit"
        advice = ", ".join(fitting) or "none; try more devices, model.remat=full or optimizer.accumulation_steps"
        console.print(f"{plan['strategy']} {verdict}; what fits: {advice}")
    if "compiled" in report:
        compiled = report["compiled"]
        counts = ", ".join(f"{count} {name}" for name, count in compiled["collectives"].items()) or "no collectives"
        console.print(f"compiled for virtual {compiled['backend']} devices: {counts}")
        sizes = compiled["argument_bytes"] / GIB, compiled["temporary_bytes"] / GIB
        console.print("per device: arguments {:.3f} GiB, temporaries {:.3f} GiB".format(*sizes))


if __name__ == "__main__":
    command.run(main)
