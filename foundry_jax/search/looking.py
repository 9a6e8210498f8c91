"""What there is to know of a contestant before it is trained: whether it can be built, what it costs, whether it leaks.

    {"status": "ok", "reason": null, "config": {...}, "program": "3fa1...", "validation_hash": "77ab...",
     "validation_tokens": 51200, "validation_bytes": 180000, "scores": {"mmlu": ["accuracy", ...]},
     "forecast": {"params": ..., ...}, "gate": [{"name": "causality", "passed": true, ...}]}

Contestants with equal "program" can be trained by one executable. A contestant that cannot be built, or does not pass
the gate, has the status "refused", and a reason.
"""

import dataclasses
import logging
import statistics
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from foundry_jax import compilation, data, forecast, sharding, train
from foundry_jax.config import Config, to_flat_dict
from foundry_jax.data.hashing import sha256_json
from foundry_jax.data_tools import TOOLS
from foundry_jax.errors import UserError
from foundry_jax.model import transformer
from foundry_jax.optimizer import hyperparameters
from foundry_jax.search import gate
from foundry_jax.search.matching import with_params
from foundry_jax.search.space import Contestant, settings
from foundry_jax.train_step import Program

TIMED_STEPS = 10
TIMED_SECONDS = 5.0  # no more than these, and at least two steps

if TYPE_CHECKING:
    from foundry_jax.tasks.in_loop import Scheduled

log = logging.getLogger(__name__)


def look_at(spec: str, contestant: Contestant, overrides: list[str], params: int | None) -> dict[str, Any]:
    """Returns what there is to know of a contestant, as the module says; `params` is the size it is brought to."""
    start = time.perf_counter()
    found: dict[str, Any] = {"status": "ok", "reason": None, "gate": []}
    try:
        config, corpus, tasks = prepare(settings(spec, contestant, overrides))
        if params is not None:
            config = with_params(config, params, lambda one: transformer.num_params(one.model))
        plan = forecast.plan_of(config, jax.device_count())
        train.require_even_batches(config, plan)
        batches = train.batches_of(config, corpus)
    except UserError as error:
        return found | {"status": "refused", "reason": str(error)}
    found |= {
        "config": to_flat_dict(config),
        "program": program_key(config, plan),
        "validation_hash": corpus.validation_hash,
        "validation_tokens": corpus.num_validation_tokens,
        "validation_bytes": corpus.validation_bytes,
        "scores": {task.label: list(task.task.metrics) for task in tasks},
    }
    found["gate"] = [dataclasses.asdict(check) for check in gate.check(config, first_batch(batches))]
    if failed := [check for check in found["gate"] if not check["passed"]]:
        reason = "; ".join(f"{check['name']}: {check['evidence']}" for check in failed)
        return found | {"status": "refused", "reason": f"It did not pass the gate. {reason}", "forecast": None}
    found["forecast"] = costs(config, plan, batches, corpus)
    log.info("%s: looked at in %.1f s.", contestant.name, time.perf_counter() - start)
    return found


def prepare(config: Config) -> "tuple[Config, data.Corpus, list[Scheduled]]":
    """Returns the config with its vocabulary known, its data, and its tasks; as train.run would have them.

    Raises:
        UserError: what train.run would raise before it starts.
    """
    transformer.check(config.model)
    Program.of(config)
    train.require_known_trackers(config)
    source = train.open_source(config)
    tasks = train.tasks_of(config)
    corpus = data.prepare(config.data, train.tokenizer_of(config, source), TOOLS)
    return train.with_vocabulary(config, train.vocab_size_of(config, corpus, source)), corpus, tasks


def program_key(config: Config, plan: sharding.Plan) -> str:
    """Returns a name of the executables that a run uses."""
    shapes = [config.batch_shape, config.eval.batch_size]
    return sha256_json([repr(Program.of(config)), plan.strategy, shapes, to_flat_dict(config)["sharding.fsdp"]])[:16]


def first_batch(batches: train.Batches) -> dict[str, np.ndarray]:
    """Returns the first training batch; without a reference, pairs of completions have one of zeros."""
    batch = batches.train.batch(0)
    if batch["inputs"].ndim == 3 and "reference" not in batch:
        batch |= {"reference": np.zeros(batch["inputs"].shape[:2], np.float32)}
    return batch


def costs(config: Config, plan: sharding.Plan, batches: train.Batches, corpus: data.Corpus) -> dict[str, Any]:
    """Returns what a run would cost: counted where that can be counted, the seconds measured on a few steps."""
    compile_seconds, step_seconds = time_steps(config, plan, batches)
    tokens_per_step = int(np.prod(config.batch_shape))
    flops_per_token = forecast.train_flops_per_token(config)
    validation = corpus.num_validation_tokens * transformer.flops_per_token(config.model)
    evaluations = 2 * -(-config.num_steps // config.eval.every)  # of raw and averaged parameters
    eval_seconds = validation / (tokens_per_step * flops_per_token) * step_seconds
    tokens = config.num_steps * tokens_per_step
    return {
        "params": transformer.num_params(config.model),
        "active_params": transformer.num_active_params(config.model),
        "trained_params": forecast.num_trained_params(config),
        "flops_per_token": flops_per_token,
        "kv_bytes_per_token": transformer.kv_bytes_per_token(config.model),
        "memory_bytes": forecast.memory(config, plan).total,
        "tokens_per_step": tokens_per_step,
        "step_seconds": step_seconds,
        "compile_seconds": compile_seconds,
        "eval_seconds": eval_seconds,
        "run_seconds": config.num_steps * step_seconds + evaluations * eval_seconds,
        "steps": config.num_steps,
        "tokens": tokens,
        "flops": tokens * flops_per_token,
    }


def time_steps(config: Config, plan: sharding.Plan, batches: train.Batches) -> tuple[float, float]:
    """Returns the seconds that compiling takes, and the median seconds of a step after the first."""
    program, hyper = Program.of(config), hyperparameters(config)
    start = time.perf_counter()
    with plan.context():
        step = compilation.compile_train_step(program, plan, config.batch_shape)
        base = compilation.compile_base(program, plan)(hyper) if program.lora_rank else {}
        state = compilation.compile_init(program, plan)(hyper)
        compile_seconds = time.perf_counter() - start
        batch = jax.device_put(first_batch(batches), plan.batch_sharding())
        seconds = []
        while len(seconds) < 3 or (len(seconds) <= TIMED_STEPS and sum(seconds[1:]) < TIMED_SECONDS):
            start = time.perf_counter()
            state, metrics = step(state, batch, hyper, base)
            jax.block_until_ready(metrics["loss"])
            seconds.append(time.perf_counter() - start)
    return compile_seconds, statistics.median(seconds[1:])
