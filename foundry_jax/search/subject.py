"""A contestant as the gate sees it: its model and its programs, on one device, with parameters that hide nothing.

The programs are those of train_step.py, for two sequences: one after the other, they are most of what the gate costs,
so there are four, and every question is put to them as another batch. A model too large for one device cannot be asked.
"""

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax import compilation, sharding
from foundry_jax.config import Config
from foundry_jax.model import transformer
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.lora import scaled
from foundry_jax.model.mask import Placement
from foundry_jax.model.transformer import Transformer
from foundry_jax.optimizer import hyperparameters
from foundry_jax.train_step import Program, eval_step, gradients

ROWS = 2
ENOUGH = 256  # tokens: from here on contexts are shortened where that changes nothing but the length
VECTOR_STD = 0.2  # of what is added to vectors of parameters
# They run a few times: LLVM level 0 compiles those of configs/tiny.py in 2.1 s, level 2 in 3.6 s (2 cores, jax 0.10.2).
CPU_OPTIONS = {"xla_backend_optimization_level": 0}


class Subject:
    """One config with known vocabulary, as it is trained; `exact()` is the same in float32.

    params and base are random, well away from zero: a new model may hide a leak behind factors that begin at zero, as
    adapters do, or behind attention that is still all but uniform. `fresh` are those that training starts with.
    """

    def __init__(self, config: Config):
        """Draws the parameters.

        Raises:
            UserError: the config does not fit together.
        """
        self.model, self.program = config.model, Program.of(config)
        if self.program.accumulation_steps > ROWS:
            self.program = dataclasses.replace(self.program, accumulation_steps=ROWS)
        self.hyper = hyperparameters(config).replace(dropout=np.float32(0), lora_dropout=np.float32(0))
        self.precision: str | None = None
        self.length = length_of(config.model)
        self.fresh, fresh_base = _draw(config)
        self.params, self.base = spread(self.fresh, seed=0), spread(fresh_base, seed=1)
        self._programs: dict[Any, Any] = {}

    def exact(self) -> "Subject":
        """Returns the subject with products in float32, whatever it is trained in: what rounds alike can be compared.

        On a CPU a subject in float32 is that already.
        """
        if self.is_exact:
            return self
        other = copy.copy(self)
        other.model, model = (dataclasses.replace(x, dtype="float32") for x in (self.model, self.program.model))
        other.program = dataclasses.replace(self.program, model=model)
        other.precision, other._programs = "highest", {}
        return other

    @property
    def is_exact(self) -> bool:
        """Whether products are in float32; GPUs and TPUs round their operands unless they are told not to."""
        return self.model.dtype == "float32" and (self.precision == "highest" or jax.default_backend() == "cpu")

    def nll(self, inputs, targets, positions=None, segments=None) -> np.ndarray:
        """Returns -log p of every target in nats, [ROWS, L] float32: the statistics of training and evaluation.

        Without positions the rows are whole sequences, as in training on text; with them documents and padding, as in
        training on pairs and packed text.
        """
        batch = {"inputs": inputs, "targets": targets, "weights": np.ones(inputs.shape, np.float32)}
        if positions is not None:
            batch |= {"positions": positions, "segments": segments}
        return np.asarray(self._run(functools.partial(_nll, self.program), self.params, batch, self.hyper, self.base))

    def decoded_nll(self, inputs, targets, positions, *, steps: int) -> np.ndarray:
        """Returns the same by way of the cache: the last `steps` columns one by one, those before them at once.

        Rows may begin with padding, at positions -1.
        """
        decode = functools.partial(_decoded_nll, self.program, steps, self.length)
        return np.asarray(self._run(decode, self.params, inputs, targets, positions, self.hyper, self.base))

    def gradients(self, params: dict, batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Returns ({path: gradient}, metrics) of a training step without dropout."""
        step = functools.partial(_gradients, self.program)
        grads, metrics = jax.device_get(self._run(step, params, batch, self.hyper, self.base))
        paths = jax.tree_util.tree_leaves_with_path(grads)
        return {"/".join(key.key for key in path): leaf for path, leaf in paths}, metrics

    def _run(self, function: functools.partial, *arguments):
        """Returns function(*arguments), compiled for their shapes."""
        shapes = jax.tree.map(np.shape, arguments)
        key = function.func, function.args, str(shapes)
        if key not in self._programs:
            precise = jax.default_matmul_precision(self.precision) if self.precision else contextlib.nullcontext()
            with precise:
                lowered = jax.jit(function).lower(*arguments)
            self._programs[key] = lowered.compile(CPU_OPTIONS if jax.default_backend() == "cpu" else None)
        return self._programs[key](*arguments)


def length_of(model: ModelConfig) -> int:
    """Returns how many tokens the gate looks at: context_length, or fewer if attention then works as it does there.

    That is: every letter's mask hides something if it does at context_length, and is computed in the same layouts.
    """
    length = ENOUGH
    while length < model.context_length:
        specs = [transformer.layer_mask(model, letter) for letter in transformer.letters_of(model)]
        if all(_works_alike(spec, length, model.context_length) for spec in specs):
            return length
        length *= 2
    return model.context_length


def _works_alike(spec, length: int, whole: int) -> bool:
    hides = lambda size: int(spec.visible_keys(size)[-1]) < size  # noqa: E731
    return spec.arrangement(length) == spec.arrangement(whole) and hides(length // 2) == hides(whole)


def spread(tree, seed: int):
    """Returns the tree with random numbers added: to a matrix about as much as keeps the size of what it multiplies.

    Drawn by numpy: to compile a program that draws them takes longer than all that is asked of the model.
    """
    rng = np.random.default_rng(seed)

    def moved(leaf):
        std = VECTOR_STD if leaf.ndim < 2 else leaf.size**-0.25  # of a square matrix, the root of its fan-in
        noise = rng.random(leaf.shape, np.float32)
        return jnp.asarray(np.asarray(leaf) + (noise - 0.5) * np.float32(12**0.5 * std))

    return jax.tree.map(moved, tree)


def _draw(config: Config) -> tuple[dict, dict]:
    """Returns (what is trained, what is under it) at step 0, by the programs that training uses, on one device."""
    program, hyper = Program.of(config), hyperparameters(config)
    alone = dataclasses.replace(config.sharding, strategy="auto", data=0, fsdp=0, tensor=0)
    plan = sharding.plan(transformer.num_params(config.model), 1, alone)
    with plan.context():
        base = compilation.compile_base(program, plan)(hyper) if program.lora_rank else {}
        return compilation.compile_init(program, plan)(hyper).params, base


def _nll(program, params, batch, hyper, base):
    """Returns [B, L]: the sum of the losses that eval_step returns grows with a target's weight by the target's own."""

    def total(weights):
        return jnp.sum(eval_step(program, params, batch | {"weights": weights}, hyper, base)[0])

    return jax.grad(total)(batch["weights"])


def _decoded_nll(program, steps, length, params, inputs_BL, targets_BL, positions_BL, hyper, base):
    variables = {"params": params}
    if program.lora_rank:
        variables = {"params": base, "lora": scaled(params, hyper.lora_scale)}

    def read(cache, columns):
        inputs, targets, positions = columns
        logits_BLV, cache = Transformer(program.model).apply(variables, inputs, Placement(positions), cache)
        return cache, -jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), targets[..., None], axis=-1)[..., 0]

    columns = inputs_BL, targets_BL, positions_BL
    cache = transformer.init_cache(program.model, inputs_BL.shape[0], length)
    cache, first_BL = read(cache, [x[:, :-steps] for x in columns])
    _, rest_LB1 = jax.lax.scan(read, cache, [x[:, -steps:].T[..., None] for x in columns])
    return jnp.concatenate([first_BL, rest_LB1[..., 0].T], axis=1)


def _gradients(program, params, batch, hyper, base):
    grads, metrics = gradients(program, params, batch, hyper, base, jnp.zeros((), jnp.int32))
    return grads, {name: value for name, value in metrics.items() if name in ("loss", "cross_entropy")}
