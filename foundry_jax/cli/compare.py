"""Says whether a run is better than another: python -m foundry_jax.cli.compare runs/x runs/y"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from foundry_jax import command

if TYPE_CHECKING:  # --help must not wait for numpy and scipy
    from foundry_jax.search.comparing import Comparison
    from foundry_jax.search.verdict import Estimate


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the flags of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.cli.compare",
        description="Says whether B is better than A, worse, equivalent, or whether that is not known.",
        epilog="A and B: a run folder; a folder of runs of several seeds; or SWEEP:CONTESTANT, of a finished sweep.",
    )
    parser.add_argument("a", metavar="A", help="what is compared with, as the incumbent of a sweep")
    parser.add_argument("b", metavar="B", help="what the verdict is on")
    parser.add_argument(
        "--metric", default="bits_per_byte",
        help="bits_per_byte, loss, ema_bits_per_byte, TASK or TASK/SCORE (default: bits_per_byte)",
    )  # fmt: skip
    parser.add_argument("--alpha", type=float, default=0.05, help="probability of a wrong verdict (default: 0.05)")
    parser.add_argument(
        "--min-effect", type=float, metavar="X",
        help="smallest difference worth having, in the metric's unit (default: 0.005 bits or nats, 0.01 of shares)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main() -> None:
    """The command."""
    flags = parse_arguments(sys.argv[1:])
    from foundry_jax.runfolder import encode_json
    from foundry_jax.search.comparing import compare

    found = compare(flags.a, flags.b, metric=flags.metric, alpha=flags.alpha, min_effect=flags.min_effect)
    if flags.json:
        print(json.dumps(encode_json(found.to_json())))
    else:
        show(found)


def show(found: "Comparison") -> None:
    """Prints a comparison for people."""
    import rich.console
    import rich.table

    console = rich.console.Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(f"A: {found.a.label}\nB: {found.b.label}", markup=False)
    for key, (before, after) in found.changes.items():
        console.print(f"   {key}: {json.dumps(before)} in A, {json.dumps(after)} in B", markup=False)
    better = "higher" if found.metric.higher_is_better else "lower"
    table = rich.table.Table("seed", "A", "B", "B is better by", box=None)
    for seed, (before, after) in found.values.items():
        gain = after - before if found.metric.higher_is_better else before - after
        table.add_row(str(seed), f"{before:.5f}", f"{after:.5f}", f"{gain:+.5f}")
    console.print(f"{found.metric.name}, {better} is better:")
    console.print(table)
    verdict = found.verdict
    parts = "items" if found.metric.task else "groups of validation text"
    for name, estimate in (("seeds", verdict.over_seeds), (parts, verdict.over_units)):
        if estimate is not None and estimate.interval is not None:
            console.print(_line(name, estimate, verdict.level))
    console.print(f"B is {verdict.verdict}: {verdict.why}", markup=False)


def _line(name: str, estimate: "Estimate", level: float) -> str:
    low, high = estimate.interval
    interval = f"{100 * (1 - level):.4g} % interval {low:+.5f} to {high:+.5f}"
    return f"over {estimate.n} {name}: {estimate.effect:+.5f}, {interval}"


if __name__ == "__main__":
    command.run(main)
