"""The story of one sweep: look at everybody, train on paired seeds, judge, choose.

    SWEEP/config.json     what was asked (request.py)
    SWEEP/ledger.jsonl    what is settled (ledger.py)
    SWEEP/probes/         what was found out about each contestant before training (probe.py)
    SWEEP/runs/mla/seed-0 ordinary run folders; SWEEP/rates/mla/lr-0.003 those that tuned its learning rate
    SWEEP/jobs/           what ran together, and what it printed (runner.py)
    SWEEP/result.json     everything, once it is decided

Whatever kills it, the same command goes on with what is settled, and comes to the same decision. Starts no JAX: the
devices belong to the processes that it starts.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from foundry_jax.config import to_flat_dict
from foundry_jax.errors import EXIT_PREEMPTED, Preempted, UserError
from foundry_jax.registry import unknown
from foundry_jax.runfolder import RunFolder, read_metrics, read_result, write_json_atomic
from foundry_jax.schema import require
from foundry_jax.search import lineage, matching, measuring, outcome, runner, space, verdict
from foundry_jax.search.decision import choose
from foundry_jax.search.facts import Facts
from foundry_jax.search.ledger import Ledger
from foundry_jax.search.request import Request
from foundry_jax.search.space import INCUMBENT, Contestant
from foundry_jax.search.trials import Trial, jobs_of, outcome_of, step_at, with_rate

log = logging.getLogger(__name__)

TUNING_SEED = 1_000_000  # after first_seed: rates are chosen on other noise than what the verdict is about
LEAST_SHARE = 0.1  # of the steps that --budget may leave
PROBE_RETRIES = 3  # of one that is killed by a signal
LINE_SECONDS = 20.0  # between lines that say how far it is


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep is carried out, which does not change its outcome.

    jobs: how many processes train at the same time.
    patience: seconds without a sign of life after which a process is killed and started again.
    """

    jobs: int = 1
    patience: float = 900.0
    promote: bool = False
    dry_run: bool = False


def run(request: Request, folder: pathlib.Path, options: Options) -> dict[str, Any]:
    """Returns the result of a sweep, which is carried out, or goes on where the folder says it stopped.

    With options.dry_run it ends before anything is trained, and the result has no decision.

    Raises:
        UserError: what is asked for makes no sense, another sweep is in the folder, or nobody can be trained.
        Preempted: it was asked to stop; the same command goes on.
    """
    with RunFolder(folder) as held:
        held.write_config(request.to_json())
        if (result := read_result(held.path)) is None:
            result = Sweep(request, held.path, options).run()
            if options.dry_run:
                return result
            held.write_result(result)
        if options.promote and not result["decision"].get("asked"):
            result = promote(request, result, held.path)
            held.write_result(result)
        return result


