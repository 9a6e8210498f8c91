"""Evaluates a model on tasks: python -m foundry_jax.eval --task=mmlu --model=smollm2-135m --data=FOLDER"""

import argparse
import contextlib
import inspect
import json
import logging
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foundry_jax import command
from foundry_jax.errors import UserError
from foundry_jax.runfolder import encode_json

if TYPE_CHECKING:  # --help must not wait for JAX
    from foundry_jax.tasks.base import Task
    from foundry_jax.tasks.scoring import Scorer
    from foundry_jax.zoo.source import Source

log = logging.getLogger("foundry_jax.eval")  # __name__ is "__main__" here

PROGRAM = "python -m foundry_jax.eval"
EVERYTHING = "all"
LM_EVAL = "lm_eval:"
OPTIONS = ("shots", "samples", "pass_at", "temperature", "top_p", "seed", "allow_code_execution")  # of some tasks
LINE_SECONDS = 5.0  # between lines of progress where there is no terminal


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the flags of a command line; options of tasks that were not given are None."""
    parser = command.Parser(
        prog=PROGRAM,
        description="Evaluates a model on tasks, or goes on where it stopped.",
        epilog="Exit codes: 0 done, 1 a mistake in what was asked, or a task that failed.",
    )
    parser.add_argument(
        "--task", required=True, metavar="TASKS",
        help="some of gsm8k, mmlu, humaneval, constitution, with commas between them; all; or lm_eval:NAME, a task of "
        "the package lm-eval",
    )  # fmt: skip
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="RUN", help="a run folder")
    model.add_argument("--model", metavar="NAME", help="a pretrained model's name, or owner/name on the hub")
    model.add_argument("--path", metavar="FOLDER", help="a Hugging Face folder, a folder of adapters, or a GGUF file")
    parser.add_argument("--step", type=_step, help="of --checkpoint: best, latest or a number (default: latest)")
    parser.add_argument("--ema", action="store_true", help="of --checkpoint: the moving average of the weights")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and products (default: float32)"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="file or folder of items; default: $FOUNDRY_EVAL_DATA, else the hub"
    )
    parser.add_argument("--limit", type=_count, metavar="N", help="most items of a task; subjects take turns")
    parser.add_argument("--shots", type=_whole, metavar="N", help="examples in a prompt (default: gsm8k 5, mmlu 5)")
    parser.add_argument("--batch-size", type=_batch_size, metavar="auto|N", help="rows at once; changes no score")
    parser.add_argument("--max-length", type=_count, metavar="N", help="tokens of context (default: the model's)")
    parser.add_argument("--samples", type=_count, metavar="N", help="humaneval: completions a problem (default: 1)")
    parser.add_argument("--pass-at", type=_counts, metavar="K,K", help="humaneval: each k of pass@k (default: 1)")
    parser.add_argument("--temperature", type=float, help="humaneval: default 0, or 0.2 for several samples")
    parser.add_argument("--top-p", type=float, help="humaneval: default 0.95 unless the temperature is 0")
    parser.add_argument("--seed", type=_whole, metavar="N", help="humaneval: of the draws (default: 0)")
    parser.add_argument(
        "--allow-code-execution", action="store_const", const=True,
        help="humaneval: run what the model wrote, in a sandbox",
    )  # fmt: skip
    parser.add_argument("--workdir", help="folder of results, one folder a task (default: evals/ and the model)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, to stdout")
    flags = parser.parse_args(argv)
    if not flags.checkpoint and (flags.ema or flags.step is not None):
        parser.error("--step and --ema choose among the weights of a run: give --checkpoint")
    return flags


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be auto or a whole number, 1 or more")
    return int(text)


def _step(text: str) -> int | str:
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be best, latest or a number")
    return int(text) if text.isdecimal() else text


def main() -> None:
    """The command. What can be refused is refused before the model's weights are read."""
    flags = parse_arguments(sys.argv[1:])
    tasks = make_tasks(flags)
    source = open_model(flags)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(f"{source.name} has no tokenizer and cannot read the tasks: put its tokenizer.json there.")
    label = flags.checkpoint or flags.model or flags.path
    identity = {"model": label, "weights": source.fingerprint, "tokenizer": tokenizer.hash, "dtype": flags.dtype,
                "max_length": flags.max_length}  # fmt: skip
    workdir = pathlib.Path(flags.workdir or default_workdir(label, source.fingerprint)).expanduser()
    scorer, facts = make_scorer(flags, source)
    done, failed = run_all(tasks, scorer, workdir, identity, facts, flags)
    if flags.json:
        print(json.dumps(encode_json({"model": label, "results": done, "failed": failed})))
    elif done:
        print(table(done))
    log.info("Results are in %s.", workdir)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(tasks)} tasks failed. {reasons}")


def make_tasks(flags: argparse.Namespace) -> "dict[str, Task | None]":
    """Returns the tasks by name, their data read; None for one of lm-eval's.

    Raises:
        UserError: an unknown task, no data or malformed data, or an option that none of them has.
    """
    from foundry_jax.registry import unknown
    from foundry_jax.tasks import TASKS

    names = _names(flags.task, TASKS)
    given = {option: getattr(flags, option) for option in OPTIONS if getattr(flags, option) is not None}
    used = {"shots"} if any(name.startswith(LM_EVAL) for name in names) else set()
    chosen = {}
    for name in names:
        if name.startswith(LM_EVAL):
            continue
        if name not in TASKS:
            raise UserError(f"{unknown(name, TASKS, 'task')} Or all, or {LM_EVAL}NAME for a task of lm-eval.")
        chosen[name] = {option: value for option, value in given.items() if option in _parameters(TASKS[name])}
        used |= chosen[name].keys()
    for option in given | ({"data": flags.data} if flags.data and not chosen else {}):
        if option not in used:
            raise UserError(f"--{option.replace('_', '-')} means nothing to {', '.join(names)}: leave it out.")
    tasks = {}
    for name in sorted(names, key=lambda name: "allow_code_execution" not in _parameters(TASKS.get(name))):
        tasks[name] = TASKS[name](flags.data, **chosen[name]) if name in chosen else _of_lm_eval(name)
        if tasks[name]:
            tasks[name].prepare()
    return {name: tasks[name] for name in names}


