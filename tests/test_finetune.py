"""Training adapters, and training that starts from a pretrained model."""

import dataclasses
import functools
import json
import logging

import jax
import numpy as np
import pytest

from foundry_jax import compilation, forecast, sharding, train, zoo
from foundry_jax.checkpoint import load_params
from foundry_jax.config import LoRAConfig, load
from foundry_jax.errors import Preempted, UserError
from foundry_jax.model import lora, transformer
from foundry_jax.model.stacking import restack
from foundry_jax.optimizer import hyperparameters
from foundry_jax.preemption import Preemption
from foundry_jax.runfolder import read_metrics
from foundry_jax.train_step import Program, eval_step, init_base, init_state, reference_step, train_step, unbox
from tests import checkpoints
from tests.processes import SMALL_TEXT, assert_bitwise_equal
from tests.test_sharding import SIZES, bytes_per_device
from tests.test_train_step import LENGTH, batch_of, pairs_of
from tests.variants import often, tiny

RANK = 3


LAYOUTS = [{"strategy": "fsdp"}, {"strategy": "fsdp", "data": 2, "tensor": 2}]


def config_of(argument="warmup=0,lr=1e-2", overrides=(), *, targets=".*", rank=RANK, dropout=0.0, alpha=6.0, **model):
    """Returns tiny.py with a much smaller model and adapters."""
    config = load(f"configs/tiny.py:{argument}", overrides)
    adapters = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, targets=targets, rslora=False)
    return dataclasses.replace(config, model=tiny(**model), lora=adapters)


@functools.cache
def programs(program):
    """Returns (training step, hyperparameters -> state and base)."""
    step = jax.jit(functools.partial(train_step, program))
    return step, jax.jit(lambda hyper: unbox((init_state(program, hyper), init_base(program, hyper))))


def begin(config):
    hyper = hyperparameters(config)
    step, init = programs(Program.of(config))
    return step, *init(hyper), hyper


def shapes_of(tree):
    return sorted(x.shape for x in jax.tree.leaves(tree))


def test_training_lowers_the_loss_and_changes_every_adapter_and_nothing_of_the_base():
    step, state, base, hyper = begin(config_of())
    before, first = jax.tree.map(np.array, base), state
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch_of(), hyper, base)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.2  # the embeddings, which are the output map too, stay as they were drawn
    jax.tree.map(np.testing.assert_array_equal, base, before)
    for path, change in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: a != b, state.params, first.params)
    ):
        assert change.any(), path


def test_what_is_trained_averaged_and_kept_by_the_optimizer_is_the_adapters():
    config = config_of(targets="attention")
    _, state, base, _ = begin(config)
    adapters = shapes_of(state.params)
    assert (
        shapes_of(state.ema_params) == shapes_of(state.opt_state[1].mu) == shapes_of(state.opt_state[1].nu) == adapters
    )
    assert sum(np.prod(shape) for shape in adapters) == forecast.num_trained_params(config)
    assert sum(x.size for x in jax.tree.leaves(base)) == transformer.num_params(config.model)


def test_the_base_is_what_a_run_without_adapters_begins_with_and_so_is_the_first_loss():
    config = config_of()
    whole = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0))
    (step, state, base, hyper), (whole_step, whole_state, nothing, _) = begin(config), begin(whole)
    jax.tree.map(np.testing.assert_array_equal, base, whole_state.params)
    assert nothing == {}
    loss, whole_loss = (
        f(s, batch_of(), hyper, b)[1]["loss"] for f, s, b in ((step, state, base), (whole_step, whole_state, {}))
    )
    assert float(loss) == float(whole_loss)


def test_no_number_of_the_adapters_recompiles_the_step():
    steps, losses = set(), set()
    for alpha, dropout in ((6.0, 0.1), (12.0, 0.1), (6.0, 0.3)):
        step, state, base, hyper = begin(config_of(alpha=alpha, dropout=dropout))
        for _ in range(2):  # at first there is nothing to scale
            state, metrics = step(state, batch_of(), hyper, base)
        steps.add(step)
        losses.add(float(metrics["loss"]))
    assert len(steps) == 1 and steps.pop()._cache_size() == 1
    assert len(losses) == 3
    assert Program.of(config_of()) != Program.of(config_of(dropout=0.1)) != Program.of(config_of(rank=4, dropout=0.1))


