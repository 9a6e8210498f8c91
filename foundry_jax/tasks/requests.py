"""What can be asked of a model about text, in the words of lm-eval: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness."""

import dataclasses
from typing import NamedTuple

from foundry_jax.generate import Sampling
from foundry_jax.schema import require


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How likely is a continuation of a context? lm-eval's loglikelihood.

    A space between the two belongs to the continuation. Without a context it follows the model's first token.
    """

    context: str
    continuation: str


@dataclasses.dataclass(frozen=True)
class Generation:
    """What does the model write after a context? lm-eval's generate_until.

    until: texts that end it, and are no part of the answer; the model's own end always does.
    max_tokens: most new tokens.
    """

    context: str
    until: tuple[str, ...]
    max_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def __post_init__(self):
        require(self.max_tokens >= 0, f"max_tokens={self.max_tokens} must be 0 or more.")
        require(isinstance(self.until, tuple), f"until={self.until!r} must be a tuple of texts.")


class Score(NamedTuple):
    """log_prob: of all tokens of a continuation together, in nats; is_greedy: whether each is the likeliest one."""

    log_prob: float
    is_greedy: bool
    num_tokens: int
