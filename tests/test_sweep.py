"""The story of a sweep, in a world where training takes no time: who wins, who is left out, and what a kill changes.

The world stands in for the two processes that a sweep starts, the probe and the runner's workers; they have tests of
their own, and test_sweep_command.py puts all of them together.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from foundry_jax import config
from foundry_jax.config import to_flat_dict
from foundry_jax.errors import Preempted, UserError
from foundry_jax.runfolder import write_json_atomic
from foundry_jax.search import ledger, runner, space, sweep, trials
from foundry_jax.search.jobs import RunState, write_failure
from foundry_jax.search.ledger import Ledger
from foundry_jax.search.request import Request, seconds_of
from foundry_jax.search.space import INCUMBENT, Contestant
from foundry_jax.search.sweep import Options
from tests.conftest import ROOT

SMOKE = str(ROOT / "configs" / "smoke.py")
NUM_BLOCKS, BYTES, TARGETS = 40, 40 * 64, 31
SEED_NOISE = 0.02  # nats per token, from seed to seed, the same for everybody
OWN_NOISE = 0.001  # of one contestant's run


class Killed(BaseException):
    """Stands for kill -9: nothing that is caught."""


@dataclasses.dataclass
class World:
    """How good contestants are, in nats per token; what was trained, and when it is to be killed.

    failing: runs that diverge, by the end of their folder. doomed: calls to survive before a kill, or None.
    """

    folder: pathlib.Path
    gains: dict[str, float]
    failing: tuple[str, ...] = ()
    leaking: tuple[str, ...] = ()
    crashing: tuple[str, ...] = ()
    crashes: int = 0
    validation_bytes: int | None = BYTES
    seconds: float = 10.0
    doomed: int | None = None
    trained: list[str] = dataclasses.field(default_factory=list)

    def tick(self) -> None:
        """Something has happened that a kill may follow."""
        if self.doomed is not None:
            self.doomed -= 1
            if self.doomed < 0:
                raise Killed

    def run_probe(self, task: pathlib.Path, log_file: pathlib.Path, patience: float) -> sweep.Trouble:
        asked = json.loads(task.read_text())
        for entry in asked["contestants"]:
            self.tick()
            found = space.settings(asked["spec"], Contestant(entry["name"], entry["argument"]), asked["overrides"])
            if entry["name"] in self.crashing:
                self.crashes += 1
                return sweep.Trouble("looking at it was ended by signal 9", was_killed=True)
            write_json_atomic(entry["path"], self.probe(entry["name"], found))
        return sweep.Trouble("looking at it ended with exit code 0", was_killed=False)

    def probe(self, name: str, settings: config.Config) -> dict:
        flat = to_flat_dict(settings)
        check = {"name": "causality", "passed": name not in self.leaking, "evidence": "token 3 sees 4", "seconds": 0.1}
        found = {"status": "ok", "reason": None, "gate": [check], "config": flat, "validation_hash": "77ab"}
        found |= {"validation_tokens": 1240, "validation_bytes": self.validation_bytes, "scores": {}}
        if name in self.leaking:
            return found | {"status": "refused", "reason": "It did not pass the gate.", "forecast": None}
        tokens = settings.num_steps * 256
        forecast = {
            "params": 1000, "active_params": 1000, "trained_params": 1000, "flops_per_token": 6000.0,
            "kv_bytes_per_token": 64, "memory_bytes": 10**6, "tokens_per_step": 256, "compile_seconds": 1.0,
            "step_seconds": self.seconds / settings.num_steps, "eval_seconds": 0.0, "run_seconds": self.seconds,
            "steps": settings.num_steps, "tokens": tokens, "flops": tokens * 6000.0,
        }  # fmt: skip
        return found | {"program": str(flat["model.norm"]), "forecast": forecast}

    def run_jobs(self, jobs, *, slots, folder, patience, tell):
        outcomes = {}
        for job in jobs:
            for run in job.runs:
                if not run.state().is_final:
                    self.tick()
                    self.train(run)
                    self.tick()
            outcomes[job.name] = runner.Outcome("done", None, job.states(), 1.0, 1)
        return outcomes

    def train(self, run) -> None:
        folder = run.folder
        folder.mkdir(parents=True, exist_ok=True)
        if any(str(run.folder).endswith(end) for end in self.failing):
            write_failure(folder, "5 steps in a row were not finite", "diverged")
            return
        values, step = run.config, run.last_step
        loss = self.loss(values["name"], values["seed"], values["optimizer.learning_rate"])
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "kind": "eval", "loss": loss}) + "\n")
        if step < values["num_steps"]:
            (folder / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / str(step) / "SEAL.json").touch()
            return
        self.trained.append(str(folder.relative_to(self.folder)))
        noise = np.random.default_rng(values["seed"]).normal(0, 0.01, NUM_BLOCKS)
        nats = TARGETS * (loss + noise - noise.mean())
        bits = float(nats.sum() / math.log(2) / BYTES)
        environment = {"versions": {}, "git_commit": None, "device": "cpu", "num_devices": 1, "num_processes": 1}
        blocks = {"nats": nats.tolist(), "targets": [TARGETS] * NUM_BLOCKS, "bytes": BYTES}
        write_json_atomic(folder / "validation_blocks.json", blocks)
        result = {
            "validation": {"loss": loss, "bits_per_byte": bits}, "validation_hash": "77ab", "step": step,
            "seconds": {"compile": 1.0, "step": 9.0}, "tokens": 256 * step, "train_flops_per_token": 6000.0,
            "sharding": "none", **environment,
        }  # fmt: skip
        write_json_atomic(folder / "result.json", result)

    def loss(self, name: str, seed: int, rate: float) -> float:
        noise = SEED_NOISE * np.random.default_rng(seed).normal()
        own = OWN_NOISE * np.random.default_rng([seed, *name.encode()]).normal()
        return 3.0 + noise + own - self.gains.get(name, 0.0) + 0.2 * abs(math.log2(rate / 6e-3))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Returns a function: World's arguments -> World, in whose place nothing real is started."""

    def make(**arguments) -> World:
        made = World(tmp_path / "sweep", **arguments)
        monkeypatch.setattr(sweep, "run_probe", made.run_probe)
        monkeypatch.setattr(runner, "run_jobs", made.run_jobs)
        return made

    return make