def test_rslora_weighs_by_the_root_of_the_rank():
    numbers = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": ".*"}
    assert (LoRAConfig(rslora=False, **numbers).scale, LoRAConfig(rslora=True, **numbers).scale) == (2, 8)
    assert hyperparameters(config_of(rank=4, alpha=6.0)).lora_scale == 1.5


def test_dropout_is_for_training_and_differs_from_step_to_step():
    config = config_of(dropout=0.5)
    step, state, base, hyper = begin(config)
    state, _ = step(state, batch_of(), hyper, base)
    repeated = state.replace(step=state.step + 1)
    one, two = (float(step(s, batch_of(), hyper, base)[1]["loss"]) for s in (state, repeated))
    nats, count = jax.jit(functools.partial(eval_step, Program.of(config)))(state.params, batch_of(), hyper, base)
    assert len({one, two, float(nats.sum() / count.sum())}) == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "changes", often([{"remat": "full"}, {"scan_layers": True, "remat": "dots"}], [{"remat": "full"}])
)
def test_scanned_or_recomputed_layers_train_the_same(changes):
    config = config_of(pattern="SL")
    other = config_of(pattern="SL", **changes)
    (step, state, base, hyper), (other_step, other_state, other_base, _) = begin(config), begin(other)
    jax.tree.map(np.testing.assert_array_equal, restack(other_base, other.model, config.model), base)
    for t in range(2):
        state, _ = step(state, batch_of(t), hyper, base)
        other_state, _ = other_step(other_state, batch_of(t), hyper, other_base)
    back = lora.restack(other_state.opt_state[1].mu, other.model, config.model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, state.opt_state[1].mu)


@pytest.mark.exhaustive
def test_accumulated_gradients_equal_those_of_the_whole_batch():
    whole = config_of()
    parts = dataclasses.replace(whole, optimizer=dataclasses.replace(whole.optimizer, accumulation_steps=2))
    (step, state, base, hyper), (step_in_parts, *_) = begin(whole), begin(parts)
    (one, metrics), (two, others) = step(state, batch_of(), hyper, base), step_in_parts(state, batch_of(), hyper, base)
    assert float(metrics["grad_norm"]) == pytest.approx(float(others["grad_norm"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), one.opt_state[1].mu, two.opt_state[1].mu)


@pytest.mark.exhaustive
def test_a_router_under_adapters_stays_as_it_is():
    config = config_of(moe="sigmoid(experts=4, top_k=2, expert_dim=8, shared=1, bias_rate=0.5)")
    step, state, base, hyper = begin(config)
    after, metrics = step(state, batch_of(), hyper, base)
    assert jax.tree.structure(after.params) == jax.tree.structure(state.params)
    assert "router_load_max" in metrics


def test_at_step_0_nothing_is_preferred_to_the_base():
    config = config_of("warmup=0", ["loss.name=dpo", "data.preferences=x"], dropout=0.0)
    program = Program.of(config)
    step, state, base, hyper = begin(config)
    batch = {name: x for name, x in pairs_of().items() if name != "reference"}
    reference = jax.jit(functools.partial(reference_step, program))(state.params, batch, hyper, base)
    plain = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0))
    alone = jax.jit(functools.partial(reference_step, Program.of(plain)))(base, batch, hyper, {})
    np.testing.assert_array_equal(reference, alone)
    _, metrics = step(state, batch | {"reference": np.asarray(reference)}, hyper, base)
    assert float(metrics["loss"]) == np.log(np.float32(2))
    assert float(metrics["reward_margin"]) == 0 and float(metrics["reward_accuracy"]) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_train_adapters_as_one_does(layout):
    config = config_of(**SIZES | {"num_layers": 1}, rank=8)
    program, hyper, losses = Program.of(config), hyperparameters(config), []
    for devices, chosen in ((1, {}), (8, layout)):
        plan = sharding.plan(1, devices, dataclasses.replace(config.sharding, **chosen))
        with plan.context():
            state, base = (f(program, plan)(hyper) for f in (compilation.compile_init, compilation.compile_base))
            step, found = compilation.compile_train_step(program, plan, (8, LENGTH)), []
            for t in range(6):
                placed = {name: jax.device_put(x, plan.batch_sharding()) for name, x in batch_of(t % 2, rows=8).items()}
                state, metrics = step(state, placed, hyper, base)
                found.append(float(metrics["loss"]))
        losses.append(found)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0][-1] < losses[0][0]
    if layout == {"strategy": "fsdp"}:
        whole = sum(x.nbytes for x in jax.tree.leaves((base, state.params, state.opt_state)))
        assert bytes_per_device((base, state.params, state.opt_state)) == pytest.approx(whole / 8, rel=0.01)


