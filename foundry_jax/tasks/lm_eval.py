"""Every task of lm-eval, asked of our models: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness.

    python -m foundry_jax.eval --task=lm_eval:hellaswag --model=smollm2-135m
    python -m foundry_jax.eval --task=lm_eval:my_task.yaml --model=smollm2-135m

or from lm-eval's own functions:

    model = load_pretrained("smollm2-135m")
    lm_eval.simple_evaluate(FoundryLM(Scorer(model), model.tokenizer), tasks=["hellaswag"], limit=100)

Needs the extra lm-eval, and no torch. Prompts, filters, metrics and standard errors are lm-eval's, and so is the data,
which comes from the hub or from files that a task's YAML names. Not offered are images, and tasks that run what a model
wrote, because lm-eval runs it without a sandbox.
"""

import collections
import contextlib
import difflib
import functools
import hashlib
import json
import logging
import math
import numbers
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foundry_jax.data.chat import Chat, render
from foundry_jax.data.hub import hub_answers, offline
from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.errors import UserError, first_line
from foundry_jax.generate import Sampling
from foundry_jax.tasks.base import Metric
from foundry_jax.tasks.requests import Continuation, Generation
from foundry_jax.tasks.scoring import Scorer

try:
    import datasets
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError as error:
    raise UserError(
        f"Tasks of lm-eval need it installed ({error}): pip install 'foundry-jax[lm-eval]', or choose another task."
    ) from error

# For standard errors lm-eval would start processes, and forking one with JAX in it may never return.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

log = logging.getLogger(__name__)

BOOTSTRAPS = 1000  # of scores that are no means: their standard errors are then good to 2 %
MAX_TOKENS = 256  # where a task does not say, as in lm-eval's own models
SOME_DATA_SET = "EleutherAI/lambada_openai"  # what the hub is asked about, to see whether it answers
UNFINISHED = "<<unfinished>>"  # marks the end of a message that the model is to go on with
# Options of generation that change nothing with these values; with others they are refused.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