def asked(*words: str, **changes) -> Request:
    values = dict(
        config=SMOKE, words=words, overrides=(), stack=False, eval_tasks="", metric="bits_per_byte", seeds=3,
        max_seeds=3, first_seed=0, alpha=0.05, min_effect=0.005, match="steps", lr_bracket=0, rungs=0, budget=None,
    )  # fmt: skip
    return Request(**values | changes)


def verdicts(result: dict) -> dict[str, str | None]:
    return {name: (one["verdict"] or {}).get("verdict", one["status"]) for name, one in result["contestants"].items()}


def without_times(value):
    """Returns a result, or the facts of a ledger, without what a clock has said."""
    if isinstance(value, dict):
        clocks = ("time", "started", "finished", "seconds")
        return {key: without_times(inner) for key, inner in value.items() if key not in clocks}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def test_contestants_are_judged_against_the_incumbent_on_the_same_seeds(world, tmp_path):
    here = world(gains={"layernorm": 0.1, "layernorm_nobias": -0.1, "gelu": 0.0})
    words = ("norm=layernorm,layernorm_nobias",)
    result = sweep.run(asked(*words), here.folder, Options())
    assert verdicts(result) == {INCUMBENT: "incumbent", "layernorm": "better", "layernorm_nobias": "worse"}
    assert result["decision"]["best"] == "layernorm" and result["decision"]["promoted"] is None
    assert sorted(here.trained) == sorted(
        f"runs/{space.slug(name)}/seed-{seed}" for name in result["contestants"] for seed in range(3)
    )
    assert [run["seed"] for run in result["contestants"]["layernorm"]["runs"]] == [0, 1, 2]
    assert result["contestants"]["layernorm"]["changes"] == {"model.norm": ["rmsnorm", "layernorm"]}
    assert result["looks"] == [{"seeds": 3, "verdicts": {"layernorm": "better", "layernorm_nobias": "worse"}}]


def test_a_finished_sweep_trains_nothing_again(world):
    here = world(gains={"layernorm": 0.1})
    first = sweep.run(asked("norm", "layernorm"), here.folder, Options())
    here.trained.clear()
    again = sweep.run(asked("norm", "layernorm"), here.folder, Options(jobs=4))
    assert again == first and not here.trained


def test_a_folder_holds_one_sweep(world):
    here = world(gains={})
    sweep.run(asked("norm", "layernorm"), here.folder, Options())
    with pytest.raises(UserError, match=r"another config: alpha: was 0.05, now 0.01.*--workdir"):
        sweep.run(asked("norm", "layernorm", alpha=0.01), here.folder, Options())


