"""What a model says of pairs of completions, and how much it prefers the chosen ones to what a reference does."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from foundry_jax import compilation
from foundry_jax.data.cache import cache_root
from foundry_jax.data.hashing import sha256_json
from foundry_jax.data.preferences import Pairs, Reference, read_reference, write_reference
from foundry_jax.losses import PAIR_LOSSES, LossScales, PairStatistics
from foundry_jax.optimizer import Hyperparameters
from foundry_jax.sharding import Plan
from foundry_jax.train_step import Program, reference_step


class Answers(NamedTuple):
    """Log-probabilities of some pairs in nats, float32: of completions [P, 2], and of every target [P, 2, L]."""

    completions: jax.Array
    targets: jax.Array


def answers_step(program: Program, params: dict, batch: dict, hyper: Hyperparameters, base: dict) -> Answers:
    """Returns what the model says of a batch of pairs, their reference excepted.

    What it says of a target is how much the completion's sum grows with the target's weight.
    """

    def total(weights):
        log_probs = reference_step(program, params, batch | {"weights": weights}, hyper, base)
        return jnp.sum(log_probs), log_probs

    (_, completions), targets = jax.value_and_grad(total, has_aux=True)(batch["weights"])
    return Answers(completions, targets)


@functools.lru_cache(maxsize=8)
def compile_answers_step(program: Program, plan: Plan, batch_shape: tuple[int, ...]):
    """Returns the compiled (parameters, batch of pairs, hyperparameters, base) -> Answers, whole on every device.

    Call it within plan.context().
    """
    inputs = compilation.abstract_inputs(program, plan, batch_shape)
    batch = {name: x for name, x in inputs.batch.items() if name != "reference"}
    everywhere = plan.shardings(jax.ShapeDtypeStruct((), np.float32))
    step = jax.jit(functools.partial(answers_step, program), out_shardings=everywhere)
    options = compilation.CPU_OPTIONS if jax.default_backend() == "cpu" else None
    return step.lower(inputs.state.params, batch, inputs.hyper, inputs.base).compile(options)


@dataclasses.dataclass(frozen=True)
class ReferenceFile:
    """Where a reference is kept for every run that would compute the same bits: the first of its processes reads it.

    path: <cache>/references/<key>.npz, beside the token cache.
    shapes: of the arrays of a Reference.
    """

    path: Path
    key: str
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, cache_dir: str, program: Program, plan: Plan, batch_shape: tuple[int, ...], *, start: list,
        train: Sequence[Pairs], held_out: Pairs,
    ) -> "ReferenceFile":  # fmt: skip
        """Returns the file of what the parameters that `start` names say of the pairs.

        Adapters, the batch and the devices are in the key because they change how numbers are rounded.
        """
        said = {
            "format": 1,
            "start": start,
            "pairs": [[pairs.hash for pairs in train], held_out.hash],
            "model": dataclasses.asdict(program.model),
            "adapters": [program.lora_rank, program.lora_targets],
            "batch": batch_shape,
            "devices": [plan.strategy, plan.axis_sizes(), jax.devices()[0].device_kind, jax.__version__],
        }
        key = sha256_json(said)
        path = cache_root(cache_dir).with_name("references") / f"{key[:32]}.npz"
        return cls(path, key, ((sum(map(len, train)), 2), (int(held_out.completion_lengths.sum()),)))

    def read(self) -> Reference | None:
        """Returns the reference; None if it is not kept, or is damaged."""
        found = read_reference(self.path, self.key) if jax.process_index() == 0 else None
        if jax.process_count() == 1:
            return found
        if not multihost_utils.broadcast_one_to_all(np.int32(found is not None)):
            return None
        blank = Reference(*(np.zeros(shape, np.float32) for shape in self.shapes))
        return multihost_utils.broadcast_one_to_all(blank if found is None else found)

    def write(self, reference: Reference) -> None:
        """Keeps the reference, if the disk takes it."""
        if jax.process_index() == 0:
            write_reference(self.path, self.key, reference)


def figures(pairs: Pairs, now: np.ndarray, reference: np.ndarray, loss: str, scales: LossScales) -> dict[str, float]:
    """Returns what the metrics say of pairs that are not trained on.

    preference_loss: of the loss that is trained with, the mean over the pairs.
    reward_accuracy, reward_accuracy_low, reward_accuracy_high: the share of pairs whose margin is above 0, and its 95 %
        interval.
    reward_margin: the mean of beta times the margin, in nats; chosen_log_ratio, rejected_log_ratio: those of which it
        is the difference, without beta: how much likelier a completion has become, in nats.
    kl: the mean over the completions' tokens of r - 1 - log r, r being reference / model: the estimator k3 of
        KL(model || reference) in Schulman 2020, http://joschu.net/blog/kl-approx.html. It would be unbiased on tokens
        that the model writes; on those of the data it says how far the model has gone from what was written by others.

    Args:
        now, reference: log-probabilities of each token of the completions, [tokens], under the model and the reference.
    """
    change = now.astype(np.float64) - reference
    log_ratio = sums(change, pairs.completion_lengths)
    losses = PAIR_LOSSES[loss](PairStatistics(_float32(log_ratio), _float32(pairs.completion_lengths)), scales)
    margin = log_ratio[:, 0] - log_ratio[:, 1]
    right, number = int(np.sum(margin > 0)), len(pairs)
    low, high = wilson(right, number)
    return {
        "preference_loss": float(np.asarray(losses, np.float64).mean()),
        "reward_accuracy": right / number,
        "reward_accuracy_low": low,
        "reward_accuracy_high": high,
        "reward_margin": float(scales.dpo_beta * margin.mean()),
        "chosen_log_ratio": float(log_ratio[:, 0].mean()),
        "rejected_log_ratio": float(log_ratio[:, 1].mean()),
        "kl": float(np.mean(np.expm1(-change) + change)),
    }


def line(row: Mapping[str, float]) -> str:
    """Returns the most important figures of a row of metrics, for people."""
    interval = f"{row['reward_accuracy_low']:.2f} to {row['reward_accuracy_high']:.2f}"
    return (
        f"loss {row['preference_loss']:.4f}, reward accuracy {row['reward_accuracy']:.3f} ({interval}), margin "
        f"{row['reward_margin']:.4f}, KL {row['kl']:.4f} nats a token"
    )


def sums(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the sums over the tokens of completions of these lengths, which lie one after the other."""
    ends = np.cumsum(lengths.ravel())
    total = np.concatenate([[0.0], np.cumsum(tokens, dtype=np.float64)])
    return (total[ends] - total[ends - lengths.ravel()]).reshape(lengths.shape)


def wilson(right: int, number: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of which `right` out of `number` were seen.

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    from scipy import stats  # takes half a second, and most runs need none

    found = stats.binomtest(right, number).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def _float32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
