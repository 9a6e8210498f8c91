"""The report: it holds what the sweep found, and all of it; it loads nothing; and it bears a sweep with holes."""

import dataclasses
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest

from foundry_jax.config import load, to_flat_dict
from foundry_jax.errors import UserError
from foundry_jax.runfolder import write_json_atomic
from foundry_jax.search import charts, lineage, page, reading, report
from foundry_jax.search.verdict import Estimate, Verdict
from tests import chromium, sweeps
from tests.conftest import ROOT

CONFIG = """
from configs import smoke
from foundry_jax import mutate

def get_config(arg=""):
    return mutate.apply(smoke.get_config(), arg, lineage=__file__)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of a sweep that has everything."""
    folder = sweeps.write(tmp_path_factory.mktemp("sweep"))
    (folder / "report").mkdir()
    (folder / "report" / "old.png").touch()
    return report.write(folder)


@pytest.fixture(scope="module")
def html(written):
    return written.html.read_text("utf-8")


def edited(folder: pathlib.Path, edit) -> pathlib.Path:
    """Returns a sweep's folder after its result was edited in place."""
    found = sweeps.result()
    edit(found)
    folder.mkdir(exist_ok=True)
    write_json_atomic(folder / "result.json", found)
    return folder


# What it holds


def test_every_contestant_is_in_both_texts_with_what_it_came_to(written, html):
    log = written.markdown.read_text("utf-8")
    for name, made in sweeps.MADE.items():
        row = re.search(rf'<th scope="row"><span[^>]*></span>{re.escape(name)}</th><td><span[^>]*>([^<]*)<', html)
        assert row.group(1).split()[-1] == made.verdict or made.status
        assert f"| {name} |" in log and (made.reason or "") in log and (made.reason or "") in html
    assert html.index(">mla</th>") < html.index(">incumbent</th>") < html.index(">gqa_1kv</th>"), "the best one first"


def test_numbers_intervals_evidence_costs_and_hashes_are_shown(written, html):
    mla = written.sweep.contestants[1]
    low, high = mla.verdict.interval
    assert f"{mla.mean['bits_per_byte']:.4f}" in html
    assert f"[+{low:.4f}, +{high:.4f}]" in html and f"[+{low:.4f}, +{high:.4f}]" in written.markdown.read_text("utf-8")
    assert "changing token 41 changed the logits of tokens 3, 7, 12 by up to 0.83" in html
    for text in ("23 min 32 s", "131 TFLOP", "4f2a" * 16, "9be1" * 16, "77c0" * 16, "jax 0.10.2", "3 seeds"):
        assert text in html, text
    assert "pattern=SSSL was pruned at step 100. Of 1 pruned run kept to the end, pruning was wrong about 0." in html
    assert sweeps.COMMAND in html


def test_pictures_are_written_and_those_of_an_earlier_report_are_gone(written):
    names = {"effects", "curves", "differences", "rates", "quality-flops", "quality-seconds", "quality-kv"}
    assert {path.stem for path in written.pictures} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written.pictures)
    assert sorted(written.pictures) == sorted((written.sweep.folder / "report").iterdir())


def test_the_same_sweep_gives_the_same_bytes(written, html):
    sweep = reading.read(written.sweep.folder)
    assert page.html(sweep, charts.draw(sweep)) == html


def test_the_command_of_a_run_repeats_its_config(tmp_path):
    path = ROOT / "configs" / "smoke.py"
    ran = load(f"{path}:lion", ["num_steps=30", "seed=2", "optimizer.learning_rate=0.007", "data.batch_size=4"])
    folder = tmp_path / "lion" / "seed-2"
    folder.mkdir(parents=True)
    vocabulary = {"model.vocab_size": 257}  # which the run learned from its data
    write_json_atomic(folder / "config.json", to_flat_dict(ran) | vocabulary)
    run = reading.Run(2, folder, "done", None, {}, 1.0, 1, 30)
    base = reading.read(edited(tmp_path, lambda found: None))
    sweep = dataclasses.replace(base, config=str(path), overrides=["num_steps=30"])
    contestant = dataclasses.replace(sweep.contestants[1], argument="optimizer=lion")
    _, _, module, spec, *overrides, workdir = shlex.split(page.run_command(sweep, contestant, run))
    assert (module, workdir) == ("foundry_jax.main", "--workdir=runs/again/lion-seed-2")
    again = load(spec.removeprefix("--config="), [text.removeprefix("--config.") for text in overrides])
    assert again == ran
    assert len(overrides) == 4, "no more keys than it takes"


