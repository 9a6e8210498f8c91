"""Finds out which mutation is better: python -m foundry_jax.cli.sweep attention mla gqa_1kv --promote --jobs 2"""

import argparse
import json
import logging
import pathlib
import sys
from typing import Any

from foundry_jax import command
from foundry_jax.search.matching import MATCHES
from foundry_jax.search.request import Request, seconds_of

log = logging.getLogger("foundry_jax.sweep")  # __name__ is "__main__" here

EPILOG = """
  sweep attention mla gqa_1kv         two contestants against the incumbent, the config as it is
  sweep attention=mla,gqa_1kv lr=3e-3,1e-3    a grid of four
  sweep attention=mla lr=1e-3 --stack one mutation upon the other: attention=mla, then both
  sweep mla moe                       bare names, a contestant each

Any config key can be set for all of them, such as --config.num_steps=100. Run the same command again to go on with a
sweep that was stopped or killed. Exit codes: 0 decided, 1 a mistake in what was asked, or nobody was trained to the
end, 75 stopped on request.
"""


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.cli.sweep",
        description="Trains mutations and the incumbent on the same seeds; says which are better and how sure it is.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="MUTATION", help="a type and its values, TYPE=VALUE,VALUE, or bare names")
    add("--config", default="configs/tiny.py", metavar="FILE[:MUTATIONS]", help="the incumbent (default: %(default)s)")
    add("--stack", action="store_true", help="one mutation upon the other, not every combination")
    add("--eval-task", action="append", default=[], metavar="TASK", help="besides: gsm8k, mmlu(limit=200), ...")
    add("--data", metavar="PATH", help="of --eval-task: file or folder of its items")
    add("--metric", help="what decides: bits_per_byte, loss, TASK, TASK/SCORE (default: the first --eval-task, if any)")
    add("--seeds", type=int, default=3, help="paired runs of everybody (default: 3)")
    add("--max-seeds", type=int, help="add seeds up to this while undecided (default: --seeds)")
    add("--first-seed", type=int, default=0, help="the first of the seeds (default: 0)")
    add("--alpha", type=float, default=0.05, help="accepted share of wrong verdicts (default: 0.05)")
    add(
        "--min-effect", type=float, help="smallest difference worth having, in the metric's unit (default: 0.005; 0.01)"
    )
    add("--match", choices=MATCHES, default="steps", help="what contestants get as much of (default: steps)")
    add("--lr-bracket", type=int, default=0, metavar="K", help="try K learning rates for everybody first")
    add("--rungs", type=int, default=0, metavar="N", help="keep the better half N times on the way")
    add("--budget", metavar="TIME", help="choose seeds and steps that fit: 30m, 2h")
    add("--jobs", type=int, default=1, help="processes that train at the same time (default: 1)")
    add("--patience", type=float, default=900.0, metavar="SECONDS", help="without a sign of life, then start again")
    add("--promote", action="store_true", help="make the best contestant that is better the new incumbent")
    add("--dry-run", action="store_true", help="build, check and forecast everything, train nothing")
    add("--workdir", help="the sweep's folder (default: runs/sweeps/ and what is asked)")
    add("--json", action="store_true", help="print the result as JSON, and nothing else, to stdout")
    flags, overrides = command.parse(parser, argv)
    if flags.jobs < 1:
        parser.error(f"--jobs={flags.jobs} must be 1 or more")
    if flags.patience <= 0:
        parser.error(f"--patience={flags.patience:g} must be more than 0 seconds")
    if flags.data and not flags.eval_task:
        parser.error("--data is of --eval-task; name one")
    return flags, overrides


def request_of(flags: argparse.Namespace, overrides: list[str]) -> Request:
    """Returns what is asked."""
    from foundry_jax.search import measuring

    tasks = [_with_data(task, flags.data) for task in flags.eval_task]
    first = tasks[0].partition("(")[0] if tasks else "bits_per_byte"
    metric = measuring.metric_of(flags.metric or first)
    return Request(
        config=flags.config,
        words=tuple(flags.words),
        overrides=tuple(overrides),
        stack=flags.stack,
        eval_tasks=", ".join(tasks),
        metric=metric.name,
        seeds=flags.seeds,
        max_seeds=flags.max_seeds or flags.seeds,
        first_seed=flags.first_seed,
        alpha=flags.alpha,
        min_effect=metric.default_min_effect if flags.min_effect is None else flags.min_effect,
        match=flags.match,
        lr_bracket=flags.lr_bracket,
        rungs=flags.rungs,
        budget=None if flags.budget is None else seconds_of(flags.budget),
    )


def _with_data(task: str, data: str | None) -> str:
    """Returns a task of eval.tasks that reads its items from `data`."""
    if data is None:
        return task
    name, bracket, rest = task.partition("(")
    return f"{name}(data={str(pathlib.Path(data).absolute())!r}{', ' + rest if bracket else ')'}"