def promote(request: Request, result: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Returns the result after its best contestant was promoted, or after it was noted that there is none.

    Raises:
        UserError: the incumbent is no longer the one that the contestants were compared with.
    """
    best, path = result["decision"]["best"], result["config"]
    is_head = lineage.head(path) == result["hashes"]["lineage"]  # if not, it is ours already, or refused below
    require(
        best is None or not is_head or incumbent_hash(request) == result["hashes"]["incumbent"],
        f"{path} gives another config than when this sweep began (it was edited, or one that it builds on was), so "
        f"{best} was not compared with it. Nothing is promoted; run the sweep again, in another --workdir.",
    )
    if best is None:
        lineage.record_kept(result, config_path=path, sweep=folder)
    else:
        lineage.promote(result, best, config_path=path, expected_head=result["hashes"]["lineage"], sweep=folder)
    return result | {"decision": result["decision"] | {"promoted": best, "asked": True}}


class Sweep:
    """One sweep in its folder, whose lock the caller holds."""

    def __init__(self, request: Request, path: pathlib.Path, options: Options):
        self.request, self.path, self.options = request, path, options
        self.ledger, self.last_line = Ledger(path), time.monotonic()
        self.metric = measuring.metric_of(request.metric)
        tasks = [f"eval.tasks={request.eval_tasks}"] if request.eval_tasks else []
        self.overrides = [*request.overrides, *tasks]

    def run(self) -> dict[str, Any]:
        """Returns the sweep's result."""
        self.begin()
        self.look()
        if self.options.dry_run:
            return outcome.result_of(self.facts, {}, None)
        self.choose_rates()
        self.plan()
        names = self.halve([name for name in self.facts.planned() if name != INCUMBENT])
        verdicts = self.compare(names)
        self.audit()
        return outcome.result_of(self.facts, verdicts, self.decide(verdicts))

    def begin(self) -> None:
        """Settles who takes part.

        Raises:
            UserError: nobody can, or with --promote one that cannot be promoted; or the code is not the one that the
                sweep was begun with.
        """
        found = self.ledger.settle("begin", self.first_facts)
        require(
            found["code"] == code_hash(),
            f"The code of foundry_jax has changed since the sweep in {self.path} began, so that its runs would not be "
            f"comparable: put it back, or use another --workdir.",
        )
        everybody = {one["name"]: Contestant(**one) for one in found["contestants"]}
        for one in everybody.values() if self.options.promote else ():
            lineage.require_promotable(self.request.config, one.name, one.argument)
        self.facts = Facts(self.request, self.path, self.ledger, everybody)

    def first_facts(self) -> dict[str, Any]:
        """Returns when the sweep began, with which code and which incumbent, and who takes part."""
        asked = self.request
        found = space.contestants(asked.config, asked.words, stack=asked.stack, overrides=self.overrides)
        return {
            "time": time.time(),
            "code": code_hash(),
            "lineage": lineage.head(asked.config),
            "incumbent": incumbent_hash(asked),
            "contestants": [dataclasses.asdict(one) for one in found],
        }

    # Before training

    def look(self) -> None:
        """Settles what each contestant is and costs, and whether it passes the gate.

        Raises:
            UserError: the incumbent cannot be trained, or nobody else can; or nobody will have the metric.
        """
        if self.request.match == "params":  # they are matched before they are looked at
            self.probe([INCUMBENT], None)
            self.probe(list(self.facts.everybody), self.facts.probe(INCUMBENT)["forecast"]["params"])
        else:
            self.probe(list(self.facts.everybody), None)
        self.require_metric()
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.facts.refusals().items())
        require(len(self.facts.able()) > 1 or self.options.dry_run, f"No contestant can be trained. {reasons}")

    def probe(self, names: Sequence[str], params: int | None) -> None:
        """Has a process look at contestants; one that brings it down again and again has failed, the others go on.

        Raises:
            UserError: the incumbent cannot be trained.
        """
        folder = self.path / "probes"
        folder.mkdir(exist_ok=True)
        names = [name for name in names if not self.facts.everybody[name].refusal]
        names = [name for name in names if f"probe/{name}" not in self.ledger]
        paths = {name: folder / f"{space.slug(name)}.json" for name in names}
        kills = dict.fromkeys(names, 0)
        while missing := [name for name in names if not paths[name].exists()]:
            log.info("Looking at %s.", ", ".join(missing))
            entries = [
                {"name": n, "argument": self.facts.everybody[n].argument, "path": str(paths[n])} for n in missing
            ]
            task = {"spec": self.request.config, "overrides": self.overrides, "params": params, "contestants": entries}
            write_json_atomic(folder / "task.json", task)
            trouble = run_probe(folder / "task.json", folder / "log.txt", self.options.patience)
            left = next((name for name in missing if not paths[name].exists()), None)
            if left is not None and trouble.was_killed and kills[left] < PROBE_RETRIES:
                kills[left] += 1  # perhaps it was not to blame
            elif left is not None:
                failed = {"status": "failed", "reason": trouble.text, "gate": [], "forecast": None}
                write_json_atomic(paths[left], failed)
        found = {name: json.loads(paths[name].read_text(encoding="utf-8")) for name in names}
        if (incumbent := found.get(INCUMBENT)) and incumbent["status"] != "ok":
            for path in paths.values():
                path.unlink()  # nothing is settled, so that it can be mended
            raise UserError(f"The incumbent cannot be trained: {incumbent['reason']}")
        for name in names:
            self.ledger.settle(f"probe/{name}", functools.partial(self.probed, name, found[name]))

    def probed(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        """Returns what a probe found out; who cannot be compared with the incumbent, or is it, is refused."""
        incumbent = self.facts.probe(INCUMBENT)
        if name == INCUMBENT or found["status"] != "ok":
            return found
        if found["config"] == incumbent["config"]:
            reason = f"--match={self.request.match} turns it into the incumbent; use another, such as flops."
            return found | {"status": "refused", "reason": reason}
        if found["validation_hash"] != incumbent["validation_hash"]:
            return found | {"status": "refused", "reason": "it would be validated on another text than the incumbent"}
        in_tokens = self.metric.name in ("loss", "ema_loss")
        if in_tokens and found["validation_tokens"] != incumbent["validation_tokens"]:
            reason = f"it cuts the text into other tokens, so {self.metric.name} would not be comparable"
            return found | {"status": "refused", "reason": f"{reason}; use --metric=bits_per_byte"}
        return found

    def require_metric(self) -> None:
        """Raises UserError if the runs will not have the metric that decides: better now than after the training."""
        incumbent, metric = self.facts.probe(INCUMBENT), self.metric
        if not metric.task:
            need_bytes = metric.name.endswith("bits_per_byte") and incumbent["validation_bytes"] is None
            require(
                not need_bytes,
                f"There is no {metric.name}, because the size in bytes of the validation text is not known: use "
                f"--metric={metric.name.replace('bits_per_byte', 'loss')}, or give data.tokenizer.",
            )
            return
        scores = incumbent["scores"].get(metric.task)
        require(scores is not None, f"--metric={metric.name} needs --eval-task={metric.task}, or eval.tasks with it.")
        if metric.score and metric.score.partition("/")[0] not in scores:
            raise UserError(unknown(metric.score, scores, f"score of {metric.task}"))

    def choose_rates(self) -> None:
        """Settles the learning rate of each contestant, the incumbent's too: the best of a bracket on another seed.

        Raises:
            UserError: no rate of the incumbent's was trained to the end.
            Preempted: it was asked to stop.
        """
        if not self.request.lr_bracket:
            return
        able = self.facts.able()
        brackets = {name: self.bracket(name) for name in able if f"rate/{name}" not in self.ledger}
        self.train([trial for trials in brackets.values() for trial in trials.values()])
        for name, trials in brackets.items():
            self.ledger.settle(f"rate/{name}", functools.partial(self.best_rate, trials))
            found = self.ledger.get(f"rate/{name}")
            edge = ", the edge of its bracket" if found["edge"] else ""
            log.info("%s: learning rate %s%s.", name, found["rate"], edge)
        require(
            self.ledger.get(f"rate/{INCUMBENT}")["rate"] is not None,
            "No learning rate of the bracket works for the incumbent; set another --config.optimizer.learning_rate.",
        )

    def bracket(self, name: str) -> dict[float, Trial]:
        """Returns {learning rate: the run that tries it}, each twice the one before it."""
        config, count = self.facts.config_of(name), self.request.lr_bracket
        seed, found = self.request.first_seed + TUNING_SEED, {}
        for i in range(count):
            rate = float(f"{config.optimizer.learning_rate * 2.0 ** (i - (count - 1) // 2):.3g}")
            key = f"rates/{space.slug(name)}/lr-{rate:g}"
            tried = dataclasses.replace(with_rate(config, rate), seed=seed, name=name)
            found[rate] = Trial(key, self.path / key, tried, self.facts.probe(name)["program"])
        return found

    def best_rate(self, trials: Mapping[float, Trial]) -> dict[str, Any]:
        """Returns the rate with the lowest validation loss, and what all came to (None: it failed)."""
        facts = {rate: self.ledger.get(f"trial/{trial.key}") for rate, trial in trials.items()}
        losses = {rate: fact["metrics"]["loss"] for rate, fact in facts.items() if fact["status"] == "done"}
        best = min(losses, key=losses.get) if losses else None
        rates = {f"{rate:g}": losses.get(rate) for rate in facts}
        return {"rate": best, "rates": rates, "edge": best in (min(facts), max(facts))}

    def plan(self) -> None:
        """Settles the config that each contestant is trained with, and how many seeds: rates, matching, the budget."""
        for name in self.facts.able():
            self.ledger.settle(f"plan/{name}", functools.partial(self.planned, name))
        self.ledger.settle("budget", self.fit_budget)

    def planned(self, name: str) -> dict[str, Any] | None:
        """Returns the flat config of a contestant with its rate, matched; None if no rate works for it."""
        config = self.facts.config_of(name)
        if self.request.lr_bracket:
            rate = self.ledger.get(f"rate/{name}")["rate"]
            if rate is None:
                return None
            config = with_rate(config, rate)
        if name != INCUMBENT and self.request.match not in ("steps", "params"):
            incumbent, own = (matching.Cost.of(self.facts.probe(who)["forecast"]) for who in (INCUMBENT, name))
            config = matching.match(incumbent, own, config, self.request.match)
        return to_flat_dict(config)

    def fit_budget(self) -> dict[str, Any]:
        """Returns the number of seeds and the share of the steps that fit into the budget.

        Raises:
            UserError: not even two seeds of a tenth of the steps do.
        """
        asked = self.request
        if asked.budget is None:
            return {"seeds": asked.seeds, "max_seeds": asked.max_seeds, "share": 1.0, "seconds": None}
        left = asked.budget - (time.time() - self.ledger.get("begin")["time"])
        per_seed = sum(self.seconds_of(name) for name in self.facts.planned(whole=True)) / self.options.jobs
        fewest = min(asked.seeds, 2)
        for seeds in range(asked.seeds, fewest - 1, -1):
            share = min(1.0, left / (seeds * per_seed))
            if share >= LEAST_SHARE:
                most = max(seeds, min(asked.max_seeds, int(left / (per_seed * share))))
                return {"seeds": seeds, "max_seeds": most, "share": share, "seconds": seeds * per_seed * share}
        need = asked.budget - left + LEAST_SHARE * per_seed * fewest
        raise UserError(
            f"--budget={asked.budget:.0f}s is too little: {fewest} seeds of a tenth of the steps of everybody take "
            f"{need:.0f}s here; give more, or name fewer contestants."
        )

    def seconds_of(self, name: str) -> float:
        """Returns the forecast seconds of a run with the steps that a contestant has after matching."""
        forecast, steps = self.facts.probe(name)["forecast"], self.ledger.get(f"plan/{name}")["num_steps"]
        return forecast["run_seconds"] * steps / forecast["steps"]

    # Training

    def train(self, trials: Sequence[Trial], share: float = 1.0) -> None:
        """Trains to the end, or to a share of the steps, and settles what the finished ones came to.

        Raises:
            Preempted: it was asked to stop.
        """
        waiting = [trial for trial in trials if f"trial/{trial.key}" not in self.ledger]
        jobs = jobs_of(waiting, share, self.options.jobs)
        outcomes = runner.run_jobs(
            jobs, slots=self.options.jobs, folder=self.path / "jobs", patience=self.options.patience, tell=self.tell
        )
        states = {folder: state for found in outcomes.values() for folder, state in found.runs.items()}
        for trial in waiting:
            state = states[trial.folder]
            if state.status != "paused":
                self.ledger.settle(f"trial/{trial.key}", functools.partial(outcome_of, trial, state))

    def tell(self, event: Mapping[str, Any]) -> None:
        """Shows what the runner does: each run that ends, what went wrong, and now and then how far it is."""
        kind = event["event"]
        if kind == "run" and event["status"] != "paused":
            result = read_result(event["run"]) or {}
            loss = f", validation loss {result['validation']['loss']:.4f}" if result else ""
            reason = f": {event['reason']}" if event["reason"] else ""
            log.info("%s %s%s%s", self.shown(event["run"]), event["status"], loss, reason)
        elif kind in ("retry", "left out"):
            log.warning("%s: %s; %s", event["job"], event["reason"], "left out" if kind == "left out" else "once more")
        elif kind == "step" and time.monotonic() - self.last_line > LINE_SECONDS:
            under_way = {run: step for run, step in event["steps"].items() if step and not runner.is_settled(run)}
            if under_way:
                self.last_line = time.monotonic()
                log.info("%s", ", ".join(f"{self.shown(run)} step {step}" for run, step in under_way.items()))

    def shown(self, folder: pathlib.Path) -> str:
        """Returns the path of a run as it is called within the sweep."""
        return str(folder.relative_to(self.path))

    def halve(self, names: list[str]) -> list[str]:
        """Returns who is left of the contestants after the rungs: at each the better half, on paired differences.

        Raises:
            Preempted: it was asked to stop.
        """
        for rung in range(self.request.rungs if len(names) > 1 else 0):
            share = 0.5 ** (self.request.rungs - rung)
            if f"rung/{rung}" not in self.ledger and len(names) > 1:
                self.train(
                    [self.facts.trial(n, seed) for seed in self.facts.seeds() for n in (INCUMBENT, *names)], share
                )
                self.ledger.settle(f"rung/{rung}", functools.partial(self.rung, names, share))
            if found := self.ledger.get(f"rung/{rung}"):
                names = found["kept"]
        return names

    def rung(self, names: Sequence[str], share: float) -> dict[str, Any]:
        """Returns who goes on after a share of the steps, and who does not, with their mean differences."""
        gains = {name: self.gain(name, share) for name in names}
        order = sorted(names, key=lambda name: -gains[name])
        count = math.ceil(len(order) / 2)
        steps = step_at(self.facts.planned()[INCUMBENT], share)
        log.info("Step %d: on with %s; left behind: %s.", steps, ", ".join(order[:count]), ", ".join(order[count:]))
        return {"steps": steps, "kept": order[:count], "pruned": order[count:], "gains": gains}

    def gain(self, name: str, share: float) -> float:
        """Returns by how many nats per token a contestant is better on average at a rung; -inf if a seed failed."""
        seeds = self.facts.seeds()
        gains = [self.loss_at(INCUMBENT, seed, share) - self.loss_at(name, seed, share) for seed in seeds]
        return math.fsum(gains) / len(gains) if all(map(math.isfinite, gains)) else -math.inf

    def loss_at(self, name: str, seed: int, share: float) -> float:
        """Returns the validation loss of a run at a rung, in nats per token; inf if it did not get there."""
        trial = self.facts.trial(name, seed)
        path, step = trial.folder / "metrics.jsonl", step_at(trial.config, share)
        rows = read_metrics(path, "eval") if path.exists() else []
        return next((row["loss"] for row in rows if row["step"] == step), math.inf)

    def audit(self) -> None:
        """Trains some of the pruned contestants to the end, to say how often pruning was wrong.

        Raises:
            Preempted: it was asked to stop.
        """
        self.train([self.facts.trial(name, seed) for name in self.facts.audited() for seed in self.facts.seeds()])

    # Judging

    def compare(self, names: Sequence[str]) -> dict[str, verdict.Verdict]:
        """Returns the verdicts: after the first seeds, and after each further one while some are undecided.

        Raises:
            UserError: a seed of the incumbent was not trained to the end.
            Preempted: it was asked to stop.
        """
        first, most = (self.ledger.get("budget")[key] for key in ("seeds", "max_seeds"))
        verdicts: dict[str, verdict.Verdict] = {}
        undecided = list(names)
        for count in range(first, most + 1):
            seeds = range(self.request.first_seed, self.request.first_seed + count)
            new = seeds if count == first else seeds[-1:]
            self.train([self.facts.trial(name, seed) for seed in new for name in (INCUMBENT, *undecided)])
            look = verdict.Look(count, first, most)
            found = self.ledger.settle(f"look/{count}", functools.partial(self.judge, names, verdicts, look))
            verdicts = {name: verdict.Verdict.from_json(one) for name, one in found.items()}
            undecided = [name for name, one in verdicts.items() if not one.is_decided]
            if not undecided:
                break
        return verdicts

    def judge(
        self, names: Sequence[str], earlier: Mapping[str, verdict.Verdict], look: verdict.Look
    ) -> dict[str, dict[str, Any]]:
        """Returns the verdicts of one look on all contestants whose runs ended well, as JSON."""
        trouble = self.facts.trouble(INCUMBENT)
        require(not trouble, f"The incumbent was not trained to the end, so nothing can be compared with it: {trouble}")
        sound = [name for name in names if not self.facts.trouble(name)]
        folders = {name: self.facts.folders(name) for name in (INCUMBENT, *sound)}
        evidence = {name: measuring.evidence(folders[INCUMBENT], folders[name], self.metric) for name in sound}
        asked, family = self.request, len(self.facts.planned()) - 1
        now = verdict.judge(evidence, alpha=asked.alpha, min_effect=asked.min_effect, look=look, family=family)
        found = verdict.settle(earlier, now)
        for name, one in found.items():
            log.info("%s after %d seeds: %s. %s", name, one.over_seeds.n, one.verdict, one.why)
        return {name: one.to_json() for name, one in found.items()}

    def decide(self, verdicts: Mapping[str, verdict.Verdict]) -> dict[str, Any]:
        """Returns the decision, as JSON.

        Raises:
            UserError: no contestant was trained to the end.
        """
        facts = self.facts
        troubles = {name: f"was refused ({reason})" for name, reason in facts.refusals().items()}
        troubles |= {name: f"failed ({why})" for name in facts.able() if (why := facts.trouble(name))}
        troubles |= {name: f"was left behind at step {step}" for name, step in facts.pruned().items()}
        sound = {name: one for name, one in verdicts.items() if not facts.trouble(name)}
        require(
            bool(sound),
            f"No contestant was trained to the end: {'; '.join(f'{n} {why}' for n, why in troubles.items())}. "
            f"Nothing is promoted; everything stays in {self.path}.",
        )
        found = choose(sound, troubles, self.metric.unit)
        return {"promoted": None, "asked": False, "best": found.best, "why": found.why}


@dataclasses.dataclass(frozen=True)
class Trouble:
    """How a probe ended, in case that it left something out."""

    text: str
    was_killed: bool


def run_probe(task: pathlib.Path, log_file: pathlib.Path, patience: float) -> Trouble:
    """Runs the probe.

    Raises:
        Preempted: it was asked to stop.
    """
    command = [sys.executable, "-m", "foundry_jax.search.probe", str(task)]
    with open(log_file, "ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=functools.partial(runner.die_with_parent, os.getpid()),
        )
        try:
            code = process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            text = f"looking at it took more than {patience:.0f} seconds; see {log_file}, or raise --patience"
            return Trouble(text, was_killed=False)
        finally:
            process.kill()
            process.wait()
    if code == EXIT_PREEMPTED:
        raise Preempted("the sweep was asked to stop while it looked at its contestants; run it again to go on.")
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    text = f"looking at it {how}: {lines[-1] if lines else 'no output'}; see {log_file}"
    return Trouble(text, was_killed=code < 0)


def incumbent_hash(request: Request) -> str:
    """Returns the sha256 of the incumbent's config as its file gives it now."""
    flat = to_flat_dict(space.settings(request.config, Contestant(INCUMBENT, ""), request.overrides))
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_hash() -> str:
    """Returns the sha256 of the package's source files: their names and contents."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
