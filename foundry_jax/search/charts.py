"""The charts of a sweep's report, by matplotlib.

Each is drawn once: as PNG in the colours of light paper, and as SVG whose colours are names of the page that it stands
in, so that the same drawing follows the page into the dark, in the page's own font.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from foundry_jax.search.reading import Contestant, Curve, Run, Sweep

# Names of the page's colours, and what they are on paper. Each has to be unlike the others: the SVG knows them by it.
INK, MUTED, RULE, BAND, PAPER = "#1c2128", "#5c6670", "#d3d9df", "#e9edf1", "#fefefe"
# After Okabe & Ito 2008, which the colour-blind can tell apart, darkened to a contrast of 3 or more on white.
SERIES = ("#0072b2", "#d55e00", "#00875f", "#a64d86", "#94700a", "#5a6bd8")
NAMES = {INK: "ink", MUTED: "muted", RULE: "rule", BAND: "band", PAPER: "paper"}
NAMES |= {color: f"series-{number}" for number, color in enumerate(SERIES, start=1)}
MINUS = "\u2212"  # as wide as a plus
DASHES = ("-", "--", ":")  # the next one each time the colours are used up
VERDICT_MARKERS = {"better": ">", "worse": "<", "equivalent": "s", "inconclusive": "o"}
DECIDED = ("better", "worse", "equivalent")  # filled markers; hollow ones decide nothing

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so widths are the same everywhere
    "font.size": 9,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Chart:
    """One drawing: the stem of its file, what it shows, how to read it, and whether it needs the page's width."""

    name: str
    title: str
    caption: str
    figure: Figure
    wide: bool = False

    def png(self) -> bytes:
        """Returns the drawing on white, at twice the resolution of a plain screen."""
        return self._drawn("png", dpi=200, facecolor="white")

    def svg(self) -> str:
        """Returns the drawing as an <svg> element for an HTML page that has the colours --ink, --series-1, ..."""
        with matplotlib.rc_context({"svg.hashsalt": self.name}):  # ids that do not change from call to call
            text = self._drawn("svg", transparent=True).decode()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # the page's own font
        text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _named(found.group()), text)
        text = re.sub(r'(id="|#)(?=\w)', rf"\g<1>{self.name}-", text)  # several drawings share a page
        size = re.search(r'viewBox="[^"]*"', text).group()
        return re.sub(r"<svg[^>]*>", f'<svg {size} role="img" aria-label="{self.title}">', text, count=1)

    def _drawn(self, format: str, **options) -> bytes:
        buffer = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else {"Software": None}  # the same bytes from the same sweep
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format=format, metadata=metadata, **options)
        return buffer.getvalue()


def _named(color: str) -> str:
    """Returns the page's name of a colour; those without one are not for pages."""
    return f"var(--{NAMES[color]})"


def draw(sweep: Sweep) -> list[Chart]:
    """Returns all charts for which the sweep has numbers."""
    makers = (forest, curves, differences, *(_cost_chart(*cost) for cost in COSTS), rates)
    with matplotlib.rc_context(STYLE):
        drawn = [chart for make in makers if (chart := make(sweep)) is not None]
        for chart in drawn:  # laid out once, or the second file of a drawing would differ from the first
            chart.figure.draw_without_rendering()
            chart.figure.set_layout_engine("none")
    return drawn


def color_of(contestant: Contestant) -> str:
    """Returns a contestant's colour, the same in all charts; the incumbent's is ink."""
    return SERIES[(contestant.index - 1) % len(SERIES)] if contestant.index else INK


