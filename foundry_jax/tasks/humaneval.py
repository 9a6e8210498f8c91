"""HumanEval: the bodies of Python functions, judged by running their tests. Chen et al. 2021, 2107.03374.

    python -m foundry_jax.eval --task=humaneval --model=smollm2-135m --data=../shared/data --allow-code-execution

Prompts, stop strings and programs are those of lm-eval's `humaneval` (version 1): the prompt as it is, greedy writing
of at most 1024 tokens, and the program is prompt, completion, tests. With --samples=64 the completions are drawn at
temperature 0.2 and top_p 0.95, as in `humaneval_64`. Reported are pass@k, unbiased, and the bits a byte of the solution
that comes with a problem. What the model wrote runs in a sandbox, and only with --allow-code-execution.

Data: a file, or a folder that has humaneval.jsonl.gz; without any, openai/openai_humaneval on the hub. A record is

    {"task_id": "HumanEval/0", "prompt": "def f(x): ...", "entry_point": "f", "canonical_solution": "    return x + 1",
     "test": "def check(candidate): ..."}
"""

import functools
import hashlib
import math
import os
from collections.abc import Sequence

from foundry_jax.data.hashing import sha256_json
from foundry_jax.generate import Sampling
from foundry_jax.schema import require
from foundry_jax.tasks import data, sandbox
from foundry_jax.tasks.base import Answer, Item, Outcome, Request, Task, bits_per_byte, scored_bytes
from foundry_jax.tasks.requests import Continuation, Generation

LAYOUT = data.Layout(
    "humaneval",
    '{"task_id": "...", "prompt": "...", "entry_point": "...", "canonical_solution": "...", "test": "..."}',
    {"test": ("humaneval", "HumanEval", "humaneval/test", "test", "openai_humaneval/test")},
    {"path": "openai/openai_humaneval"},
)
UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_TOKENS = 1024
TIMEOUT = 3.0  # seconds of a program, as in human-eval
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