def test_the_lineage_is_a_tree_with_what_was_undone_and_kept(tmp_path, html):
    assert "no sweep of this config was asked to promote anything" in html
    config = tmp_path / "mine.py"
    config.write_text(CONFIG)
    found = sweeps.result() | {"config": str(config)}
    lineage.promote(found, "mla", config_path=config, expected_head="", sweep=tmp_path / "a")
    lineage.record_kept(found | {"started": 1.0}, config_path=config, sweep=tmp_path / "b")
    write_json_atomic(tmp_path / "result.json", found)
    root, _ = page.lineage_of(reading.read(tmp_path))
    (mla,) = root.children
    assert (root.title, mla.title, mla.state, mla.is_ours) == (str(config), "mla", "in force", True)
    assert "model.attention=mla" in mla.detail and "+0.0318 [+0.0228, +0.0408] bits per byte" in mla.detail
    (kept,) = mla.children
    assert kept.state == "kept" and "tried mla, layernorm" in kept.detail and not kept.is_ours
    lineage.undo(config, "by hand")
    assert page.lineage_of(reading.read(tmp_path))[0].children[0].state == "undone"
    assert '<li class="undone">' in page.html(reading.read(tmp_path), [])
    lineage.file_of(config).write_text("{}\n")
    assert "cannot be read" in page.lineage_of(reading.read(tmp_path))[1]


# How it looks


def test_it_refers_to_nothing_outside(html):
    assert not re.findall(r'(?:src|href|data|action)="(?!#)[^"]*"', html)
    assert not re.findall(r"url\((?!#)|@import|<script|<link", html)
    assert set(re.findall(r"https?://[^\s\"<]*", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_charts_follow_the_colours_of_the_page_and_share_no_ids(html):
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 7
    assert not [found for text in drawings for found in re.findall(r"#[0-9a-f]{6}\b", text)]
    ids = [found for text in drawings for found in re.findall(r'id="([^"]*)"', text)]
    assert len(set(ids)) == len(ids)
    used = {found for text in drawings for found in re.findall(r'(?:href="|url\()#([^")]*)', text)}
    assert used <= set(ids), "each reference is to something in the page"
    defined = set(re.findall(r"--([\w-]+):", html))
    assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= defined


def test_colours_stand_out_in_light_and_in_dark(html):
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in html.split("@media (prefers", 1))
    assert light.keys() - dark.keys() == {"accent"} - dark.keys()
    for theme in (light, dark):
        for name in ("ink", "muted", *(f"series-{number}" for number in range(1, 7))):
            least = 3.0 if name.startswith("series") else 4.5  # WCAG 2: graphics, text
            assert contrast(theme[name], theme["page"]) >= least, (name, theme[name])


def contrast(a: str, b: str) -> float:
    """Returns the contrast ratio of two colours after WCAG 2."""

    def luminance(color):
        parts = np.array(matplotlib.colors.to_rgb(color))
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_chromium_opens_it_without_a_complaint_or_a_request(written, width):
    opened = chromium.open_page(written.html, width=width)
    assert opened == chromium.Opened(errors=[], requests=[], overflows=False)


@pytest.mark.slow
def test_that_check_can_fail(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<p style="width: 3000px">x</p><script>console.error("broken"); missing()</script>'
        '<img src="http://localhost:1/x.png">'
    )
    opened = chromium.open_page(page)
    errors = " ".join(opened.errors)
    assert "broken" in errors and "missing is not defined" in errors
    assert opened.requests == ["http://localhost:1/x.png"]
    assert opened.overflows


def test_what_users_wrote_stays_text(tmp_path):
    def edit(found):
        found["contestants"]["mla"]["reason"] = "<script>alert(1)</script> a|b\nc"

    sweep = reading.read(edited(tmp_path, edit))
    assert "<script" not in page.html(sweep, [])
    assert "a\\|b c" in page.markdown(sweep, []), "one line, one cell"


# Sweeps with holes


def test_one_seed_has_no_interval_and_no_winner(tmp_path):
    sweep = reading.read(sweeps.write(tmp_path, seeds=(4,)))
    drawn = charts.draw(sweep)
    text = page.html(sweep, drawn[:1])
    assert "Nothing promoted." in text and "one seed proves nothing" in text
    assert {chart.name for chart in drawn} >= {"effects", "curves", "quality-flops"}


def test_a_sweep_in_which_nobody_was_trained_still_has_a_report(tmp_path):
    def edit(found):
        found["contestants"] = {name: found["contestants"][name] for name in ("incumbent", "sparse=topk", "mla,window")}
        found["contestants"]["incumbent"] |= {"runs": [], "mean": {}, "forecast": None, "ratios": None, "rates": None}
        found |= {"environment": None, "rungs": None, "looks": [], "hashes": {"code": None}}
        found["decision"] = {"promoted": None, "best": None, "why": "everybody was refused"}

    written = report.write(edited(tmp_path, edit))
    assert written.pictures == ()
    assert "everybody was refused." in written.html.read_text("utf-8")
    assert "✗ refused; the gate refused: causality" in written.markdown.read_text("utf-8")


def test_time_is_measured_where_there_are_runs_and_else_forecast(tmp_path):
    sweep = reading.read(edited(tmp_path, lambda found: None))
    mla, topk, window = (
        next(one for one in sweep.contestants if one.name == n) for n in ("mla", "sparse=topk", "mla,window")
    )
    assert sweep.seconds_ratio(mla) == pytest.approx((70.1 * 1.21 + 1) / 71.1)
    assert sweep.seconds_ratio(topk) == 1.0 and sweep.seconds_ratio(window) is None


def test_a_sweep_whose_runs_are_gone_has_all_but_the_curves(tmp_path):
    sweep = reading.read(edited(tmp_path, lambda found: None))
    names = {chart.name for chart in charts.draw(sweep)}
    assert "effects" in names and not {"curves", "differences"} & names


def test_a_best_one_that_was_not_promoted_is_named(tmp_path):
    def edit(found):
        found["decision"] |= {"promoted": None}

    assert "Best: mla, not promoted." in page.markdown(reading.read(edited(tmp_path, edit)), [])


def test_the_name_of_a_task_stands_for_its_first_metric(tmp_path):
    def edit(found):
        found["metric"] = {"name": "mmlu", "unit": "of 1", "higher_is_better": True}

    sweep = reading.read(edited(tmp_path, edit))
    assert sweep.metric_key == "mmlu/accuracy"
    assert [one.name for one in sweep.ranking[:2]] == ["mla", "qk_norm"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no finished sweep; run the sweep's command again, and it goes on"),
        ({"status": "done", "step": 3}, "is not a sweep's; name a sweep's folder"),
        ({"contestants": {}, "format": 7}, "has format 7, this version reads 1"),
        ({"contestants": {}, "format": 1}, "lacks 'incumbent'; restore it"),
    ],
)
def test_what_is_no_finished_sweep_is_said_in_one_line(tmp_path, content, message):
    if content is not None:
        write_json_atomic(tmp_path / "result.json", content)
    with pytest.raises(UserError, match=message):
        report.write(tmp_path)