def test_seeds_are_added_while_somebody_is_undecided(world):
    """A gain of twice the noise of a single run, which three seeds cannot tell."""
    here = world(gains={"layernorm": 0.002, "layernorm_nobias": 0.1})
    request = asked("norm", "layernorm", "layernorm_nobias", max_seeds=6, min_effect=0.0001)
    result = sweep.run(request, here.folder, Options())
    counts = {name: len(one["runs"]) for name, one in result["contestants"].items()}
    assert counts[INCUMBENT] == counts["layernorm"] > counts["layernorm_nobias"] == 3
    assert [look["seeds"] for look in result["looks"]] == list(range(3, counts[INCUMBENT] + 1))
    assert verdicts(result)["layernorm_nobias"] == "better"


def test_a_contestant_with_a_failed_seed_is_no_winner(world):
    here = world(gains={"layernorm": 0.5, "layernorm_nobias": 0.01}, failing=("layernorm/seed-1",))
    result = sweep.run(asked("norm", "layernorm", "layernorm_nobias"), here.folder, Options())
    assert verdicts(result)["layernorm"] == "failed"
    assert result["contestants"]["layernorm"]["reason"] == "seed 1: 5 steps in a row were not finite"
    assert result["decision"]["best"] == "layernorm_nobias"


def test_nobody_better_says_what_became_of_everybody(world):
    here = world(gains={"layernorm": 0.5, "layernorm_nobias": -0.1}, failing=("layernorm/seed-1",))
    result = sweep.run(asked("norm", "layernorm", "layernorm_nobias"), here.folder, Options())
    assert result["decision"]["best"] is None
    why = "Nobody is better than the incumbent: layernorm_nobias is worse, layernorm failed (seed 1: 5 steps in a row"
    assert result["decision"]["why"].startswith(why)


def test_without_a_contestant_that_ends_well_nothing_is_decided(world):
    here = world(gains={}, failing=("layernorm/seed-0", "layernorm/seed-1", "layernorm/seed-2"))
    for _ in range(2):  # the same line again
        with pytest.raises(
            UserError, match=r"No contestant was trained to the end: layernorm failed \(seed 0.*promoted"
        ):
            sweep.run(asked("norm", "layernorm"), here.folder, Options(promote=True))
    assert not (here.folder / "result.json").exists() and (here.folder / "runs").exists()


def test_without_the_incumbent_nothing_is_compared(world):
    here = world(gains={"layernorm": 1.0}, failing=("incumbent/seed-2",))
    with pytest.raises(UserError, match=r"The incumbent was not trained to the end.*seed 2: 5 steps"):
        sweep.run(asked("norm", "layernorm"), here.folder, Options())


def test_a_leak_is_refused_and_the_others_go_on(world):
    here = world(gains={"layernorm": 5.0, "layernorm_nobias": 0.1}, leaking=("layernorm",))
    result = sweep.run(asked("norm", "layernorm", "layernorm_nobias"), here.folder, Options())
    assert verdicts(result) == {INCUMBENT: "incumbent", "layernorm": "refused", "layernorm_nobias": "better"}
    assert not any("runs/layernorm/" in run for run in here.trained)
    assert result["decision"]["best"] == "layernorm_nobias"


def test_what_ails_the_incumbent_can_be_mended(world):
    here = world(gains={"layernorm": 0.1}, leaking=(INCUMBENT,))
    with pytest.raises(UserError, match=r"The incumbent cannot be trained: It did not pass the gate"):
        sweep.run(asked("norm", "layernorm"), here.folder, Options())
    here.leaking = ()
    assert sweep.run(asked("norm", "layernorm"), here.folder, Options())["decision"]["best"] == "layernorm"


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("mmlu", r"--metric=mmlu needs --eval-task=mmlu"),
        ("bits_per_byte", r"There is no bits_per_byte.*use --metric=loss"),
    ],
)
def test_a_metric_that_nobody_will_have_is_refused_before_training(world, metric, message):
    here = world(gains={}, validation_bytes=None)
    with pytest.raises(UserError, match=message):
        sweep.run(asked("norm", "layernorm", metric=metric), here.folder, Options())
    assert not here.trained


def test_if_all_leak_nothing_is_trained(world):
    here = world(gains={}, leaking=("layernorm",))
    with pytest.raises(UserError, match=r"No contestant can be trained. layernorm: It did not pass the gate"):
        sweep.run(asked("norm", "layernorm"), here.folder, Options())
    assert not here.trained


