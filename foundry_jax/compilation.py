"""From a program and a plan to executables; the persistent cache, and how much compiling was done."""

import collections
import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from foundry_jax.optimizer import Hyperparameters, abstract_hyperparameters
from foundry_jax.sharding import Plan
from foundry_jax.train_step import (
    Program,
    TrainState,
    eval_step,
    init_base,
    init_state,
    state_of,
    train_step,
    unbox,
)

# LLVM level 2 instead of 3: programs compile in 0.64 of the time and run as fast (configs/tiny.py: 3.4 s against 5.2;
# a step 0.22 s against 0.23 s; 2 cores, jax 0.10.2, 2026-11).
CPU_OPTIONS = {"xla_backend_optimization_level": 2}

_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_counts: collections.Counter[str] = collections.Counter()


def enable_cache() -> pathlib.Path:
    """Switches the persistent cache on and starts counting; returns its folder.

    The folder is $JAX_COMPILATION_CACHE_DIR, else ~/.cache/foundry_jax/compilation. Everything that takes 0.1 s
    or more is kept: a run's few programs, not each of its one-line helpers.
    """
    default = pathlib.Path.home() / ".cache" / "foundry_jax" / "compilation"
    folder = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or default)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if not _counts:
        _counts.update(hits=0, misses=0, compiles=0)
        jax.monitoring.register_event_listener(_count_event)
        jax.monitoring.register_event_duration_secs_listener(_count_compile)
    return folder


def counts() -> dict[str, int]:
    """Returns how many programs came from the cache, were not in it, and how many were built in all."""
    return dict(_counts)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a step takes, as ShapeDtypeStructs laid out by a plan."""

    state: TrainState
    batch: dict[str, Any]
    hyper: Hyperparameters
    base: dict  # {} where all parameters are trained


@functools.lru_cache(maxsize=8)
def _boxed_init(program: Program):
    """Returns init_state as one jitted function, so that it is traced once for its shapes and for its program."""
    return jax.jit(functools.partial(init_state, program))


@functools.lru_cache(maxsize=8)
def _boxed_base(program: Program):
    """Returns init_base in the same way."""
    return jax.jit(functools.partial(init_base, program))


def _options() -> dict[str, int] | None:
    return CPU_OPTIONS if jax.default_backend() == "cpu" else None


def _count_event(event: str, **_: object) -> None:
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1


def _count_compile(event: str, _: float, **__: object) -> None:
    if event == _COMPILE_EVENT:
        _counts["compiles"] += 1


@functools.lru_cache(maxsize=8)
def compile_init(program: Program, plan: Plan):
    """Returns the compiled hyperparameters -> state at step 0. Call it within plan.context()."""
    return _compile_drawing(_boxed_init(program), abstract_inputs(program, plan, (1, 1)), "state")


@functools.lru_cache(maxsize=8)
def compile_base(program: Program, plan: Plan):
    """Returns the compiled hyperparameters -> new parameters under the adapters. Call it within plan.context()."""
    return _compile_drawing(_boxed_base(program), abstract_inputs(program, plan, (1, 1)), "base")


def _compile_drawing(boxed, inputs: Inputs, part: str):
    draw = jax.jit(lambda hyper: unbox(boxed(hyper)), out_shardings=_shardings(getattr(inputs, part)))
    return draw.lower(inputs.hyper).compile(_options())


@functools.lru_cache(maxsize=8)
def compile_start(program: Program, plan: Plan):
    """Returns the compiled (parameters, hyperparameters) -> state at step 0; the parameters are donated."""
    inputs = abstract_inputs(program, plan, (1, 1))
    start = jax.jit(functools.partial(state_of, program), donate_argnums=0, out_shardings=_shardings(inputs.state))
    return start.lower(inputs.state.params, inputs.hyper).compile(_options())


@functools.lru_cache(maxsize=8)
def compile_train_step(program: Program, plan: Plan, batch_shape: tuple[int, ...]):
    """Returns the compiled step (state, batch, hyperparameters, base) -> (state, metrics); the state is donated.

    Equal programs share one executable, whatever their hyperparameters. Call it within plan.context().
    """
    inputs = abstract_inputs(program, plan, batch_shape)
    outputs = (_shardings(inputs.state), None)
    step = jax.jit(functools.partial(train_step, program), donate_argnums=0, out_shardings=outputs)
    return step.lower(inputs.state, inputs.batch, inputs.hyper, inputs.base).compile(_options())


@functools.lru_cache(maxsize=8)
def compile_population_step(program: Program, plan: Plan, batch_shape: tuple[int, ...], size: int):
    """Returns the compiled step of so many runs at once: all that compile_train_step's takes, with an axis of runs
    before the others. The plan must be one of one device."""
    assert plan.num_devices == 1, plan
    inputs = abstract_inputs(program, plan, batch_shape)
    one = (inputs.state, inputs.batch, inputs.hyper, inputs.base)
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), one)
    step = jax.jit(jax.vmap(functools.partial(train_step, program)), donate_argnums=0)
    return step.lower(*many).compile(_options())


@functools.lru_cache(maxsize=8)
def compile_eval_step(program: Program, plan: Plan, batch_shape: tuple[int, ...], *, packed: bool = False):
    """Returns the compiled (parameters, batch, hyperparameters, base) -> (nats, targets) of each sequence.

    They are whole on every device. Call it within plan.context().

    Args:
        packed: of the batches that are evaluated, whatever those of training are.
    """
    program = dataclasses.replace(program, packed=packed)
    inputs = abstract_inputs(program, plan, batch_shape)
    step = jax.jit(functools.partial(eval_step, program), out_shardings=_everywhere(plan))
    return step.lower(inputs.state.params, inputs.batch, inputs.hyper, inputs.base).compile(_options())


@functools.lru_cache(maxsize=8)
def abstract_inputs(program: Program, plan: Plan, batch_shape: tuple[int, ...]) -> Inputs:
    """Returns what a step takes. A batch is of sequences (B, L), or of pairs (P, 2, L): see data/preferences.py."""
    hyper = abstract_hyperparameters()
    array = functools.partial(jax.ShapeDtypeStruct, sharding=plan.batch_sharding())
    batch = {"inputs": array(batch_shape, np.int32), "targets": array(batch_shape, np.int32)}
    batch["weights"] = array(batch_shape, np.float32)
    if program.packed or len(batch_shape) == 3:
        batch["positions"] = array(batch_shape, np.int32)
    if len(batch_shape) == 3:
        batch["reference"] = array(batch_shape[:2], np.float32)
    elif program.packed:
        batch["segments"] = array(batch_shape, np.int32)
    state, base = (_laid_out(jax.eval_shape(init(program), hyper), plan) for init in (_boxed_init, _boxed_base))
    return Inputs(state, batch, hyper, base)


def _laid_out(boxed, plan: Plan):
    """Returns the shapes of a boxed tree with the places that the plan gives them."""
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, unbox(boxed), plan.shardings(boxed))


def _everywhere(plan: Plan):
    """Returns the layout of what is whole on every device."""
    return plan.shardings(jax.ShapeDtypeStruct((), np.float32))


def _shardings(abstract):
    return jax.tree.map(lambda x: x.sharding, abstract)
