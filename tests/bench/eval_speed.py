"""Evaluation against lm-eval: the same requests to the same model through transformers, agreement, bits and speed.

    python tests/bench/eval_speed.py [--data ../shared/data] [--questions 200] [--pairs 50] [--answers 24]

SmolLM2-135M in float32: log-likelihoods of MMLU questions with five examples and of preference pairs, answers to GSM8K
with five examples in batches of 8. Each side runs in a process of its own, one after the other, and has answered a few
requests before it is timed; what our programs take to compile is told apart. Needs the extras oracle and lm-eval, and
accelerate. Exits 1 if a log-likelihood differs by more than 1e-3 nats, an argmax or an answer at all, if a bit depends
on the batch size or the order, if more than 6 programs are compiled, or if MMLU is less than 2 times as fast as lm-eval
and GSM8K less than 1.2 times.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

NATS, MMLU_GOAL, GSM8K_GOAL, PROGRAMS_GOAL = 1e-3, 2.0, 1.2, 6
BATCH_SIZE = 8
WARM = 8  # requests


def requests_of(flags: argparse.Namespace) -> dict[str, list]:
    """Returns what is asked: (context, continuation) pairs, and (context, until, most tokens) of texts to continue."""
    from foundry_jax.tasks.constitution import Constitution
    from foundry_jax.tasks.gsm8k import GSM8K
    from foundry_jax.tasks.mmlu import MMLU
    from foundry_jax.tasks.requests import Generation

    data = pathlib.Path(flags.data)
    mmlu, gsm8k, pairs = MMLU(data, shots=5), GSM8K(data, shots=5), Constitution(data / "preferences/harmless.jsonl")
    answers = [request for item in gsm8k.items()[: flags.answers] for request in gsm8k.requests(item)]
    return {
        "mmlu": _pairs(mmlu, flags.questions),
        "preferences": _pairs(pairs, flags.pairs),
        "gsm8k": [(r.context, list(r.until), r.max_tokens) for r in answers if isinstance(r, Generation)],
    }


def _pairs(task, limit: int) -> list[tuple[str, str]]:
    found = [request for item in task.items()[:limit] for request in task.requests(item)]
    return [(request.context, request.continuation) for request in found]


class Theirs:
    """lm-eval's HFLM."""

    def __init__(self, folder: str):
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        self.model, self.instance = HFLM(folder, dtype="float32", device="cpu", batch_size=BATCH_SIZE), Instance

    def score(self, pairs):
        """Returns the log-probability of each pair."""
        return [log_prob for log_prob, _ in self.model.loglikelihood(self._asked("loglikelihood", pairs))]

    def write(self, asked):
        """Returns the answers."""
        options = [(a, {"until": b, "max_gen_toks": c, "do_sample": False}) for a, b, c in asked]
        return self.model.generate_until(self._asked("generate_until", options))

    def checks(self, requests):
        """Returns nothing more."""
        return {}

    def _asked(self, kind, arguments):
        return [self.instance(request_type=kind, doc={}, arguments=tuple(one), idx=0) for one in arguments]