def test_a_contestant_that_brings_the_probe_down_is_tried_again_and_then_left_out(world):
    here = world(gains={"layernorm_nobias": 0.1}, crashing=("layernorm",))
    result = sweep.run(asked("norm", "layernorm", "layernorm_nobias"), here.folder, Options())
    assert verdicts(result) == {INCUMBENT: "incumbent", "layernorm": "refused", "layernorm_nobias": "better"}
    assert result["contestants"]["layernorm"]["reason"] == "looking at it was ended by signal 9"
    assert here.crashes == 1 + sweep.PROBE_RETRIES


def test_a_dry_run_trains_nothing(world):
    here = world(gains={})
    result = sweep.run(asked("norm", "layernorm"), here.folder, Options(dry_run=True))
    assert result["decision"] is None and not here.trained
    assert result["contestants"]["layernorm"]["forecast"]["run_seconds"] == 10.0
    assert result["contestants"]["layernorm"]["ratios"] == dict.fromkeys(
        ("steps", "tokens", "flops", "params", "seconds"), 1.0
    )


def test_a_bracket_tunes_everybody_on_another_seed(world):
    here = world(gains={"layernorm": 0.1})
    result = sweep.run(asked("norm", "layernorm", lr_bracket=3), here.folder, Options())
    for name in (INCUMBENT, "layernorm"):
        assert result["contestants"][name]["learning_rate"] == pytest.approx(6e-3)
        assert result["contestants"][name]["rates"].keys() == {"0.0015", "0.003", "0.006"}
    tuned = [run for run in here.trained if run.startswith("rates/")]
    assert len(tuned) == 6 and len(here.trained) == 12
    assert result["contestants"]["layernorm"]["changes"] == {"model.norm": ["rmsnorm", "layernorm"]}


def test_rungs_keep_the_better_half_and_check_what_they_left(world):
    here = world(gains={"gelu": 0.3, "relu2": 0.2, "geglu": 0.1, "glu": 0.0})
    request = asked("activation", "gelu", "relu2", "geglu", "glu", rungs=2)
    result = sweep.run(request, here.folder, Options())
    rungs = result["rungs"]
    assert rungs["steps"] == [10, 20] and rungs["pruned"] == {"geglu": 10, "glu": 10, "relu2": 20}
    assert rungs["checked"] == 1 and rungs["wrong"] == 0 and len(rungs["audited"]) == 1
    assert verdicts(result)["gelu"] == "better" and verdicts(result)["glu"] == "pruned"
    ended = {run.split("/")[1] for run in here.trained}
    assert ended == {INCUMBENT, "gelu", *rungs["audited"]}


def test_a_budget_chooses_the_steps_that_fit(world, monkeypatch):
    here = world(gains={"layernorm": 0.1}, seconds=100.0)
    result = sweep.run(asked("norm", "layernorm", budget=300.0), here.folder, Options())
    assert result["budget"]["seeds"] == 3 and result["budget"]["share"] == pytest.approx(0.5, abs=0.01)
    assert result["contestants"][INCUMBENT]["runs"][0]["step"] == 20
    assert result["contestants"]["layernorm"]["forecast"]["run_seconds"] == pytest.approx(50.0)


def test_a_budget_that_is_too_small_says_what_is_needed(world):
    here = world(gains={}, seconds=1000.0)
    with pytest.raises(UserError, match=r"--budget=60s is too little: 2 seeds of a tenth .* take 400s here"):
        sweep.run(asked("norm", "layernorm", budget=60.0), here.folder, Options())


def test_who_cannot_be_promoted_is_not_trained_for_it(world):
    here = world(gains={})
    request = asked("lr", "6e-3", config=f"{SMOKE}:lr=1e-3")
    with pytest.raises(UserError, match=r"lr=6e-3 cannot be promoted: optimizer.learning_rate.*config of its own"):
        sweep.run(request, here.folder, Options(promote=True))
    assert not here.trained


def test_another_code_is_not_mixed_in(world, monkeypatch):
    here = world(gains={}, doomed=3)
    with pytest.raises(Killed):
        sweep.run(asked("norm", "layernorm"), here.folder, Options())
    here.doomed = None
    monkeypatch.setattr(sweep, "code_hash", lambda: "another")
    with pytest.raises(UserError, match=r"code of foundry_jax has changed.*--workdir"):
        sweep.run(asked("norm", "layernorm"), here.folder, Options())


