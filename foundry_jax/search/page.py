"""The report's two texts, by jinja2: report.html, which holds all and loads nothing, and report.md, for a log."""

import dataclasses
import datetime
import math
import shlex
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from foundry_jax.config import load, to_flat_dict
from foundry_jax.errors import UserError
from foundry_jax.search import charts, lineage
from foundry_jax.search.charts import Chart
from foundry_jax.search.reading import Contestant, Run, Sweep

# What a contestant came to: the colour of its label, and the symbol in it.
LABELS = {
    "incumbent": ("", ""),
    "better": ("good", "▲ "),
    "worse": ("bad", "▼ "),
    "equivalent": ("", "= "),
    "inconclusive": ("open", "? "),
    "refused": ("bad", "✗ "),
    "failed": ("bad", "✗ "),
    "pruned": ("open", ""),
    "trained": ("open", ""),
}
NOT_GIVEN = ("name", "model.vocab_size")  # keys that a run fills in by itself
NOTHING = "\u2013"  # a dash, where there is no number


def html(sweep: Sweep, drawn: Sequence[Chart]) -> str:
    """Returns the report as one HTML file."""
    root, no_lineage = lineage_of(sweep)
    return (
        _environment()
        .get_template("report.html")
        .render(
            _facts(sweep, drawn),
            colors={name: color for color, name in charts.NAMES.items()},
            svg={chart.name: Markup(chart.svg()) for chart in drawn},
            costs=[chart for chart in drawn if chart.name.startswith("quality-")],
            checks=list(dict.fromkeys(check.name for one in sweep.contestants for check in one.gate)),
            judged=[one for one in sweep.contestants if one.verdict],
            lineage=root,
            no_lineage=no_lineage,
            cost=cost_of(sweep),
            commands=commands(sweep),
            environment=environment_of(sweep),
        )
    )


def markdown(sweep: Sweep, drawn: Sequence[Chart]) -> str:
    """Returns the log entry: what was tried, what came of it, what did not work and why."""
    return _environment().get_template("report.md").render(_facts(sweep, drawn))