def _dash_of(contestant: Contestant) -> str:
    return DASHES[(contestant.index - 1) // len(SERIES) % len(DASHES)] if contestant.index else "-"


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


# Forest plot


def forest(sweep: Sweep) -> Chart | None:
    """Returns every effect with its intervals against the band of effects too small to matter."""
    judged = [one for one in sweep.contestants if one.verdict]
    if not judged:
        return None
    judged.sort(key=lambda one: one.verdict.effect)
    figure, axes = _axes(9.4, 0.9 + 0.46 * len(judged))
    axes.axvspan(-sweep.min_effect, sweep.min_effect, color=BAND, linewidth=0)
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, contestant in enumerate(judged):
        _effect(axes, row, contestant)
    axes.set_xlim(*_forest_limits(judged, sweep.min_effect))
    axes.set_yticks(range(len(judged)), [one.name for one in judged], color=INK)
    axes.set_ylim(-0.6, len(judged) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"improvement over the incumbent in {sweep.metric.unit}  (worse  ←  0  →  better)")
    caption = (
        "Thick bar: the interval that decides, adjusted for the number of contestants. Thin bars below it: over seeds, "
        f"and over parts of the text or items. Shaded: effects under {sweep.min_effect:g}, too small to matter. Filled "
        "markers are decided (▶ better, ◀ worse, ■ equivalent), hollow ones are not."
    )
    return Chart("effects", "Effects against the incumbent", caption, figure, wide=True)


def _effect(axes: Axes, row: int, contestant: Contestant) -> None:
    verdict, color = contestant.verdict, color_of(contestant)
    for estimate, below in ((verdict.over_seeds, 0.18), (verdict.over_units, 0.28)):
        if estimate is not None and estimate.interval is not None:
            axes.hlines(row - below, *_clipped(estimate.interval), color=MUTED, linewidth=1)
    if verdict.interval is not None:
        axes.hlines(row, *_clipped(verdict.interval), color=color, linewidth=4, alpha=0.45)
    fill = color if verdict.verdict in DECIDED else PAPER
    marker = VERDICT_MARKERS[verdict.verdict]
    axes.plot(verdict.effect, row, marker, color=color, markerfacecolor=fill, markersize=7, zorder=3)
    text = f"{verdict.effect:+.4f}  {verdict.verdict}".replace("-", MINUS)
    axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)


def _clipped(interval: Sequence[float]) -> tuple[float, float]:
    """Returns an interval that can be drawn; infinite ends leave the picture."""
    return tuple(float(np.clip(end, -1e6, 1e6)) for end in interval)


def _forest_limits(judged: Sequence[Contestant], min_effect: float) -> tuple[float, float]:
    """Returns limits that hold all effects and the intervals, except the ends of those that are very wide."""
    effects = [one.verdict.effect for one in judged]
    ends = [end for one in judged for end in one.verdict.interval or () if math.isfinite(end)]
    reach = 4 * max([min_effect, *map(abs, effects)]) or 1.0
    low, high = (float(np.clip(edge, -reach, reach)) for edge in (min([*ends, *effects]), max([*ends, *effects])))
    low, high = min(low, -1.6 * min_effect), max(high, 1.6 * min_effect)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


# Learning curves


def curves(sweep: Sweep) -> Chart | None:
    """Returns validation on the way of every contestant: the mean over its seeds, and their span."""
    metric = sweep.shown_curve
    if metric is None:
        return None
    figure, axes = _axes(6.2, 4.0)
    for contestant in sweep.contestants:
        _band(axes, contestant, _stacked([run.curves[metric.name] for run in _with_curve(contestant, metric.name)]))
    _zoom(axes, higher_is_better=metric.higher_is_better)
    name = metric.name.replace("_", " ")
    _finish_curves(axes, name if name == metric.unit else f"{name} ({metric.unit})")
    caption = (
        "On the whole validation set. Line: mean over seeds; band: from the lowest to the highest seed. "
        "The first fifth of the steps may lie outside."
    )
    return Chart("curves", "Learning curves", caption, figure)


def differences(sweep: Sweep) -> Chart | None:
    """Returns how far each contestant is ahead of the incumbent on the way, by pairs of the same seed."""
    metric = sweep.shown_curve
    if metric is None or len(sweep.contestants) < 2:
        return None
    figure, axes = _axes(6.2, 4.0)
    axes.axhline(0, color=INK, linewidth=1)
    if metric == sweep.metric:
        axes.axhspan(-sweep.min_effect, sweep.min_effect, color=BAND, linewidth=0, zorder=0)
    old = {run.seed: run.curves[metric.name] for run in _with_curve(sweep.incumbent, metric.name)}
    sign = 1 if metric.higher_is_better else -1
    drawn = []
    for contestant in sweep.contestants[1:]:
        pairs = [(run, old[run.seed]) for run in _with_curve(contestant, metric.name) if run.seed in old]
        stacked = _stacked([_difference(run.curves[metric.name], curve, sign) for run, curve in pairs])
        if _band(axes, contestant, stacked):
            drawn.append(stacked.values)
    if not drawn:
        return None
    _finish_curves(axes, f"improvement ({metric.unit})")
    caption = (
        "Ahead of the incumbent (above 0) or behind it, by pairs of the same seed. Line: mean; band: all seeds"
        + (f"; grey: effects under {sweep.min_effect:g}." if metric == sweep.metric else ".")
    )
    return Chart("differences", "Difference to the incumbent", caption, figure)


def _with_curve(contestant: Contestant, metric: str) -> list[Run]:
    return [run for run in contestant.runs if metric in run.curves]


