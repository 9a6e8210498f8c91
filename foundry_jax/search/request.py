"""What is asked of a sweep: everything that decides its outcome, and nothing else."""

import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.schema import require, require_range
from foundry_jax.search.matching import MATCHES

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_NAME_LENGTH = 80  # of a default sweep folder


@dataclasses.dataclass(frozen=True)
class Request:
    """One sweep.

    config: a config file, with its own mutations if need be: "configs/tiny.py:mla".
    words: what is mutated; see space.contestants.
    overrides: "dotted.key=value", for all contestants.
    eval_tasks: as in the config key eval.tasks: "mmlu(limit=200)".
    metric: what the verdict is about; see measuring.metric_of.
    seeds, max_seeds: how many at first, and how many while undecided; first_seed is the first of them.
    min_effect: in the metric's unit.
    lr_bracket: how many learning rates are tried for each architecture; 0: none but its own.
    rungs: how often the better half of the contestants is kept on the way; 0: never.
    budget: seconds, or None.
    """

    config: str
    words: tuple[str, ...]
    overrides: tuple[str, ...]
    stack: bool
    eval_tasks: str
    metric: str
    seeds: int
    max_seeds: int
    first_seed: int
    alpha: float
    min_effect: float
    match: str
    lr_bracket: int
    rungs: int
    budget: float | None

    def __post_init__(self):
        require_range(self, "", seeds=(1, 1000), first_seed=(0, 2**30), alpha=(1e-6, 0.5), rungs=(0, 20))
        require_range(self, "", min_effect=(0, 1e6))
        require(
            self.max_seeds >= self.seeds,
            f"max_seeds={self.max_seeds} must be at least seeds={self.seeds}: there may be so many in the end.",
        )
        lookup(MATCHES, self.match, "--match")
        require(self.lr_bracket in (0, *range(2, 33)), f"lr_bracket={self.lr_bracket} must be 0 or from 2 to 32 rates.")
        require(self.budget is None or self.budget > 0, f"budget={self.budget} must be more than 0 seconds.")

    def to_json(self) -> dict[str, Any]:
        """Returns what config.json of the sweep's folder holds."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def default_folder(self) -> pathlib.Path:
        """Returns runs/sweeps/<what is asked>, so that the same command finds its sweep again."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:8]
        stem = pathlib.Path(self.config.partition(":")[0]).stem
        name = re.sub(r"[^\w.=+-]+", "-", "-".join([stem, *self.words]))[:MAX_NAME_LENGTH]
        return pathlib.Path("runs") / "sweeps" / f"{name}-{digest}"


def seconds_of(text: str) -> float:
    """Returns the seconds of "90s", "30m", "1.5h" or "2d".

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([smhd])", text.strip())
    if not match or not float(match[1]):
        raise UserError(f"--budget={text!r} must be a time such as 90s, 30m, 1.5h or 2d.")
    return float(match[1]) * UNITS[match[2]]