class Ours:
    """Scorer."""

    def __init__(self, folder: str):
        import jax

        from foundry_jax import zoo

        self.compiled = []
        jax.monitoring.register_event_duration_secs_listener(self._note)
        self.model = zoo.load_pretrained(folder)
        self.scorer = self.new_scorer(BATCH_SIZE)

    def new_scorer(self, batch_size):
        """Returns a scorer of the model."""
        from foundry_jax.tasks.scoring import Scorer

        return Scorer(self.model, batch_size=batch_size)

    def score(self, pairs, scorer=None):
        """Returns the log-probability of each pair."""
        from foundry_jax.tasks.requests import Continuation

        found = (scorer or self.scorer).loglikelihood([Continuation(*pair) for pair in pairs])
        return [score.log_prob for score in found]

    def write(self, asked, scorer=None):
        """Returns the answers."""
        from foundry_jax.tasks.requests import Generation

        return (scorer or self.scorer).generate_until([Generation(a, tuple(b), c) for a, b, c in asked])

    def checks(self, requests):
        """Returns whether bits depend on batch size and order, and the programs of one task."""
        import random

        some, answers = requests["mmlu"][:48] + requests["preferences"][:10], requests["gsm8k"][:4]
        order = random.Random(0).sample(range(len(some)), len(some))
        expected, written = self.score(some), self.write(answers)
        same = True
        for batch_size in (1, 3, 8):
            scorer = self.new_scorer(batch_size)
            same &= [expected[i] for i in order] == self.score([some[i] for i in order], scorer)
            same &= written[::-1] == self.write(answers[::-1], scorer)
        return {"same_bits": same, "programs": len(self.compiled), "compiling": sum(self.compiled)}

    def _note(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.compiled.append(seconds)


def run_side(side: str, folder: str, path: str) -> None:
    """Asks one side everything, and writes its answers and seconds to a file."""
    requests = json.loads(pathlib.Path(path).read_text())
    one = {"theirs": Theirs, "ours": Ours}[side](folder)
    result = {"answers": {}, "seconds": {}}
    for name, asked in requests.items():
        ask = one.write if name == "gsm8k" else one.score
        longest = sorted(asked, key=lambda request: len(request[0]))[-WARM:]
        ask([(*request[:2], 2) for request in longest] if name == "gsm8k" else longest)
        start = time.perf_counter()
        result["answers"][name] = ask(asked)
        result["seconds"][name] = time.perf_counter() - start
        print(f"{side} {name}: {result['seconds'][name]:.1f} s", flush=True)
    result |= one.checks(requests)
    pathlib.Path(f"{path}.{side}").write_text(json.dumps(result))


def compare(theirs: dict, ours: dict) -> bool:
    """Prints the figures and returns whether they meet the goals."""
    met = ours["same_bits"] and ours["programs"] <= PROGRAMS_GOAL
    for name, size in (("mmlu", 4), ("preferences", 2)):
        a, b = theirs["answers"][name], ours["answers"][name]
        worst = max(abs(x - y) for x, y in zip(a, b, strict=True))
        groups = range(0, len(a), size)
        different = sum(a[i:][:size].index(max(a[i:][:size])) != b[i:][:size].index(max(b[i:][:size])) for i in groups)
        print(f"eval {name}: {len(a)} log-likelihoods differ by up to {worst:.1e} nats (goal {NATS})", end=", ")
        print(f"{different} of {len(groups)} argmaxes (goal 0)")
        met &= worst <= NATS and different == 0
    a, b = theirs["answers"]["gsm8k"], ours["answers"]["gsm8k"]
    different = sum(x != y for x, y in zip(a, b, strict=True))
    print(f"eval gsm8k: {different} of {len(a)} answers differ (goal 0)")
    met &= different == 0
    for name, goal in (("mmlu", MMLU_GOAL), ("preferences", 0.0), ("gsm8k", GSM8K_GOAL)):
        a, b = theirs["seconds"][name], ours["seconds"][name]
        print(f"eval {name}: {a / b:.2f} times as fast as lm-eval (goal {goal}; {b:.1f} s against {a:.1f} s)")
        met &= a / b >= goal
    print(
        f"eval: {ours['programs']} programs (goal {PROGRAMS_GOAL}), {ours['compiling']:.1f} s to compile; bits "
        f"{'do not depend' if ours['same_bits'] else 'DEPEND'} on batch size and order"
    )
    return met


def main() -> None:
    """Runs both sides and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--answers", type=int, default=24)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--requests", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        run_side(flags.side, flags.folder, flags.requests)
        return
    from foundry_jax.zoo.catalog import ZOO
    from foundry_jax.zoo.export import export
    from foundry_jax.zoo.gguf import GGUFFile

    with tempfile.TemporaryDirectory() as temporary:
        folder, path = f"{temporary}/model", f"{temporary}/requests.json"
        export(GGUFFile(ZOO["smollm2-135m"].packaged()), folder, dtype="float32")
        pathlib.Path(path).write_text(json.dumps(requests_of(flags)))
        for side in ("ours", "theirs"):
            arguments = ["--side", side, "--folder", folder, "--requests", path]
            environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # for both
            subprocess.run([sys.executable, __file__, *arguments], check=True, env=environment)
        sides = [json.loads(pathlib.Path(f"{path}.{side}").read_text()) for side in ("theirs", "ours")]
    sys.exit(not compare(*sides))


if __name__ == "__main__":
    main()