def _difference(new: Curve, old: Curve, sign: int) -> Curve:
    steps, at_new, at_old = np.intersect1d(new.steps, old.steps, return_indices=True)
    return Curve(steps, sign * (new.values[at_new] - old.values[at_old]))


def _stacked(found: Sequence[Curve]) -> Curve:
    """Returns curves of the steps that all of them have: values [number of curves, steps]."""
    if not found:
        return Curve(np.zeros(0), np.zeros((0, 0)))
    steps = found[0].steps
    for curve in found[1:]:
        steps = np.intersect1d(steps, curve.steps)
    return Curve(steps, np.stack([curve.values[np.isin(curve.steps, steps)] for curve in found]))


def _band(axes: Axes, contestant: Contestant, curve: Curve) -> bool:
    """Draws the mean of curves and what lies between the lowest and the highest; returns whether there was any."""
    if curve.values.size == 0:
        return False
    color, mark = color_of(contestant), "." if len(curve.steps) < 30 else ""
    if len(curve.values) > 1:
        axes.fill_between(curve.steps, curve.values.min(0), curve.values.max(0), color=color, alpha=0.15, linewidth=0)
    label = contestant.name if contestant.has_counted else f"{contestant.name} ({contestant.status})"
    order = 2.5 - contestant.index / 100  # the incumbent on top
    style = {"marker": mark, "color": color, "label": label, "zorder": order}
    axes.plot(curve.steps, curve.values.mean(0), _dash_of(contestant), **style)
    return True


def _zoom(axes: Axes, *, higher_is_better: bool) -> None:
    """Leaves out what lies beyond the values of the first fifth: how all models begin tells nothing of them."""
    drawn = [(line.get_xdata(), line.get_ydata()) for line in axes.lines]
    early = max((steps[-1] for steps, _ in drawn), default=0) / 5
    late = np.concatenate([values[steps >= early] for steps, values in drawn] or [np.zeros(0)])
    late = late[np.isfinite(late)]
    if len(late) > 1 and np.ptp(late) > 0:
        margin = 0.06 * np.ptp(late)
        low, high = axes.get_ylim()
        axes.set_ylim(
            late.min() - margin if higher_is_better else low, high if higher_is_better else late.max() + margin
        )


