"""Tasks that a run evaluates while it trains, on the parameters it has at that step.

    eval.tasks = "mmlu(every=1000, limit=200, shots=0), constitution(data='pairs.jsonl', ema=True)"

Options of each: `every` so many steps, and at the end (0: at the end only); `limit` items; `ema`, the averaged weights
instead of the raw ones; `data`, a file or folder; and those of the task itself, such as shots.
"""

import dataclasses
import inspect
import pathlib
import shutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from foundry_jax.errors import UserError
from foundry_jax.registry import lookup, unknown
from foundry_jax.schema import calls, coerce, require
from foundry_jax.tasks import TASKS, run
from foundry_jax.tasks.base import Task
from foundry_jax.tasks.results import Result, save
from foundry_jax.tasks.scoring import Scorer

WHAT = "eval.tasks"
TIMES = {"every": int, "limit": int, "ema": bool}  # options that are not the task's


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A task and when to ask it.

    label: what it is called in the run: the task's name, with _ema for averaged weights.
    """

    label: str
    task: Task
    every: int = 0
    limit: int | None = None
    ema: bool = False

    def is_due(self, step: int, num_steps: int) -> bool:
        """Returns whether it is asked after so many steps."""
        return step == num_steps or (self.every > 0 and step % self.every == 0)

    def check(self, scorer: Scorer) -> None:
        """Refuses requests that a model cannot be asked, whatever its parameters.

        Raises:
            UserError: as in Scorer.check.
        """
        ranked = self.task.ranked()[: self.limit]
        scorer.check([request for item in ranked for request in self.task.requests(item)])

    def evaluate(
        self,
        scorer: Scorer,
        folder: pathlib.Path | None,
        model: Mapping[str, Any],
        facts: Mapping[str, Any],
        progress: Callable[[int, int], None],
    ) -> Result:
        """Returns what the model's answers come to, and keeps it as tasks.run would, in place of what is there.

        Args:
            folder: None: it is not kept.
        """
        result = run(self.task, scorer, limit=self.limit, model=model, progress=progress)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that has been here before
            save(result, folder, facts)
        return result


def scheduled(text: str) -> list[Scheduled]:
    """Returns the tasks of eval.tasks, their data read.

    Raises:
        UserError: an unknown task or option, the same one twice, or data that is missing or malformed.
    """
    found = [_scheduled(name, options) for name, options in calls(text, WHAT)]
    labels = [one.label for one in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    require(twice is None, f"{WHAT} has {twice} twice; give it once, or once more with ema=True.")
    return found


def _scheduled(name: str, options: Mapping[str, Any]) -> Scheduled:
    cls = lookup(TASKS, name, "task")
    kinds = TIMES | _options_of(cls)
    for key in options:
        if key not in kinds:
            raise UserError(unknown(key, kinds, f"option of {WHAT}={name}"))
    given = {key: _coerced(value, kinds[key], f"{WHAT}={name}: {key}") for key, value in options.items()}
    times = {key: given.pop(key) for key in TIMES if key in given}
    require(times.get("every", 0) >= 0, f"{WHAT}={name}: every={times.get('every')} must be 0 or more steps.")
    require(times.get("limit", 1) >= 1, f"{WHAT}={name}: limit={times.get('limit')} must be 1 or more items.")
    return Scheduled(f"{name}_ema" if times.get("ema") else name, cls(given.pop("data", None), **given), **times)


def _options_of(cls: type[Task]) -> dict[str, Any]:
    """Returns the types of a task's own options, and of data."""
    hints = typing.get_type_hints(cls.__init__)
    names = [name for name in inspect.signature(cls).parameters if name != "path"]
    return {"data": str, **{name: hints[name] for name in names}}


def _coerced(value: Any, kind: Any, what: str) -> Any:
    """Returns a value as a type, which may also be a sequence of one, or one or None.

    Raises:
        UserError: it cannot be.
    """
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Sequence:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(one, inner[0], what) for one in values)
    if types.NoneType in inner:
        return None if value is None else coerce(value, inner[0], what)
    return coerce(value, kind, what)