def _facts(sweep: Sweep, drawn: Sequence[Chart]) -> dict[str, Any]:
    return {
        "sweep": sweep,
        "facts": sweep.facts,
        "charts": {chart.name: chart for chart in drawn},
        "hashes": hashes_of(sweep),
        "commit": (sweep.facts.get("environment") or {}).get("git_commit"),
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("foundry_jax.search"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment


# Lineage


@dataclasses.dataclass(frozen=True)
class Node:
    """A record of the lineage as it is shown, and those made while it was the newest promotion in force.

    state: "in force", "undone", "kept" (nothing was promoted), or "config" for the root; is_ours: made by this sweep.
    """

    state: str
    title: str
    detail: str
    is_ours: bool
    children: "tuple[Node, ...]"


def lineage_of(sweep: Sweep) -> tuple[Node | None, str]:
    """Returns (the config with the tree of its lineage below it, or None; why there is none)."""
    try:
        entries = lineage.tree(sweep.config)
    except UserError as error:
        return None, f"The lineage cannot be read: {error}"
    if not entries:
        path = lineage.file_of(sweep.config)
        return None, f"{path} has no records: no sweep of this config was asked to promote anything, seen from here."
    return Node("config", sweep.config, "as it is written", False, tuple(_node(one, sweep) for one in entries)), ""


def _node(entry: lineage.Entry, sweep: Sweep) -> Node:
    record, children = entry.record, tuple(_node(child, sweep) for child in entry.children)
    when, is_ours = moment(record.get("time")), record.get("started") == sweep.facts.get("started")
    if entry.state == "kept":
        tried = [name for name, one in record["contestants"].items() if one["status"] != "incumbent"]
        return Node("kept", "nothing promoted", f"{when}; tried {', '.join(tried)}", is_ours, children)
    changes = ", ".join(f"{key}={_as_override(value)}" for key, value in record["overrides"].items())
    verdict, unit = record["verdict"], record["metric"]["unit"]
    gain = f"{signed(verdict['effect'])} {interval(verdict['interval'])} {unit}"
    return Node(entry.state, record["name"], f"{when}; {changes}; {gain}", is_ours, children)


# Commands


def commands(sweep: Sweep) -> list[tuple[str, str]]:
    """Returns (contestant, the command that repeats its first run) of every contestant that has runs."""
    return [(one.name, run_command(sweep, one, one.runs[0])) for one in sweep.contestants if one.runs]


def run_command(sweep: Sweep, contestant: Contestant, run: Run) -> str:
    """Returns the training command that repeats a run.

    It names every key in which the run's own config differs from what the config file gives now, so it also repeats
    what the sweep chose (the seed, a tuned rate, matched steps) and a config from before a later promotion.
    """
    path, colon, given = sweep.config.partition(":")
    argument = ",".join(filter(None, [given, contestant.argument]))
    spec = f"{path}:{argument}" if argument else f"{path}{colon}"
    settings = dict(text.split("=", 1) for text in sweep.overrides)
    settings |= {key: _as_override(value) for key, value in _differences(spec, sweep.overrides, run).items()}
    settings["seed"] = str(run.seed)
    parts = [f"--config={spec}", *(f"--config.{key}={value}" for key, value in settings.items())]
    workdir = f"--workdir=runs/again/{run.folder.parent.name}-{run.folder.name}"
    return shlex.join(["python", "-m", "foundry_jax.main", *parts, workdir])


def _differences(spec: str, overrides: Sequence[str], run: Run) -> dict[str, Any]:
    """Returns what a run's config has besides what its spec and overrides give; {} if either cannot be read."""
    if run.config is None:
        return {}
    try:
        now = to_flat_dict(load(spec, overrides))
    except UserError:  # the report may be read where the config is not
        return {}
    return {k: v for k, v in run.config.items() if k in now and k not in NOT_GIVEN and _text(now[k]) != _text(v)}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _as_override(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else _text(value)


# Facts for people


def cost_of(sweep: Sweep) -> list[tuple[str, str]]:
    """Returns (what, how much) of the whole sweep."""
    cost, budget = sweep.facts["cost"], sweep.facts.get("budget") or {}
    rows = [
        ("from start to end", duration(cost.get("seconds"))),
        ("in runs", duration(cost.get("run_seconds"))),
        ("of those compiling", duration(cost.get("compile_seconds"))),
        ("runs", count(cost.get("runs"))),
        ("training FLOPs", quantity(cost.get("flops"), "FLOP")),
        ("started", moment(sweep.facts.get("started"))),
    ]
    return rows + ([("steps of a run", count(budget["steps"]))] if "steps" in budget else [])


def hashes_of(sweep: Sweep) -> list[tuple[str, str]]:
    """Returns (what, sha256) of code, validation text, items and lineage."""
    hashes = sweep.facts["hashes"]
    named = {"code": "code of foundry_jax", "validation": "validation text", "lineage": "lineage before the sweep"}
    rows = [(text, hashes.get(name) or "none") for name, text in named.items()]
    return rows + [(f"items of {task}", value) for task, value in (hashes.get("items") or {}).items()]


def environment_of(sweep: Sweep) -> str:
    """Returns devices and versions in a line."""
    found = sweep.facts.get("environment") or {}
    devices = f"{found.get('num_devices', '?')} x {found.get('device', 'unknown device')}"
    return ", ".join([devices, *(f"{name} {version}" for name, version in found.get("versions", {}).items())])


def standing(contestant: Contestant) -> tuple[str, str]:
    """Returns (kind, text) of the label that says what a contestant came to."""
    found = contestant.verdict.verdict if contestant.verdict and contestant.has_counted else contestant.status
    kind, symbol = LABELS.get(found, ("open", ""))
    return kind, symbol + found


def why(contestant: Contestant) -> str:
    """Returns one line on why a contestant came to what it did; "" for the incumbent."""
    if contestant.reason:
        return contestant.reason
    return contestant.verdict.why if contestant.verdict else ""


def sizes(contestant: Contestant) -> str:
    """Returns parameters, FLOPs, cache and memory of a contestant in a line."""
    f = contestant.forecast
    active = f" ({count(f.get('active_params'))} active)" if f.get("active_params") != f.get("params") else ""
    parts = [
        f"{count(f.get('params'))} parameters{active}",
        f"{quantity(f.get('flops_per_token'), 'FLOP')} per token to train",
        f"{count(f.get('kv_bytes_per_token'))} bytes of cache per token",
        f"{storage(f.get('memory_bytes'))} of memory for a step, estimated",
    ]
    return ", ".join(parts) + "."


def metric_names(contestant: Contestant) -> list[str]:
    """Returns the names of the metrics that any of its runs has, in their order."""
    return list(dict.fromkeys(name for run in contestant.runs for name in run.metrics))


# Numbers for people. What is not there is a dash.


def is_number(value: Any) -> bool:
    """Returns whether there is something to show."""
    return isinstance(value, (int, float)) and not math.isnan(value)


def number(value: Any) -> str:
    """Returns a metric with four decimals."""
    return f"{value:.4f}" if is_number(value) else NOTHING


def signed(value: Any) -> str:
    """Returns a difference with its sign and four decimals."""
    return f"{value:+.4f}".replace("-", charts.MINUS) if is_number(value) else NOTHING


def interval(ends: Any) -> str:
    """Returns an interval of differences."""
    if not ends:
        return NOTHING
    return "[{}, {}]".format(
        *(signed(end) if math.isfinite(end) else f"{charts.MINUS if end < 0 else '+'}∞" for end in ends)
    )


def p_value(value: Any) -> str:
    """Returns a probability."""
    if not is_number(value):
        return NOTHING
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def ratio(value: Any) -> str:
    """Returns a ratio with two decimals."""
    return f"{value:.2f}" if is_number(value) else NOTHING


def count(value: Any) -> str:
    """Returns a whole number with separators."""
    return f"{round(value):,}" if is_number(value) else NOTHING


def quantity(value: Any, unit: str) -> str:
    """Returns a large number in three digits: 1.31e14 -> "131 TFLOP"."""
    if not is_number(value):
        return NOTHING
    digits = charts.short(value)
    return f"{digits[:-1]} {digits[-1]}{unit}" if digits[-1].isalpha() else f"{digits} {unit}"


def storage(value: Any) -> str:
    """Returns bytes in MiB or GiB."""
    if not is_number(value):
        return NOTHING
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def duration(seconds: Any) -> str:
    """Returns seconds as people say them: "4.2 s", "1 min 10 s", "2 h 5 min"."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(seconds: Any) -> str:
    """Returns a time since 1970 as a date and a time of day, UTC."""
    if not is_number(seconds):
        return "at an unknown time"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def sentence(text: str) -> str:
    """Returns text that begins with a capital, unless that is a name, and ends with a full stop."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def cell(text: Any) -> str:
    """Returns text that a cell of a Markdown table can hold."""
    return " ".join(str(text).split()).replace("|", "\\|")


FILTERS = {
    "standing": standing,
    "why": why,
    "sizes": sizes,
    "metrics": metric_names,
    "color": lambda one: charts.NAMES[charts.color_of(one)],
    "within": lambda path, folder: str(path.relative_to(folder) if path.is_relative_to(folder) else path),
    "number": number,
    "signed": signed,
    "interval": interval,
    "p": p_value,
    "ratio": ratio,
    "count": count,
    "duration": duration,
    "when": moment,
    "sentence": sentence,
    "cell": cell,
}