def _finish_curves(axes: Axes, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.figure.legend(loc="outside lower center", ncols=min(3, len(axes.get_legend_handles_labels()[1])), fontsize=8)


# Quality against cost


LABEL_AREA, LABEL_HEIGHT = 190, 10  # points: how high the plot is, and a name in it
COSTS: tuple[tuple[str, str, Callable[[Contestant], float | None]], ...] = (
    ("flops", "training FLOPs, whole run", lambda one: one.forecast.get("flops")),
    ("seconds", "seconds of a run, mean over seeds", lambda one: one.seconds),
    ("kv", "key/value cache, bytes per token", lambda one: one.forecast.get("kv_bytes_per_token")),
)


def _cost_chart(name: str, label: str, cost: Callable[[Contestant], float | None]) -> Callable[[Sweep], Chart | None]:
    def make(sweep: Sweep) -> Chart | None:
        points = {
            one: (cost(one), one.mean[sweep.metric_key])
            for one in sweep.contestants
            if one.has_counted and sweep.metric_key in one.mean and cost(one)
        }
        if len(points) < 2:
            return None
        figure, axes = _axes(4.4, 3.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        front = pareto(points, higher_is_better=sweep.metric.higher_is_better)
        _steps_of_front(axes, [points[one] for one in front], higher_is_better=sweep.metric.higher_is_better)
        for contestant, point in points.items():
            color, marker = color_of(contestant), "o" if contestant.index else "D"
            fill = color if contestant in front else PAPER
            axes.plot(*point, marker, color=color, markerfacecolor=fill, markersize=7, zorder=3)
        _name_points(axes, points)
        axes.margins(x=0.12, y=0.12)
        axes.set_xlabel(label)
        axes.set_ylabel(sweep.metric.unit)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        caption = "Filled and joined: the Pareto front, which nothing beats at no more cost. Diamond: the incumbent."
        return Chart(f"quality-{name}", f"Quality against {label.partition(',')[0]}", caption, figure)

    return make


def pareto(points: Mapping[Contestant, tuple[float, float]], *, higher_is_better: bool) -> list[Contestant]:
    """Returns whose (cost, quality) no other point reaches or beats in both and beats in one, the cheapest first."""
    sign = -1 if higher_is_better else 1
    front, best = [], math.inf
    for contestant in sorted(points, key=lambda one: (points[one][0], sign * points[one][1])):
        quality = sign * points[contestant][1]
        equal = bool(front) and points[front[-1]] == points[contestant]
        if quality < best or equal:
            front.append(contestant)
            best = quality
    return front


def _steps_of_front(axes: Axes, front: Sequence[tuple[float, float]], *, higher_is_better: bool) -> None:
    costs, qualities = zip(*front, strict=True)
    axes.step(costs, qualities, where="post", color=MUTED, linewidth=1, linestyle="--")


def _name_points(axes: Axes, points: Mapping[Contestant, tuple[float, float]]) -> None:
    """Writes the names beside their points, on the side with more room, and none on another."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    heights = {"left": math.inf, "right": math.inf}  # of the last name on each side, in points
    for contestant, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        share, here = (x - low) / (high - low), (y - bottom) / (top - bottom) * LABEL_AREA
        side, other = ("left", "right") if share < 0.5 else ("right", "left")
        if here > heights[side] - LABEL_HEIGHT and here < heights[other] - LABEL_HEIGHT and 0.2 < share < 0.8:
            side = other
        heights[side] = min(here, heights[side] - LABEL_HEIGHT)
        offset = (7 if side == "left" else -7, heights[side] - here + 3)
        axes.annotate(
            contestant.name, (x, y), xytext=offset, textcoords="offset points", ha=side, va="bottom", fontsize=8
        )


def short(number: float) -> str:
    """Returns a number in at most four digits and a letter: 1.31e14 -> "131T"."""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


# Learning rates


def rates(sweep: Sweep) -> Chart | None:
    """Returns what the learning-rate bracket measured of each contestant."""
    tried = [one for one in sweep.contestants if one.rates]
    if not tried:
        return None
    figure, axes = _axes(6.2, 4.0)
    for contestant in tried:
        found = sorted((rate, loss) for rate, loss in contestant.rates.items() if math.isfinite(loss))
        if found:
            color, dash = color_of(contestant), _dash_of(contestant)
            axes.plot(*zip(*found, strict=True), dash, marker="o", color=color, label=contestant.name, markersize=5)
    log_rates(axes, sorted({rate for one in tried for rate in one.rates}))
    axes.set_ylabel("loss of the bracket's runs")
    axes.figure.legend(loc="outside lower center", ncols=min(3, len(tried)), fontsize=8)
    return Chart("rates", "Learning-rate bracket", "Each contestant then ran at its best rate.", figure)


def log_rates(axes: Axes, ticks: Sequence[float]) -> None:
    """Makes the x axis one of learning rates, evenly spaced by ratio, with these ticks."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("peak learning rate")


# The range test of lr_finder.py


def range_test(found: Mapping[str, Any]) -> Chart:
    """Returns the losses of a range test over its rates, with the suggestion and, if there is one, the bracket.

    Args:
        found: what lr_finder.json holds.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(7.4, 4.2)
        rates, losses = np.array(found["rates"]), np.array(found["losses"], float)
        axes.plot(rates, losses, ".", color=MUTED, markersize=3, label="loss of each step")
        axes.plot(rates, found["smoothed"], color=SERIES[0], label="smoothed")
        suggestion = found["suggestion"]["learning_rate"]
        axes.axvline(suggestion, color=SERIES[1], label=f"suggestion {suggestion:.2g}: {found['suggestion']['rule']}")
        axes.axvline(
            found["config"]["learning_rate"], color=MUTED, linestyle=":", linewidth=1, label="config's own rate"
        )
        check = found["check"] or {"losses": {}}
        points = [(float(rate), loss) for rate, loss in check["losses"].items() if math.isfinite(loss)]
        if points:
            label = f"bracket: last fifth of {check['steps']} steps"
            axes.plot(*zip(*points, strict=True), "s-", color=SERIES[2], markersize=5, linewidth=1, label=label)
        shown = losses[np.isfinite(losses)].tolist() + [loss for _, loss in points]
        smallest, start = min(shown), np.nanmax(losses[: max(2, len(losses) // 20)])
        axes.set_ylim(smallest - 0.1 * (start - smallest), start + 0.25 * (start - smallest))
        first, last = math.ceil(math.log10(rates[0]) - 1e-9), math.floor(math.log10(rates[-1]) + 1e-9)
        log_rates(axes, [10.0**power for power in range(first, last + 1)])
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss (nats)")
        axes.legend(loc="lower left", fontsize=8)
    return Chart("lr_finder", "Learning-rate range test", found["ended"], figure)