def main() -> None:
    """The command."""
    flags, overrides = parse_arguments(sys.argv[1:])
    request = request_of(flags, overrides)
    folder = pathlib.Path(flags.workdir or request.default_folder())
    from foundry_jax.search import sweep

    options = sweep.Options(flags.jobs, flags.patience, flags.promote, flags.dry_run)
    result = sweep.run(request, folder, options)
    if not flags.json:
        show(result)
    if not flags.dry_run:
        path = report(folder)
        log.info("Report: %s", path)
    if flags.json:
        from foundry_jax.runfolder import encode_json

        print(json.dumps(encode_json(result)))


def report(folder: pathlib.Path) -> pathlib.Path:
    """Returns the sweep's report, which is written if it is not newer than the result."""
    path = folder / "report.html"
    if path.exists() and path.stat().st_mtime >= (folder / "result.json").stat().st_mtime:
        return path
    from foundry_jax.search import report as report_lib  # draws charts, which takes a second to import

    return report_lib.write(folder).html


def show(result: dict[str, Any]) -> None:
    """Prints a result for people."""
    import rich.console

    console = rich.console.Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(forecast_table(result))
    refused = {n: c["reason"] for n, c in result["contestants"].items() if c["status"] in ("refused", "failed")}
    for name, reason in refused.items():
        console.print(f"{name}: {reason}", markup=False)
    if result["decision"] is None:
        return
    console.print()
    console.print(verdict_table(result))
    if rungs := result["rungs"]:
        wrong = [name for name, one in rungs["audited"].items() if one["would_have_won"]]
        better = (
            f": {', '.join(wrong)} did better in the end than any that was kept; sweep it without --rungs"
            if wrong
            else ""
        )
        console.print(f"Of {rungs['checked']} left behind and checked, {rungs['wrong']} wrongly{better}.", markup=False)
    decision = result["decision"]
    console.print(decision["why"], markup=False)
    if decision["promoted"]:
        console.print(
            f"{decision['promoted']} is promoted: it is the incumbent of {result['config']} now.", markup=False
        )


def forecast_table(result: dict[str, Any]):
    """Returns the table of what the contestants are and cost."""
    import rich.table

    columns = (
        "contestant",
        "parameters",
        "active",
        "memory",
        "FLOPs/token",
        "KV bytes/token",
        "s/step",
        "steps",
        "run",
    )
    table = rich.table.Table(*columns, "gate", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, one in result["contestants"].items():
        f, gate = one["forecast"], one["gate"]
        passed = f"{sum(check['passed'] for check in gate)}/{len(gate)}" if gate else "-"
        if not f:
            table.add_row(_plain(name), *["-"] * 8, passed)
            continue
        sizes = f"{f['params']:,}", f"{f['active_params']:,}", f"{f['memory_bytes'] / 2**20:,.0f} MiB"
        work = f"{f['flops_per_token']:.3g}", f"{f['kv_bytes_per_token']:,.0f}", f"{f['step_seconds']:.3g}"
        table.add_row(_plain(name), *sizes, *work, f"{f['steps']:,}", f"{f['run_seconds']:.0f} s", passed)
    return table


def verdict_table(result: dict[str, Any]):
    """Returns the table of the verdicts, the best first."""
    import rich.table

    metric = result["metric"]["name"]
    table = rich.table.Table(
        "contestant", metric, "better by", "interval", "p", "seeds", "verdict", box=None, pad_edge=False
    )
    for column in table.columns[1:-1]:
        column.justify = "right"
    effect = lambda item: -item[1]["verdict"]["effect"] if item[1]["verdict"] else -1e-12  # noqa: E731
    for name, one in sorted(result["contestants"].items(), key=effect):
        told, mean = one["verdict"], _mean(one, metric)
        if told is None:
            table.add_row(_plain(name), mean, "", "", "", str(len(one["runs"])), one["status"])
            continue
        interval = "{:+.4f} {:+.4f}".format(*told["interval"]) if told["interval"] else "-"
        p = "-" if told["p_value"] is None else f"{told['p_value']:.2g}"
        seeds = str(told["over_seeds"]["n"])
        table.add_row(_plain(name), mean, f"{told['effect']:+.4f}", interval, p, seeds, told["verdict"])
    return table


def _mean(contestant: dict[str, Any], metric: str) -> str:
    """Returns the mean of a metric, or of a task's first score."""
    found = {
        name: value for name, value in contestant["mean"].items() if name == metric or name.startswith(f"{metric}/")
    }
    return f"{next(iter(found.values())):.4f}" if found else "-"


def _plain(text: str):
    """Returns text that rich shows as it is."""
    import rich.text

    return rich.text.Text(text)


if __name__ == "__main__":
    command.run(main)