def test_a_folder_that_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="No sweep folder '.*none'; name one that foundry_jax.cli.sweep made"):
        report.write(tmp_path / "none")


# Parts


def named(name: str, index: int = 1) -> reading.Contestant:
    return reading.Contestant(name, index, "", "trained", None, {}, {}, (), None, {}, {}, (), {}, None, {})


def test_the_pareto_front_is_what_nothing_beats_at_no_more_cost():
    a, b, c, d, e = (named(name) for name in "abcde")
    points = {a: (1.0, 5.0), b: (2.0, 4.0), c: (2.0, 4.5), d: (3.0, 4.0), e: (4.0, 3.0)}
    assert charts.pareto(points, higher_is_better=False) == [a, b, e]
    assert charts.pareto(points, higher_is_better=True) == [a]
    assert charts.pareto({a: (1.0, 2.0), b: (1.0, 2.0)}, higher_is_better=False) == [a, b], "equals are both on it"


def test_differences_are_of_the_same_seed_and_step(tmp_path):
    sweep = reading.read(sweeps.write(tmp_path, ("incumbent", "mla")))
    (tmp_path / "runs/mla/seed-1/metrics.jsonl").unlink()
    old, new = (one.runs[0].curves["bits_per_byte"] for one in sweep.contestants)
    line = charts.differences(sweep).figure.axes[0].lines[1]
    expected = [
        np.mean([sweeps._curve("incumbent", seed)[i] - sweeps._curve("mla", seed)[i] for seed in (0, 2)])
        for i in range(len(old.steps))
    ]
    np.testing.assert_allclose(line.get_ydata(), expected)
    shifted = reading.Curve(new.steps + 25, new.values)
    assert charts._difference(shifted, old, -1).steps.tolist() == old.steps[1:].tolist()


def test_an_endless_interval_leaves_the_picture(tmp_path):
    sweep = reading.read(sweeps.write(tmp_path, ("incumbent", "mla")))
    ends = (-math.inf, math.inf)
    verdict = Verdict("inconclusive", 0.02, ends, 1.0, None, Estimate(0.02, ends, 1.0, 2), None, 0.05, "")
    wide = dataclasses.replace(
        sweep, contestants=[sweep.incumbent, dataclasses.replace(named("wide"), verdict=verdict)]
    )
    low, high = charts.forest(wide).figure.axes[0].get_xlim()
    assert -0.1 < low < -0.005 and 0.02 < high < 0.1
    assert page.interval(ends) == f"[{charts.MINUS}∞, +∞]"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (page.duration(59.94), "59.9 s"),
        (page.duration(3725), "1 h 2 min"),
        (page.quantity(1.31e14, "FLOP"), "131 TFLOP"),
        (page.quantity(12, "FLOP"), "12 FLOP"),
        (page.storage(3 * 2**30), "3.00 GiB"),
        (page.p_value(1e-9), "< 0.0001"),
        (page.p_value(0.25), "0.25"),
        (page.signed(-0.01), f"{charts.MINUS}0.0100"),
        (page.number(math.nan), page.NOTHING),
        (page.moment(None), "at an unknown time"),
    ],
)
def test_numbers_are_written_for_people(shown, expected):
    assert shown == expected


def test_the_command_prints_where_the_report_is(tmp_path):
    def edit(found):
        del found["contestants"]["mla"]["verdict"]

    folder = edited(tmp_path, edit)
    command = [sys.executable, "-m", "foundry_jax.cli.report", folder, "--json"]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert found["report"] == str(folder / "report.html") and found["markdown"] == str(folder / "report.md")
    assert found["decision"] == sweeps.result()["decision"]
    assert sorted(found["charts"]) == sorted(map(str, (folder / "report").iterdir()))