class FoundryLM(LM):
    """A model of ours as lm-eval sees it."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """Takes what answers.

        Args:
            tokenizer: the model's, whose chat template lm-eval's apply_chat_template=True asks for.
            progress: called with (requests answered, requests asked).
        """
        super().__init__()
        self._scorer, self._chat_tokenizer, self._progress = scorer, tokenizer, progress
        self._done = self._asked = 0

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches of prompts tell models apart by."""
        return self._chat().tokenizer.hash

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the template, or "" where none is asked for; the model has but one, whatever its name."""
        return self._chat().template if chat_template else ""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text. Without the beginning of an answer it ends within the last message.

        Raises:
            UserError: the model has no chat template, or it refuses the conversation.
        """
        chat = self._chat()
        messages = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += UNFINISHED
        text = render(
            chat.template,
            messages,
            special_tokens=chat.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )
        return text if add_generation_prompt else text[: text.rindex(UNFINISHED)]

    def _chat(self) -> Chat:
        return Chat.of(self._chat_tokenizer, "The model")

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (nats of the continuation, whether it is what greedy writing gives) of each request."""
        asked = [Continuation(*request.args) for request in requests]
        scores = self._scorer.loglikelihood(asked, self._counted(len(asked)))
        return [(score.log_prob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the nats of each text."""
        texts = [request.args[0] for request in requests]
        return self._scorer.loglikelihood_rolling(texts, self._counted(len(texts)))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns what the model writes after each context.

        Raises:
            UserError: a task wants a way of writing that there is not.
        """
        asked = list(_generations([request.args for request in requests]))
        return self._scorer.generate_until(asked, self._counted(len(asked)))

    def _counted(self, count: int) -> Callable[[int], None]:
        self._asked += count

        def add(count: int = 1) -> None:
            self._done += count
            self._progress(self._done, self._asked)

        return add


def _generations(arguments: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Generation]:
    """Yields requests in our words. The same one asked again is drawn with another seed, whatever else is asked."""
    seen: collections.Counter[str] = collections.Counter()
    for context, options in arguments:
        text = f"{json.dumps(options, sort_keys=True, default=str)} {context}"
        yield _generation(context, options, seed=f"{seen[text]} {context}")
        seen[text] += 1


def _generation(context: str, options: Mapping[str, Any], seed: str) -> Generation:
    given = dict(normalize_gen_kwargs(dict(options), MAX_TOKENS))
    until, max_tokens, sampled = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
    drawn = {name: given.pop(name) for name in ("temperature", "top_k", "top_p") if name in given}
    refused = {name: value for name, value in given.items() if name not in NEUTRAL or value != NEUTRAL[name]}
    if refused:
        raise UserError(
            f"The task wants its text written with {', '.join(f'{name}={x}' for name, x in refused.items())}, which "
            f"is not offered; there are until, max_gen_toks, do_sample, temperature, top_k and top_p."
        )
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") % 2**31
    sampling = Sampling(**{"temperature": 0.0} | drawn, seed=number) if sampled else Sampling()
    return Generation(context, tuple(text for text in until if text), max_tokens, sampling)


def check(name: str) -> None:
    """Refuses what `run` would, before there is a model.

    Raises:
        UserError: no such task, its data cannot be had, it is not for language models, or it runs code.
    """
    _load(name)


def run(
    name: str,
    scorer: Scorer,
    limit: int | None = None,
    shots: int | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Metric]:
    """Returns the scores of one of lm-eval's tasks, groups or tags, or of the task in a YAML file.

    Args:
        limit: items of each task; None: all.
        shots: examples in each prompt; None: as many as the task says.
        progress: called with (requests answered, requests asked).

    Raises:
        UserError: as `check`, or the task wants its text written in a way that is not offered.
    """
    loaded = _load(name)
    for key, task in loaded.tasks["tasks"].items():
        _set_shots(task, loaded.shots[key], shots)
    random.setstate(loaded.draws[0])
    np.random.set_state(loaded.draws[1])
    model = FoundryLM(scorer, progress=progress)
    with contextlib.redirect_stdout(sys.stderr):
        found = evaluate(model, loaded.tasks, limit=limit, bootstrap_iters=BOOTSTRAPS)
    _complete(found["results"], found["samples"], loaded.tasks["tasks"])
    return _metrics(found["results"], found["group_subtasks"], name)


class _Loaded(NamedTuple):
    """What lm-eval makes of a name.

    tasks: {"tasks": ..., "groups": ...}.
    shots: what each task says itself.
    draws: the states of the generators of Python and numpy afterwards: some tasks go on drawing with them.
    """

    tasks: Any
    shots: dict[str, int | None]
    draws: tuple[Any, Any]


@functools.cache  # a command checks first and runs later, and a group's data may take a minute
def _load(name: str) -> _Loaded:
    manager = _manager()
    if name not in manager.all_tasks and not Path(name).is_file():
        near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(f"lm-eval has no task {name!r}.{hint} `lm-eval ls tasks` lists all; a YAML file will do too.")
    entry = manager.task_index.get(name)
    path = entry.yaml_path if entry else Path(name)
    random.seed(DEFAULT_RANDOM_SEED)  # as lm_eval.simple_evaluate does
    np.random.seed(DEFAULT_OTHER_SEED)
    online = hub_answers(SOME_DATA_SET)()
    try:
        with contextlib.redirect_stdout(sys.stderr), offline(datasets, active=not online):
            if path and load_yaml(path, resolve_func=False).get("unsafe_code"):
                raise _no_sandbox(name)  # before its own code is loaded, which may bring more from the hub
            loaded = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # a task's own code fails, or any of the libraries that fetch data
        raise UserError(
            f"lm-eval cannot load {name!r} ({type(error).__name__}: {first_line(error)}): its data comes from the "
            f"hub{'' if online else ', which does not answer,'} unless its YAML names files (dataset_path: json, "
            f"dataset_kwargs: data_files)."
        ) from error
    for task in loaded["tasks"].values():
        _refuse_what_is_not_offered(task)
    shots = {key: task.get_config("num_fewshot") for key, task in loaded["tasks"].items()}
    return _Loaded(loaded, shots, (random.getstate(), np.random.get_state()))


@functools.cache  # it reads 14,000 files
def _manager() -> TaskManager:
    return TaskManager()


def _refuse_what_is_not_offered(task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise _no_sandbox(task.config.task)
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{task.config.task!r} shows images, and there are only language models here.")


def _no_sandbox(name: str) -> UserError:
    return UserError(
        f"lm-eval would run what the model writes for {name!r} without a sandbox: use --task=humaneval, which has one."
    )


def _set_shots(task, own: int | None, shots: int | None) -> None:
    """Does as lm_eval.simple_evaluate: a task that says 0 keeps it."""
    if own == 0 and shots:
        log.warning("%s has no examples by definition: shots=%d is left out.", task.config.task, shots)
    task.set_config("num_fewshot", (own or 0) if shots is None or own == 0 else shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _complete(results: dict[str, dict], samples: Mapping[str, Sequence[Mapping]], tasks: Mapping[str, Any]) -> None:
    """Adds standard errors where lm-eval has none, which is where a score is no mean, by resampling the items."""
    for name, task in tasks.items():
        for key in [key for key, value in results[name].items() if "_stderr," in key and value == "N/A"]:
            metric, applied = key.replace("_stderr,", ",").split(",")
            values = [sample[metric] for sample in samples[name] if sample["filter"] == applied and metric in sample]
            aggregate, rng = task.aggregation().get(metric), random.Random(0)
            if aggregate and len(values) > 1:
                draws = [aggregate(rng.choices(values, k=len(values))) for _ in range(BOOTSTRAPS)]
                results[name][key] = statistics.stdev(draws)


def _metrics(results: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]], asked: str) -> list[Metric]:
    """Returns lm-eval's table: {"hellaswag": {"acc,none": 0.4, "acc_stderr,none": 0.01, "sample_len": 100, ...}}.

    "acc" of what was asked for, "acc/mmlu_stem/mmlu_anatomy" of what it consists of, "exact_match (strict-match)" where
    a filter was applied.
    """
    parents = {child: group for group, children in groups.items() for child in children}
    found = []
    for task in sorted(results, key=lambda task: len(_path(task, parents))):
        values, path = results[task], _path(task, parents)
        below = path if path[0] != asked and len(results) > 1 else path[1:]
        for key, value in values.items():
            metric, comma, applied = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                continue
            stderr = values.get(f"{metric}_stderr,{applied}")
            stderr = float(stderr) if isinstance(stderr, numbers.Real) else math.nan
            n = values.get("sample_count", {}).get(key, values["sample_len"])
            label = metric if applied == "none" else f"{metric} ({applied})"
            found.append(Metric("/".join([label, *below]), float(value), stderr, n))
    return found


def _path(task: str, parents: Mapping[str, str]) -> list[str]:
    """Returns the groups that a task is in, the largest first, and the task."""
    path = [task]
    while path[0] in parents:
        path.insert(0, parents[path[0]])
    return path
