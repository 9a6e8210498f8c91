"""The gate before training: what every contestant must be before its losses mean anything.

    labels      targets are the next tokens, and the loss of a target depends on that target alone
    causality   no loss depends on a later token, or on another sequence
    decode      reading through the key/value cache gives the losses of reading at once
    packing     documents in one sequence have the losses that they have alone, whatever stands beside them
    gradients   the training step has finite gradients, and its cross-entropy is that of the evaluation

Found by changing something and looking at what else changes. A loss that may not change is the same to the last bit in
the same program, unless terms are added in another order; so what differs by rounding at most counts as the same.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from foundry_jax.config import Config
from foundry_jax.model import transformer
from foundry_jax.model.mlp.moe import moe_of
from foundry_jax.schema import require
from foundry_jax.search.subject import ROWS, Subject

SHORTEST = 4  # tokens of a context: two documents of two
# How far losses may differ, in nats; relatively where they are more than one. Sound models: 3e-6 between two programs
# in float32, 0 in one (the architectures of tests/variants.py, and configs/tiny.py; XLA:CPU, 2026-11).
ALIKE = 3e-5  # in one program in float32
CLOSE = 1e-4  # in two programs in float32
COARSE = {"float32": 1e-3, "bfloat16": 5e-2}  # in programs of that type, whose products a GPU or TPU may round
# FLOPs of the runs that look for what a token sees, and how many there are at least; a run has a cut in each row.
FLOPS = {"cpu": 2e10, "other": 2e13}
FEWEST_RUNS = 8
DECODED = 16  # tokens that are decoded one by one
NAMED = 6  # positions named in the evidence
DRAWS = 2  # of tokens, of models with experts: where two programs round differently, a token near a tie goes elsewhere
SHIFTS = range(-2, 4)  # by which labels may be wrong, for the evidence


@dataclasses.dataclass(frozen=True)
class Check:
    """What one part of the gate found; evidence is a sentence with numbers."""

    name: str
    passed: bool
    evidence: str
    seconds: float


class Failed(Exception):
    """A check found what must not be; the message is the evidence."""


def check(config: Config, batch: dict[str, np.ndarray]) -> list[Check]:
    """Returns what all checks found.

    Args:
        config: with known vocabulary.
        batch: the first training batch: inputs, targets and weights [B, L], or those of pairs (data/preferences.py).

    Raises:
        UserError: the config does not fit together, or its context is too short.
    """
    require(
        config.model.context_length >= SHORTEST,
        f"model.context_length={config.model.context_length} must be at least {SHORTEST} tokens: in fewer, nothing can "
        f"be seen to leak.",
    )
    start = time.perf_counter()
    gate = Gate(config, batch)
    drawing = time.perf_counter() - start
    found = [_timed(name, part) for name, part in gate.parts().items()]
    return [dataclasses.replace(found[0], seconds=found[0].seconds + drawing), *found[1:]]


def _timed(name: str, part: Callable[[], str]) -> Check:
    start = time.perf_counter()
    try:
        evidence, passed = part(), True
    except Failed as failure:
        evidence, passed = str(failure), False
    return Check(name, passed, evidence, time.perf_counter() - start)


class Gate:
    """The checks of one contestant; each returns its evidence, or raises Failed with it."""

    def __init__(self, config: Config, batch: dict[str, np.ndarray]):
        self.config, self.batch = config, batch
        self.subject = Subject(config)
        self.exact = self.subject.exact()
        self.length, self.vocab_size = self.subject.length, config.model.vocab_size

    def parts(self) -> dict[str, Callable[[], str]]:
        """Returns the checks by name, in order."""
        return {
            "labels": lambda: f"{self.labels_of_the_batch()}; {self._drawn(self.labels_of_the_loss)}",
            "causality": lambda: self._drawn(self.causality),
            "decode": lambda: self._drawn(self.decode),
            "packing": lambda: self._drawn(self.packing),
            "gradients": self.gradients,
        }

    def _drawn(self, part: Callable[[np.random.Generator], str]) -> str:
        """Returns the evidence of a check on random tokens; with experts it fails only if it fails on all draws."""
        draws = DRAWS if moe_of(self.config.model) else 1
        for draw in range(draws):
            try:
                return part(np.random.default_rng(draw))
            except Failed:
                if draw == draws - 1:
                    raise
        raise AssertionError

    def labels_of_the_batch(self) -> str:
        """The target at a position is the input at the next one, wherever both are in one document and it counts."""
        inputs, targets = (self.batch[name].reshape(-1, self.batch[name].shape[-1]) for name in ("inputs", "targets"))
        counts = _counted(self.batch)
        wrong = counts & (targets[:, :-1] != inputs[:, 1:])
        if wrong.any():
            share = wrong.sum() / counts.sum()
            row, at = np.argwhere(wrong)[0]
            raise Failed(
                f"{share:.0%} of the targets of the first training batch are not the next token (the first: sequence "
                f"{row}, position {at}); {_shift_of(inputs, targets, counts)}"
            )
        return f"{counts.sum():,} targets of the first training batch are the next token"

    def labels_of_the_loss(self, rng: np.random.Generator) -> str:
        """A target changes its own loss and no other."""
        inputs, targets = self._rows(rng)
        before = self._nll(self.subject, inputs, targets)
        for chosen in (np.arange(self.length) % 2 == 0, np.arange(self.length) % 2 == 1):
            other = np.where(chosen[None], self._others(rng, targets), targets)
            moved = _beyond(ALIKE, before, self._nll(self.subject, inputs, other))
            if (wrong := moved & ~chosen[None]).any():
                raise Failed(
                    f"the loss depends on other targets than its own: changing every second one changed the losses "
                    f"between them, at {_positions(wrong)}"
                )
            if (deaf := ~moved & chosen[None]).mean() > 0.25:
                raise Failed(f"the loss does not depend on its target at {_positions(deaf)}")
        return "the loss of each depends on no other target"

    def causality(self, rng: np.random.Generator) -> str:
        """Changing all tokens of a row after a cut changes no loss up to it; another cut in the other row."""
        inputs, targets = self._rows(rng)
        cuts, worst = self._cuts(rng), 0.0
        before = self._nll(self.subject, inputs, targets)
        for pair in cuts:
            after_cut = np.arange(self.length)[None] > pair[:, None]
            other = np.where(after_cut, self._others(rng, inputs), inputs)
            after = self._nll(self.subject, other, targets)
            if np.array_equal(before[after_cut], after[after_cut]):
                raise Failed("no loss depends on the tokens: changing all of them after a position changed nothing")
            if np.array_equal(before[~after_cut], after[~after_cut]):
                continue
            if not self.subject.is_exact:  # rounding, or a leak?
                _require_blind(COARSE[self.config.model.dtype], before, after, pair)
                found = self._nll(self.exact, inputs, targets), self._nll(self.exact, other, targets)
            else:
                found = before, after
            _require_blind(ALIKE, *found, pair)
            worst = max(worst, np.abs(found[0] - found[1])[~after_cut].max())
        size = "not one bit" if worst == 0 else f"no more than rounding does ({worst:.1e} nats)"
        return (
            f"changing all tokens after one of {cuts.size} cuts through {ROWS} sequences of {self.length} tokens "
            f"changed the losses up to it by {size}"
        )

    def _cuts(self, rng: np.random.Generator) -> np.ndarray:
        """Returns the positions after which tokens are changed, [runs, ROWS]: all of them, or what can be paid for."""
        cost = transformer.flops_per_token(self.config.model) * ROWS * self.length
        runs = max(FEWEST_RUNS, int(FLOPS["cpu" if jax.default_backend() == "cpu" else "other"] / cost))
        # Little context shows much of a leak, much context a long one; and blocks are cut at powers of two.
        edges = [0, self.length - 2, *(2**i - 1 for i in range(1, self.length.bit_length()))]
        cuts = dict.fromkeys([*edges, *rng.permutation(self.length - 1).tolist()])
        cuts = [cut for cut in cuts if cut < self.length - 1][: runs * ROWS]
        return np.resize(cuts, (-(-len(cuts) // ROWS), ROWS))

    def decode(self, rng: np.random.Generator) -> str:
        """Through the cache, behind padding in one row, losses are those of the whole sequence."""
        inputs, targets = self._rows(rng)
        steps = min(DECODED, self.length // 2)
        padding = np.array([0, min(3, self.length - steps - 1)])
        positions = np.arange(self.length)[None] - padding[:, None]
        at = np.maximum(positions, 0)
        positions = np.where(positions < 0, -1, positions).astype(np.int32)
        take = lambda x: np.take_along_axis(x, at, axis=1)  # noqa: E731
        expected = take(self._nll(self.exact, inputs, targets))
        found = self.exact.decoded_nll(take(inputs), take(targets), positions, steps=steps)
        found = np.where(positions < 0, expected, found)
        worst = _worst(expected, found)
        if (wrong := _beyond(CLOSE, expected, found)).any():
            raise Failed(
                f"decoding differs from reading at once, at {_positions(wrong)}, by up to {worst:.2g} nats (the last "
                f"{steps} positions were decoded one by one)"
            )
        return (
            f"{self.length - steps} tokens at once and {steps} one by one have the losses of reading at once, to "
            f"{worst:.1e} nats"
        )

    def packing(self, rng: np.random.Generator) -> str:
        """Documents beside others, and before padding, have the losses that they have alone."""
        inputs, targets = self._rows(rng)
        documents = [_documents(self.length, row) for row in range(ROWS)]
        positions, segments = (np.stack(x).astype(np.int32) for x in zip(*map(_placed, documents), strict=True))
        packed = self._nll(self.exact, inputs, targets, positions, segments)
        worst = 0.0
        for i in range(max(map(len, documents)) - 1):
            found = [document[min(i, len(document) - 2)] for document in documents]
            worst = max(worst, self._require_as_alone(packed, found, inputs, targets))
            self._require_isolated(packed, found, inputs, targets, positions, segments, rng)
        count = sum(len(document) - 1 for document in documents)
        return (
            f"{count} documents in {ROWS} sequences of {self.length} tokens have the losses that they have alone, to "
            f"{worst:.1e} nats, and changing one changed no other"
        )

    def _require_as_alone(self, packed, documents: Sequence[slice], inputs, targets) -> float:
        """Returns by how much the losses of one document of each row differ from those that it has alone."""
        rolled = [np.stack([np.roll(x[row], -one.start) for row, one in enumerate(documents)])
                  for x in (inputs, targets)]  # fmt: skip
        alone, worst = self._nll(self.exact, *rolled), 0.0
        for row, one in enumerate(documents):
            expected, found = alone[row, : one.stop - one.start], packed[row, one]
            worst = max(worst, _worst(expected, found))
            if (wrong := _beyond(CLOSE, expected, found)).any():
                raise Failed(
                    f"a document of {len(found)} tokens that begins at position {one.start} of a packed sequence has "
                    f"other losses than alone, at {_positions(wrong[None])} of it, by up to {worst:.2g} nats"
                )
        return worst

    def _require_isolated(self, packed, documents: Sequence[slice], inputs, targets, positions, segments, rng) -> None:
        own = np.zeros(inputs.shape, bool)
        for row, one in enumerate(documents):
            own[row, one] = True
        others = np.where(own, inputs, self._others(rng, inputs))
        after = np.where(own, self._nll(self.exact, others, targets, positions, segments), packed)
        if (wrong := _beyond(ALIKE, packed, after)).any():
            one = documents[np.argwhere(wrong)[0, 0]]
            raise Failed(
                f"documents see each other: changing what stands around positions {one.start} to {one.stop - 1} of a "
                f"packed sequence changed the losses at {_positions(wrong)}, by up to {_worst(packed, after):.2g} nats"
            )

    def gradients(self) -> str:
        """Finite at the parameters that training starts with and at others, and of the loss that is evaluated."""
        batch = self._training_batch(np.random.default_rng(0))
        for params, which in ((self.subject.fresh, "new"), (self.subject.params, "random")):
            grads, metrics = self.subject.gradients(params, batch)
            if bad := [name for name, grad in grads.items() if not np.isfinite(grad).all()]:
                raise Failed(f"with {which} parameters the gradient is not finite at {_some(bad)}")
            if not np.isfinite(metrics["loss"]):
                raise Failed(f"with {which} parameters the training loss is {metrics['loss']}")
            if not any(np.any(grad) for grad in grads.values()):
                raise Failed(
                    f"with {which} parameters the gradient of all parameters is zero: nothing would be learned"
                )
        still = [name for name, grad in grads.items() if not np.any(grad)]
        agreement = "" if self.subject.program.learns_from_pairs else self._require_same_loss(batch, metrics)
        return f"{len(grads)} finite gradients{agreement}" + (f"; none of {_some(still)}" if still else "")

    def _require_same_loss(self, batch, metrics) -> str:
        """Returns the evidence that the training step sums the losses that the evaluation sums."""
        expected = np.average(self._nll(self.subject, batch["inputs"], batch["targets"]), weights=batch["weights"])
        found = float(metrics["cross_entropy"])
        if _beyond(COARSE[self.config.model.dtype], expected, found):
            raise Failed(
                f"the training step says a cross-entropy of {found:.4f} nats, the evaluation {expected:.4f} of the "
                f"same tokens"
            )
        return f"; the training step and the evaluation agree on {found:.3f} nats"

    def _training_batch(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if not self.subject.program.learns_from_pairs:
            inputs, targets = self._rows(rng)
            return {"inputs": inputs, "targets": targets, "weights": np.ones(inputs.shape, np.float32)}
        pairs = {name: x[np.arange(ROWS) % len(x)] for name, x in self.batch.items()}
        batch = {name: x[..., : self.length] if x.ndim == 3 else x for name, x in pairs.items()}
        batch["weights"] = (batch["positions"] >= 0).astype(np.float32)  # completions may lie beyond the length
        return {"reference": np.zeros(batch["inputs"].shape[:2], np.float32)} | batch

    def _rows(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns (inputs, targets), [ROWS, L] int32: a sequence of the training batch, its padding filled, and a
        random one."""
        tokens = rng.integers(0, self.vocab_size, (ROWS, self.length + 1), dtype=np.int32)
        row = rng.integers(len(self.batch["inputs"]))
        names = [name for name in ("inputs", "targets", "positions") if name in self.batch]
        real = {name: self.batch[name][row].reshape(-1, self.batch[name].shape[-1])[0, : self.length] for name in names}
        count = int(np.sum(real["positions"] >= 0)) if "positions" in real else self.length
        tokens[0, :count], tokens[0, count] = real["inputs"][:count], real["targets"][count - 1]
        return tokens[:, :-1], tokens[:, 1:]

    def _others(self, rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
        """Returns random tokens that are different everywhere."""
        return (tokens + rng.integers(1, self.vocab_size, tokens.shape, dtype=np.int32)) % self.vocab_size

    def _nll(self, subject: Subject, *batch) -> np.ndarray:
        nll = subject.nll(*batch)
        real = np.ones(nll.shape, bool) if len(batch) == 2 else batch[2] >= 0
        if (wrong := ~np.isfinite(nll) & real).any():
            raise Failed(f"the losses are not finite, at {_positions(wrong)}")
        return nll


def _counted(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Returns [rows, L - 1]: whether a target counts and its token is followed by one of the same document."""
    rows = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items() if x.shape == batch["inputs"].shape}
    counts = rows["weights"][:, :-1] > 0
    if "positions" in rows:
        counts &= rows["positions"][:, 1:] == rows["positions"][:, :-1] + 1
    if "segments" in rows:
        counts &= rows["segments"][:, 1:] == rows["segments"][:, :-1]
    return counts


def _shift_of(inputs: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> str:
    """Returns what the targets are instead: the shift of the inputs that fits most of them, if one fits nearly all."""
    length = inputs.shape[1]
    fits = {}
    for shift in SHIFTS:
        at = np.arange(max(0, -shift), min(length - 1, length - shift))
        fits[shift] = np.mean((targets[:, at] == inputs[:, at + shift])[counts[:, at]]) if len(at) else 0.0
    best = max(fits, key=fits.get)
    if fits[best] < 0.9:
        return "they are no shift of the inputs"
    names = {
        1: "the others are",
        0: "they are the token itself, which the model is given",
        -1: "they are the token before",
    }
    return names.get(best, f"they are the token {abs(best)} positions {'later' if best > 0 else 'before'}")


def _documents(length: int, row: int) -> list[slice]:
    """Returns how a row is cut: documents of different lengths, and padding, which comes last.

    In row 0 the second begins where patterns of most strides begin anew, in row 1 where they do not.
    """
    first, padding = length * (5 - row) // 12 + 1, min(5, length // 4)
    if row == 0:
        first -= first % next(unit for unit in (48, 12, 1) if unit <= first)
        ends = [0, first, first + length // 4, length - padding, length]
    else:
        ends = [0, first | 1, length - padding, length]
    return [slice(a, b) for a, b in itertools.pairwise(ends) if b > a]


def _placed(documents: Sequence[slice]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (positions, segments) [L] of a row; the last slice is padding."""
    positions = np.concatenate([np.arange(one.stop - one.start) for one in documents])
    segments = np.repeat(np.arange(1, len(documents) + 1), [one.stop - one.start for one in documents])
    positions[documents[-1]], segments[documents[-1]] = -1, 0
    return positions, segments


def _require_blind(tolerance: float, before: np.ndarray, after: np.ndarray, cuts: np.ndarray) -> None:
    """Raises Failed if losses [ROWS, L] up to the cut of their row differ; tokens after it did."""
    for row, cut in enumerate(cuts):
        ours, theirs = before[row, : cut + 1], after[row, : cut + 1]
        if (wrong := _beyond(tolerance, ours, theirs)).any():
            raise Failed(
                f"the future leaks: changing the tokens after position {cut} changed the losses at "
                f"{_positions(wrong[None])}, by up to {_worst(ours, theirs):.2g} nats"
            )


def _beyond(tolerance: float, expected, found):
    """Returns where two losses differ by more than the tolerance; one that is not finite does."""
    with np.errstate(invalid="ignore"):
        return ~(np.abs(expected - found) <= tolerance * np.maximum(1.0, np.abs(expected)))


def _worst(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.max(np.abs(expected - found)))


def _positions(wrong: np.ndarray) -> str:
    """Returns "positions 3, 4, 5 and 20 more" of the columns of [rows, L] in which something is True."""
    found = np.flatnonzero(wrong.any(axis=0))
    return f"position{'s' if len(found) > 1 else ''} {_some([str(at) for at in found])}"


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