class HumanEval(Task):
    """See above."""

    name = "humaneval"
    description = "bodies of Python functions; their tests must pass"

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        *,
        allow_code_execution: bool = False,
        samples: int = 1,
        pass_at: Sequence[int] = (1,),
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ):
        """Reads the problems.

        Args:
            allow_code_execution: whether what the model writes may be run.
            samples: completions of a problem.
            pass_at: each k of pass@k.
            temperature, top_p: None: the likeliest token for one sample, 0.2 and 0.95 for more.

        Raises:
            UserError: no data, malformed data, options that do not fit together, or code must not be run.
        """
        require(
            allow_code_execution,
            "humaneval runs programs that a model wrote, in a sandbox: add --allow-code-execution to allow it, or "
            "leave out the task.",
        )
        self._sampling = _sampling(samples, temperature, top_p, seed)
        self._samples, self._pass_at = samples, _checked(pass_at, samples)
        self.metrics = (*(f"pass@{k}" for k in self._pass_at), "bits_per_byte")
        records = data.load(LAYOUT, path, ("test",))["test"].records
        self.dataset = "HumanEval"
        self._problems = [{name: record.text(name) for name in FIELDS} for record in records]
        _refuse_twice(records)
        drawn = {"temperature": self._sampling.temperature, "top_p": self._sampling.top_p, "seed": seed}
        self.settings = {
            "samples": samples,
            "max_tokens": MAX_TOKENS,
            "timeout": TIMEOUT,
            "data": sha256_json(self._problems),
            **(drawn if self._sampling.temperature else {"temperature": 0.0}),
        }

    def prepare(self) -> None:
        """Raises UserError where there is no sandbox."""
        super().prepare()
        sandbox.require()

    @functools.cached_property
    def _items(self) -> list[Item]:
        return [
            Item(problem["task_id"], problem["prompt"], problem["canonical_solution"], fields=problem)
            for problem in self._problems
        ]

    def items(self) -> list[Item]:
        return self._items

    def requests(self, item: Item) -> list[Request]:
        """Returns the gold solution to be scored, and the samples to be drawn, each with a seed of its own."""
        drawn = [Generation(item.prompt, UNTIL, MAX_TOKENS, self._seeded(item, i)) for i in range(self._samples)]
        return [Continuation(item.prompt, item.gold), *drawn]

    def _seeded(self, item: Item, sample: int) -> Sampling:
        if not self._sampling.temperature:
            return self._sampling
        text = f"{self._sampling.seed} {item.id} {sample}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31
        return Sampling(self._sampling.temperature, self._sampling.top_k, self._sampling.top_p, seed)

    def score(self, item: Item, answers: Sequence[Answer]) -> Outcome:
        """Returns as score_all, of one item."""
        return self.score_all([item], [answers])[0]

    def score_all(self, items: Sequence[Item], answers: Sequence[Sequence[Answer]]) -> list[Outcome]:
        """Returns pass@k and the bits a byte of the solution, after running all completions of all items."""
        programs = [program(item, text) for item, (_, *texts) in zip(items, answers, strict=True) for text in texts]
        verdicts = sandbox.run_all(programs, timeout=TIMEOUT)
        outcomes = []
        for i, (item, (gold, *texts)) in enumerate(zip(items, answers, strict=True)):
            judged = verdicts[i * self._samples : (i + 1) * self._samples]
            outcomes.append(self._outcome(item, gold.log_prob, texts, judged))
        return outcomes

    def _outcome(self, item: Item, gold: float, texts: list[str], verdicts: Sequence[sandbox.Verdict]) -> Outcome:
        passed = sum(verdict.passed for verdict in verdicts)
        metrics = {f"pass@{k}": pass_at_k(self._samples, passed, k) for k in self._pass_at}
        metrics["bits_per_byte"] = bits_per_byte(gold, scored_bytes(item.prompt, item.gold))
        judged = [{"passed": bool(verdict.passed), "reason": verdict.reason} for verdict in verdicts]
        return Outcome(texts, metrics, {"gold": gold}, {"verdicts": judged})


def _sampling(samples: int, temperature: float | None, top_p: float | None, seed: int) -> Sampling:
    """Returns how completions are drawn.

    Raises:
        UserError: a number out of range, or several samples that would all be the same.
    """
    require(samples >= 1, f"samples={samples} must be 1 or more.")
    many = samples > 1
    temperature = (0.2 if many else 0.0) if temperature is None else temperature
    top_p = (0.95 if temperature else 1.0) if top_p is None else top_p
    require(
        temperature > 0 or not many,
        f"samples={samples} at temperature 0 would all be the same: set a temperature such as 0.2, or samples=1.",
    )
    return Sampling(temperature=temperature, top_p=top_p, seed=seed)


def _checked(pass_at: Sequence[int], samples: int) -> tuple[int, ...]:
    """Returns each k of pass@k, ascending.

    Raises:
        UserError: a k that so many samples say nothing about.
    """
    require(bool(pass_at), "pass_at is empty; give numbers such as 1.")
    for k in pass_at:
        require(
            1 <= k <= samples,
            f"pass@{k} needs at least {max(k, 1)} samples of each problem, but samples={samples}: k must be 1 to "
            f"{samples}; raise samples or lower k.",
        )
    return tuple(sorted(set(pass_at)))


def _refuse_twice(records: Sequence[data.Record]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        name = record.fields["task_id"]
        record.require(name not in seen, f"has the task_id {name!r} again, after {seen.get(name, '').rstrip(',')}")
        seen[name] = record.where


def program(item: Item, completion: str) -> sandbox.Program:
    """Returns what is run."""
    return sandbox.Program(item.prompt, completion, item.fields["test"], item.fields["entry_point"])


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Returns the probability that one of k samples passes, drawn of n without putting back: unbiased (Chen et al.)."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)