def _parameters(task: type | None) -> Collection[str]:
    return inspect.signature(task).parameters if task else ()


def _names(text: str, all_names: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--task={text!r} names no task; choose from {', '.join(all_names)} or all.")
    if EVERYTHING in names:
        names = [other for name in names for other in (all_names if name == EVERYTHING else [name])]
    return list(dict.fromkeys(names))


def _of_lm_eval(name: str) -> None:
    from foundry_jax.tasks import lm_eval

    lm_eval.check(name.removeprefix(LM_EVAL))


def open_model(flags: argparse.Namespace) -> "Source":
    """Returns the model on disk; its weights are not read yet, except those of a run.

    Raises:
        UserError: there is none.
    """
    from foundry_jax.zoo import open_source
    from foundry_jax.zoo.run import open_run

    if flags.checkpoint:
        step = "latest" if flags.step is None else flags.step
        return open_run(pathlib.Path(flags.checkpoint).expanduser(), open_source, step, ema=flags.ema)
    if flags.path and not pathlib.Path(flags.path).expanduser().exists():
        raise UserError(f"--path={flags.path!r} is not there: give a folder or a GGUF file, or a name with --model.")
    return open_source(flags.path or flags.model)


def default_workdir(label: str, fingerprint: str) -> pathlib.Path:
    """Returns evals/<model>-<its weights>, so that the same command finds its results again, and no others."""
    name = re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[-80:]
    return pathlib.Path("evals") / f"{name}-{fingerprint[:8]}"


def make_scorer(flags: argparse.Namespace, source: "Source") -> "tuple[Scorer, dict[str, Any]]":
    """Returns what answers requests, the weights read, and what there is to say about where it runs."""
    from foundry_jax import compilation, provenance
    from foundry_jax.tasks.scoring import Scorer
    from foundry_jax.zoo.pretrained import pretrained

    compilation.enable_cache()
    model = pretrained(source, dtype=flags.dtype)
    scorer = Scorer(model, batch_size=flags.batch_size, max_length=flags.max_length)
    return scorer, {"environment": provenance.environment(model.plan)}


def run_all(
    tasks: "Mapping[str, Task | None]",
    scorer: "Scorer",
    workdir: pathlib.Path,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    flags: argparse.Namespace,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns (results as result.json has them, by task; why the others failed). One that fails stops no other."""
    from foundry_jax.tasks import run

    done, failed = {}, {}
    for name, task in tasks.items():
        folder = workdir / re.sub(r"[^\w.=+-]+", "-", name)
        try:
            with progress_of(name) as progress:
                if task is None:
                    done[name] = _run_lm_eval(name, scorer, folder, identity, facts, flags, progress)
                else:
                    options = {"model": identity, "facts": facts, "progress": progress}
                    done[name] = run(task, scorer, folder, limit=flags.limit, **options).to_json()
        except UserError as error:
            failed[name] = str(error)
            log.error("%s failed: %s", name, error)
    return done, failed


def _run_lm_eval(
    name: str,
    scorer: "Scorer",
    folder: pathlib.Path,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    flags: argparse.Namespace,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    from foundry_jax.tasks import lm_eval
    from foundry_jax.tasks.results import Journal, metrics_json

    settings = {"task": name, **identity, "shots": flags.shots, "limit": flags.limit}
    before = scorer.truncated
    with Journal(folder, settings) as journal:
        metrics = lm_eval.run(name.removeprefix(LM_EVAL), scorer, flags.limit, flags.shots, progress=progress)
        values = {
            "task": name,
            "dataset": name,
            "n": max((metric.n for metric in metrics), default=0),
            "truncated": scorer.truncated - before,
            "metrics": metrics_json(metrics),
            "settings": settings,
        }
        journal.finish({**values, **facts})
    return values


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the scores for people; those of single subjects are in result.json only."""
    import io

    import rich.console
    import rich.table

    from foundry_jax.tasks.base import Metric

    right = {"justify": "right"}
    columns = [("task", {}), ("metric", {}), ("n", right), ("score", right), ("standard error", right),
               ("truncated", right)]  # fmt: skip
    shown = rich.table.Table(box=None, pad_edge=False)
    for name, options in columns:
        shown.add_column(name, **options)
    for task, result in results.items():
        rows = [(name, found) for name, found in result["metrics"].items() if not Metric(name, **found).is_detail]
        for i, (name, found) in enumerate(rows):
            what = f"{task} ({result['dataset']})" if result["dataset"].lower() != task else task
            cells = [what, name, f"{found['n']:,}", f"{found['value']:.4f}", _stderr(found["stderr"])]
            shown.add_row(*cells, f"{result['truncated']:,}") if i == 0 else shown.add_row("", *cells[1:], "")
    text = io.StringIO()
    rich.console.Console(file=text, width=160, highlight=False, soft_wrap=True).print(shown)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _stderr(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


@contextlib.contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with (requests done, in all): a bar on a terminal, now and then a line elsewhere."""
    if sys.stderr.isatty():
        import rich.console
        import rich.progress

        columns = ["{task.description}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
                   rich.progress.TimeRemainingColumn()]  # fmt: skip
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            log.info("%s: %s of %s requests.", what, f"{done:,}", f"{total:,}")

    yield line


if __name__ == "__main__":
    command.run(main)