@pytest.mark.exhaustive
def test_the_forecast_counts_gradients_moments_and_averages_of_adapters_only():
    config = config_of(**SIZES, rank=8)
    for strategy in ("ddp", "fsdp"):
        config = dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, strategy=strategy))
        plan = forecast.plan_of(config, 8)
        with plan.context():
            state, base = (
                f(Program.of(config), plan)(hyperparameters(config))
                for f in (compilation.compile_init, compilation.compile_base)
            )
        estimate, rows = forecast.memory(config, plan), forecast.param_table(config, plan)
        assert estimate.params == bytes_per_device(state.params) + bytes_per_device(base)
        assert estimate.params == sum(row.bytes_per_device for row in rows)
        assert estimate.gradients == estimate.ema == bytes_per_device(state.ema_params)
        assert estimate.optimizer == 2 * estimate.ema
    assert {"embed/embedding", "lora/block_0/attention/query/a"} <= {row.name for row in rows}


def test_rank_16_on_smollm2_trains_at_most_5_percent_of_the_parameters():
    config = load("configs/finetune.py:model=smollm2-135m")
    assert config.lora.rank == 16
    assert forecast.num_trained_params(config) <= 0.05 * transformer.num_params(config.model)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny pretrained model as a folder."""
    return checkpoints.write(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture
def finetune(source, tmp_path):
    """Returns a function that finetunes the model in this process, on all its devices."""

    def finetune(name, argument="", *overrides):
        mutations = f",{argument}" if argument else ""
        sizes = ["num_steps=8", "eval.every=4", "checkpoint.every=4", "model.context_length=32", "log.every=1"]
        config = load(f"configs/finetune.py:model={source}{mutations}", [*SMALL_TEXT, *sizes, *overrides])
        return train.run(config, tmp_path / name, quiet=True)

    return finetune


def params_of(source):
    return {path: np.asarray(zoo.open_source(source).read(path), np.float32) for path in zoo.open_source(source).shapes}


def trained(run, **options):
    """Returns the parameters in the newest checkpoint of a run, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(load_params(run / "checkpoints", **options).state)
    return {"/".join(key.key for key in path): x for path, x in leaves}


@pytest.mark.slow
def test_adapters_are_trained_on_the_pretrained_model_with_its_tokenizer(finetune, source, tmp_path):
    result = finetune("run", "lora_rank=4")
    assert result["num_params"] == sum(x.size for x in params_of(source).values())
    kept = trained(tmp_path / "run")
    assert result["num_trained_params"] == sum(x.size for x in kept.values()) < 0.5 * result["num_params"]
    assert {path.rpartition("/")[2] for path in kept} == {"a", "b"}
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl", "eval")
    assert rows[-1]["loss"] < rows[0]["loss"]
    own = json.loads((source / "tokenizer.json").read_text())["model"]
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())["model"] == own
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model.vocab_size"] == checkpoints.VOCAB


@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_parameters_start_from_the_pretrained_ones(finetune, source, tmp_path):
    """With a rate of 0 they, their average and so every evaluation stay what they were."""
    result = finetune("run", "lora_rank=0,lr=0")
    assert result["num_trained_params"] == result["num_params"]
    expected = params_of(source)
    unscanned = zoo.open_source(tmp_path / "run")
    for path, x in expected.items():
        np.testing.assert_array_equal(unscanned.read(path), x, err_msg=path)
    averaged = trained(tmp_path / "run", ema=True)
    for path, x in trained(tmp_path / "run").items():
        np.testing.assert_allclose(averaged[path], x, rtol=1e-6)
    assert finetune("adapters", "lora_rank=4,lr=0")["validation"]["loss"] == pytest.approx(
        result["validation"]["loss"], rel=1e-6
    )