def test_whatever_kills_a_sweep_it_comes_to_the_same(world, tmp_path, monkeypatch):
    """A kill before and after each fact is written, and before and after each run: one sweep that is killed at each."""
    request = asked("activation", "gelu", "relu2", "geglu", rungs=1, lr_bracket=2, max_seeds=4, min_effect=0.0001)
    gains = {"gelu": 0.0045, "relu2": 0.004, "geglu": -0.1}
    calm = world(gains=gains)
    expected = sweep.run(request, calm.folder, Options())
    expected_facts = Ledger(calm.folder)._facts
    here = world(gains=gains)
    here.folder = tmp_path / "killed"
    write = Ledger._write

    def killed_write(self, key, value):
        here.tick()
        write(self, key, value)
        here.tick()

    monkeypatch.setattr(Ledger, "_write", killed_write)
    kills = 0
    while True:
        here.doomed = 2  # it survives two events more than nothing, so that it gets on
        try:
            result = sweep.run(request, here.folder, Options())
            break
        except Killed:
            kills += 1
    assert kills > 30
    assert without_times(result | {"name": ""}) == without_times(expected | {"name": ""})
    facts = Ledger(here.folder)._facts
    assert without_times(facts) == without_times(expected_facts)
    assert len(here.trained) == len(set(here.trained)) == len(calm.trained)


def test_a_torn_line_is_settled_again(tmp_path):
    facts = Ledger(tmp_path)
    facts.settle("a", lambda: {"x": math.inf})
    with open(tmp_path / ledger.NAME, "ab") as file:
        file.write(b'{"key": "b", "val')
    again = Ledger(tmp_path)
    assert again.get("a") == {"x": math.inf} and "b" not in again
    assert again.settle("b", lambda: 2) == 2
    assert Ledger(tmp_path).under("a") == {} and Ledger(tmp_path).get("b") == 2


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    (tmp_path / ledger.NAME).write_text('{"key": "a"\n{"key": "b", "value": 1}\n')
    with pytest.raises(UserError, match=r"ledger.jsonl, line 1, is damaged: delete"):
        Ledger(tmp_path)


def test_a_fact_is_made_once(tmp_path):
    facts = Ledger(tmp_path)
    facts.settle("a", lambda: 1)
    assert facts.settle("a", lambda: pytest.fail("it is settled")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds=0 must be"),
        ({"seeds": 3, "max_seeds": 2}, "max_seeds=2 must be at least seeds=3"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"match": "money"}, "Unknown --match 'money'.*steps, tokens"),
        ({"lr_bracket": 1}, "lr_bracket=1 must be 0 or from 2"),
        ({"min_effect": -1.0}, "min_effect=-1"),
    ],
)
def test_requests_without_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        asked("norm", "layernorm", **changes)


def test_times_are_read():
    assert [seconds_of(text) for text in ("90s", "30m", "1.5h", "2d")] == [90, 1800, 5400, 172800]
    for text in ("30", "m", "-1h", "0s"):
        with pytest.raises(UserError, match=r"must be a time such as 90s, 30m"):
            seconds_of(text)


def test_a_stop_is_passed_on(world, monkeypatch):
    here = world(gains={})

    def stopped(*_, **__):
        raise Preempted("1 jobs are stopped")

    monkeypatch.setattr(runner, "run_jobs", stopped)
    with pytest.raises(Preempted):
        sweep.run(asked("norm", "layernorm"), here.folder, Options())


def test_an_unfinished_run_has_a_reason(world, monkeypatch):
    here = world(gains={})

    def crash(jobs, **_):
        gone = RunState("unfinished", "killed by signal 9")
        return {job.name: runner.Outcome("failed", "x", {run.folder: gone for run in job.runs}, 1.0, 4) for job in jobs}

    monkeypatch.setattr(runner, "run_jobs", crash)
    with pytest.raises(UserError, match=r"incumbent was not trained to the end.*killed by signal 9"):
        sweep.run(asked("norm", "layernorm"), here.folder, Options())


def test_a_run_whose_task_failed_has_failed(tmp_path):
    """Otherwise a contestant would be judged on the seeds whose tasks happened to work."""
    run = trials.Trial("runs/mla/seed-0", tmp_path, config.load(SMOKE), "p")
    tasks = {"mmlu": {"error": "no data."}, "gsm8k": {"metrics": {"accuracy": {"value": 0.5}}}}
    write_json_atomic(tmp_path / "result.json", {"validation": {"loss": 3.0}, "tasks": tasks})
    fact = trials.outcome_of(run, RunState("done"))
    assert (fact["status"], fact["reason"]) == ("failed", "mmlu: no data.")