def stopped_at(steps, monkeypatch, run):
    """Runs until each of some steps, stopping there, and then to the end."""
    for wanted in steps:
        with monkeypatch.context() as patch:
            patch.setattr(Preemption, "requested", lambda self, step, wanted=wanted: step == wanted)
            with pytest.raises(Preempted):
                run()
    run()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("argument", ["lora_rank=4,lora_dropout=0.2", "lora_rank=0"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(finetune, argument, tmp_path, monkeypatch):
    finetune("whole", argument)
    stopped_at([3, 6], monkeypatch, lambda: finetune("stopped", argument))
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_adapters_on_a_random_base_go_on_bit_for_bit(tmp_path, monkeypatch):
    config = load("configs/smoke.py:lora_rank=2", [*SMALL_TEXT, "num_steps=8", "eval.every=4"])
    train.run(config, tmp_path / "whole", quiet=True)
    stopped_at([5], monkeypatch, lambda: train.run(config, tmp_path / "stopped", quiet=True))
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_on_pairs_starts_at_the_pretrained_model(finetune, tmp_path, shared_data, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join((shared_data / "preferences" / "harmless.jsonl").read_text().splitlines(True)[:24]))
    for rank in (4, 0):
        run = functools.partial(
            finetune,
            f"pairs{rank}",
            f"lora_rank={rank},dpo",
            f"data.preferences={pairs}",
            f"data.cache_dir={tmp_path / 'cache'}",
        )
        stopped_at([5], monkeypatch, run)
        rows = read_metrics(tmp_path / f"pairs{rank}" / "metrics.jsonl", "train")
        assert (rows[0]["loss"], rows[0]["reward_margin"]) == (pytest.approx(np.log(2), abs=1e-6), 0)
    kept = list((tmp_path / "cache" / "references").glob("*.npz"))
    np.testing.assert_allclose(*(np.load(path)["train"] for path in kept), rtol=1e-6)
    assert caplog.text.count("Computing the reference") == 2


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_mutated_architecture_starts_from_the_pretrained_model(finetune, caplog):
    caplog.set_level(logging.INFO)
    result = finetune("run", "gqa_1kv,lora_rank=4")
    assert np.isfinite(result["validation"]["loss"])
    with pytest.raises(UserError, match="init.fresh=true"):
        finetune("mla", "mla,lora_rank=0")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_adapters_do_not_go_on_over_other_weights(finetune, tmp_path, monkeypatch):
    mine = checkpoints.write(tmp_path / "mine")
    run = functools.partial(finetune, "run", "", f"init.source={mine}")
    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "requested", lambda self, step: step == 3)
        with pytest.raises(Preempted):
            run()
    checkpoints.write(mine, checkpoints.tensors(seed=1))
    with pytest.raises(UserError, match="run began with weights of .*mine that are not those of .*mine now") as caught:
        run()
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_line(source, tmp_path, finetune):
    with pytest.raises(UserError, match=r"data.path is empty; data.source=text needs a file"):
        train.run(load(f"configs/finetune.py:model={source}"), tmp_path / "a")
    with pytest.raises(UserError, match="lora.targets='q_proj' is found in none of attention/query"):
        finetune("b", "", "lora.targets=q_proj")
    mute = checkpoints.write(tmp_path / "mute", tokenizer=False)
    with pytest.raises(UserError, match=r"There is no tokenizer in .*mute: set data.tokenizer"):
        finetune("c", "", f"init.source={mute}")
    for override, message in (
        ("lora.rank=-1", "lora.rank=-1 must be a finite number at least 0"),
        ("lora.dropout=0.1", "lora.dropout=0.1 has no meaning with lora.rank=0"),
        ("init.fresh=true", "init.fresh=true has no meaning without an init.source"),
    ):
        with pytest.raises(UserError, match=message):
            load("configs/tiny.py", [override])
