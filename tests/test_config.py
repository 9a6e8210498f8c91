"""Configs, overrides and mutations: what is accepted, and how a mistake is named."""

import dataclasses
import pathlib

import pytest

from foundry_jax import mutate
from foundry_jax.config import LOSSES, OPTIMIZERS, SCHEDULES, load, load_dict, set_values, to_flat_dict
from foundry_jax.errors import UserError
from foundry_jax.model import transformer
from foundry_jax.model.config import BIASES, EMBEDDINGS, PLACEMENTS, QK_NORMS
from foundry_jax.model.mask import SPARSE
from foundry_jax.model.mlp import MLPS, ROUTERS
from foundry_jax.model.norm import NORMS
from foundry_jax.model.position import POSITIONS, ROPE_SCALINGS
from tests.conftest import ROOT

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("[a-z]*.py"))
TINY = "configs/tiny.py"


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads_and_has_fewer_than_90_keys(path):
    assert len(to_flat_dict(load(path))) < 90


def test_the_baseline_is_the_originals():
    c = load("configs/baseline.py")
    m, o = c.model, c.optimizer
    assert (m.num_layers, m.num_heads, m.num_kv_heads, m.model_dim, m.context_length) == (6, 6, 2, 384, 256)
    assert (c.data.batch_size, c.num_steps, o.warmup_steps) == (64, 5000, 100)
    assert (o.learning_rate, o.min_learning_rate, o.schedule) == (6e-4, 6e-5, "cosine")
    assert (o.weight_decay, o.beta1, o.beta2, o.clip_norm, o.ema_decay) == (0.1, 0.9, 0.95, 1.0, 0.9999)


@pytest.mark.parametrize(
    ("preset", "expected"), [("cpu", (4, 4, 128, 64, 12, 2000, 0.0)), ("gpu", (6, 6, 384, 256, 64, 5000, 0.2))]
)
def test_shakespeare_char_has_nanogpts_two_budgets(preset, expected):
    c = load(f"configs/shakespeare_char.py:{preset}")
    m = c.model
    found = (m.num_layers, m.num_heads, m.model_dim, m.context_length, c.data.batch_size, c.num_steps, m.dropout)
    assert found == expected


def test_mutations_and_overrides_combine_and_the_override_wins():
    c = load(f"{TINY}:mla,lr=3e-4,adam_betas=0.8:0.99", ["optimizer.learning_rate=6e-4", "model.tie_embeddings=false"])
    assert c.model.attention == "mla"
    assert not c.model.tie_embeddings
    assert (c.optimizer.learning_rate, c.optimizer.beta1, c.optimizer.beta2) == (6e-4, 0.8, 0.99)


def test_text_that_yaml_would_not_read_as_a_number_becomes_a_float():
    config = load_dict(TINY)
    assert set_values(config, {"optimizer.learning_rate": "6e-4"}).optimizer.learning_rate == 6e-4
    config.optimizer.unlock()
    assert load(TINY, ["optimizer.epsilon=1e-9"]).optimizer.epsilon == 1e-9


def test_a_bare_mutation_and_an_lr_keep_the_minimums_ratio_to_the_peak():
    parent, child = load(TINY), load(f"{TINY}:lr=1e-4")
    ratio = parent.optimizer.min_learning_rate / parent.optimizer.learning_rate
    assert child.optimizer.min_learning_rate == pytest.approx(1e-4 * ratio)


def test_zero_sizes_are_derived():
    m = load("configs/baseline.py").model
    assert (m.head_dim, m.mlp_dim) == (64, 1024)
    assert load("configs/shakespeare_char.py").model.num_kv_heads == 4


MISTAKES = [
    ("configs/tinny.py", [], r"No config file 'configs/tinny.py'; try --config=configs/tiny.py"),
    (f"{TINY}:mlla", [], "Unknown variant or mutation 'mlla'. Did you mean 'mla'"),
    (f"{TINY}:lr", [], "Mutation 'lr' needs a value: lr=peak"),
    (f"{TINY}:lr=fast", [], "lr='fast' must be a number such as 3e-4"),
    (f"{TINY}:lrr=1", [], "Unknown mutation 'lrr'. Did you mean 'lr'"),
    (f"{TINY}:adam_betas=0.9", [], "Mutation 'adam_betas' takes beta1:beta2, not '0.9'"),
    (f"{TINY}:attention=gpa", [], "Unknown attention variant 'gpa'. Did you mean"),
    (f"{TINY}:activation=gleu", [], "Unknown activation 'gleu'. Did you mean"),
    (f"{TINY}:norm=rms", [], "Unknown norm 'rms'. Did you mean 'rmsnorm'"),
    (f"{TINY}:norm_placement=mid", [], "Unknown placement of norms 'mid'.*Choose from: post, pre, sandwich"),
    (f"{TINY}:position=ropes", [], "Unknown position 'ropes'. Did you mean 'rope'"),
    (f"{TINY}:rope_scaling=yran", [], "Unknown scaling of rotary frequencies 'yran'. Did you mean 'yarn'"),
    (f"{TINY}:embedding=big", [], "Unknown embedding 'big'.*Choose from: normed, plain, scaled"),
    (f"{TINY}:bias=kv", [], "Unknown place of biases 'kv'. Did you mean 'qkv'"),
    (f"{TINY}:qk_norm=heads", [], "Unknown extent of the QK-norm 'heads'. Did you mean 'head'"),
    (f"{TINY}:sparse=stride", [], "Unknown sparse pattern 'stride'. Did you mean 'strided'"),
    (f"{TINY}:moe=softmx", [], "Unknown router 'softmx'. Did you mean 'softmax'"),
    (f"{TINY}:sliding_window=0", [], "model.window=0 must be a finite number at least 1"),
    (f"{TINY}:sliding_window=many", [], "model.window='many' must be a whole number, not text"),
    (f"{TINY}:depth=x", [], "depth='x' must be a whole number"),
    (f"{TINY}:pattern=SSL,depth=4", [], "depth=4 must be a positive multiple of the 3 letters .*; try 3 or 6"),
    (f"{TINY}:width=200", [], "width=200 must be a positive multiple of 64, .*; try 192 or 256"),
    (f"{TINY}:mha,width=0", [], "width=0 must be a positive multiple of 32, .*; try 32 or 64"),
    (f"{TINY}:schedule=cosin", [], "Unknown schedule 'cosin'. Did you mean 'cosine'"),
    (f"{TINY}:optimizer=adam", [], "Unknown optimizer 'adam'. Did you mean 'adamw'"),
    (f"{TINY}:batch_size=2.5", [], "data.batch_size='2.5' must be a whole number, not text"),
    ("configs/shakespeare_char.py:tpu", [], "Unknown preset of configs/shakespeare_char.py 'tpu'. Did you mean"),
    (TINY, ["optimizer.learning_rat=1"], "Unknown config key 'optimizer.learning_rat'. Did you mean 'optimizer.lea"),
    (TINY, ["optimiser.learning_rate=1"], "Unknown config key 'optimiser'. Did you mean 'optimizer'"),
    (TINY, ["optimizer=1"], "optimizer is a section; set one of its keys"),
    (TINY, ["seed.x=1"], "seed is a value, not a section: 'seed.x' names no key"),
    (TINY, ["seed"], "Override 'seed' must look like optimizer.learning_rate=3e-4"),
    (TINY, ["num_steps=8.5"], "num_steps='8.5' must be a whole number"),
    (TINY, ["num_steps=0"], "num_steps=0 must be a finite number between 1 and"),
    (TINY, ["model.tie_embeddings=maybe"], "model.tie_embeddings='maybe' must be true or false"),
    (TINY, ["optimizer.learning_rate=nan"], "optimizer.learning_rate=nan must be a finite number between 0 and 1000"),
    (TINY, ["optimizer.learning_rate=-1"], "optimizer.learning_rate=-1.0 must be a finite number between 0 and 1000"),
    (TINY, ["optimizer.learning_rate=inf"], "optimizer.learning_rate=inf must be a finite number"),
    (
        TINY,
        ["optimizer.schedule=step"],
        "Unknown optimizer.schedule 'step'. .*Choose from: constant, cosine, linear, wsd",
    ),
    (TINY, ["optimizer.schedule=(wsd)"], "Unknown optimizer.schedule ''. Choose from: constant, cosine, linear, wsd"),
    (TINY, ["optimizer.schedule=wsd(1.5)"], "optimizer.schedule=wsd: decay_fraction=1.5 must be a finite number betw"),
    (TINY, ["optimizer.schedule=wsd(decay=0.1)"], "Unknown number of optimizer.schedule=wsd 'decay'.*decay_fraction"),
    (TINY, ["optimizer.decay_fraction=0.1"], "Unknown config key 'optimizer.decay_fraction'"),
    (f"{TINY}:schedule=cosine:0.1", [], r"optimizer.schedule='cosine\(0.1\)' has 1 numbers, but cosine takes 0"),
    (f"{TINY}:schedule=wsd:all", [], r"optimizer.schedule='wsd\(all\)' must be a name, or a name with numbers"),
    (TINY, ["optimizer.beta2=1"], "optimizer.beta2=1.0 must be a finite number between 0 and"),
    (TINY, ["optimizer.accumulation_steps=3"], "data.batch_size=16 must be a multiple of optimizer.accumulation_s"),
    (TINY, ["model.num_heads=5"], r"model.num_heads=5 must divide model.model_dim=128 .* \[1, 2, 4, 8, 16, 32, 64"),
    (TINY, ["model.dtype=fp8"], "model.dtype='fp8' must be one of float32, bfloat16"),
    (TINY, ["model.remat=some"], "model.remat='some' must be one of none, dots, full"),
    (TINY, ["model.dropout=1"], "model.dropout=1.0 must be a finite number between 0 and 0.999"),
    (TINY, ["sharding.strategy=zero"], "sharding.strategy='zero' must be one of auto, none, ddp, fsdp"),
    (TINY, ["data.validation=random"], "Unknown data.validation 'random'. Choose from: document, tail"),
    (TINY, ["data.validation=tail(0.9)"], "fraction=0.9 must be a finite number between 0.0001"),
]


@pytest.mark.parametrize(("spec", "overrides", "message"), MISTAKES)
def test_a_mistake_is_named_in_one_line(spec, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load(spec, overrides)
    assert "\n" not in str(caught.value)


def test_a_key_that_a_config_file_invents_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import tiny\n"
        "def get_config(arg=''):\n"
        "    c = tiny.get_config()\n    c.model.unlock()\n    c.model.num_layer = 3\n    return c\n"
    )
    with pytest.raises(UserError, match="Unknown config key 'model.num_layer'. Did you mean 'model.num_layers'"):
        load(str(path))


def test_a_config_file_without_get_config_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("")
    with pytest.raises(UserError, match=r"must define get_config\(arg: str = ''\); see configs/forkme.py"):
        load(str(path))


def test_names_that_the_mutations_know_are_those_of_the_tables():
    tables = {
        "sparse": SPARSE, "activation": MLPS, "norm": NORMS, "norm_placement": PLACEMENTS, "position": POSITIONS,
        "bias": BIASES, "qk_norm": QK_NORMS, "moe": ROUTERS, "rope_scaling": ROPE_SCALINGS, "embedding": EMBEDDINGS,
        "loss": LOSSES, "schedule": SCHEDULES, "optimizer": OPTIMIZERS,
    }  # fmt: skip
    of_data = {"conversation_format", "packing", "curriculum", "data_filter"}  # test_data_mutations.py
    assert set(tables) == set(mutate.CHOICES) - {"attention"} - of_data
    for mutation, table in tables.items():
        renamed = {"nope": "none"} if mutation == "position" else {}
        names = {renamed.get(name, name) for name in mutate.CHOICES[mutation]}
        assert names == set(table) - ({"none"} if mutation == "moe" else set()), mutation


@pytest.mark.parametrize(
    "argument",
    [
        name if mutation in mutate.VARIANTS else f"{mutation}={name}"
        for mutation, names in mutate.CHOICES.items()
        for name in names
        if name not in ("dpo", "ipo")  # they need a file of pairs
    ],
)
def test_every_variant_is_a_config_argument_and_one_model(argument):
    transformer.check(load(f"{TINY}:{argument}").model)


@pytest.mark.parametrize("name", MLPS)
def test_swapping_the_activation_keeps_the_parameters_whether_the_width_is_given_or_derived(name):
    for parent in ("", "mlp_dim=96,"):
        sizes = {load(f"{TINY}:{parent}{swap}").model for swap in ("swiglu", name)}
        assert len({transformer.num_params(dataclasses.replace(m, vocab_size=100)) for m in sizes}) == 1
    assert load(f"{TINY}:{name},mlp_dim=100").model.mlp_dim == 100


def test_width_keeps_the_head_dim_and_the_key_value_heads():
    m = load(f"{TINY}:width=256").model
    assert (m.model_dim, m.num_heads, m.head_dim, m.num_kv_heads) == (256, 8, 32, 2)
    m = load(f"{TINY}:mha,width=160").model
    assert (m.model_dim, m.num_heads, m.head_dim, m.num_kv_heads) == (160, 5, 32, 5)


def test_experts_have_the_active_parameters_of_the_mlp_they_replace():
    sizes = {
        x: dataclasses.replace(load(f"{TINY}:{x}").model, vocab_size=2048) for x in ("gqa", "moe", "moe=softmax:16:4")
    }
    active = {name: transformer.num_active_params(model) for name, model in sizes.items()}
    assert active["moe"] == pytest.approx(active["gqa"], rel=0.01)
    assert active["moe=softmax:16:4"] == pytest.approx(active["gqa"], rel=0.01)
    assert transformer.num_params(sizes["moe"]) > 2 * transformer.num_params(sizes["gqa"])


def test_commas_inside_a_call_do_not_end_a_mutation():
    m = load(f"{TINY}:rope_scaling=yarn(factor=4, original_length=64),lr=1e-3,moe").model
    assert m.rope_scaling == "yarn(factor=4, original_length=64)"
    assert m.moe == "softmax(experts=8, top_k=2)"


def test_a_bare_name_means_one_thing():
    names = [name for variants in mutate.VARIANTS.values() for name in variants]
    assert len(names) == len(set(names))
    parent = load_dict(TINY)
    for name in set(names) & set(mutate.MUTATIONS):  # which add numbers to the variant of that name
        mutation, values = mutate.parse(name)
        assert mutate.call(name, parent) == mutate.call(mutation, parent, *values), name


VALUES = {
    "dpo": "pairs.jsonl:0.2", "mla": "24:40",
    "activation": "gelu", "adam_betas": "0.8:0.99", "attention": "mla", "batch_size": "8", "bias": "qkv", "depth": "6",
    "embedding": "scaled", "loss": "focal:1.5", "lora_rank": "8", "mlp_dim": "96", "moe": "sigmoid:4:2",
    "norm": "layernorm", "norm_placement": "post", "optimizer": "lion", "pattern": "SL", "position": "alibi",
    "qk_norm": "head", "rope_scaling": "yarn:4:64", "rope_theta": "500000", "schedule": "wsd:0.1",
    "sliding_window": "16", "softcap": "30", "sparse": "fixed:8:2", "steps": "9", "tie_embeddings": "false",
    "warmup": "7", "width": "192",
    "conversation_format": "chatml", "data_filter": "exact", "packing": "first_fit", "curriculum": "length",
    "constitution": "pairs.jsonl:0.2",
}  # fmt: skip


@pytest.mark.parametrize("name", mutate.MUTATIONS)
def test_a_mutation_changes_only_the_keys_it_returns_and_never_its_argument(name):
    parent = load_dict(TINY)
    before = parent.to_json()
    value = VALUES.get(name, "0.25")
    overrides = mutate.call(name, parent, *value.split(":"))
    child = mutate.apply(parent, f"{name}={value}")
    assert parent.to_json() == before
    flat = {mode: _flat(config) for mode, config in (("parent", parent), ("child", child))}
    changed = {key for key in flat["parent"] if flat["parent"][key] != flat["child"][key]}
    assert changed and changed <= set(overrides)


def _flat(config, prefix=""):
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return flat


@pytest.mark.parametrize("name", mutate.MUTATIONS)
def test_every_mutation_says_what_it_does(name):
    assert mutate.MUTATIONS[name].__doc__


def test_every_key_of_the_baseline_is_explained():
    lines = pathlib.Path("configs/baseline.py").read_text().splitlines()
    keys = [line for line in lines if line.strip().startswith("c.") and "ConfigDict()" not in line]
    assert len(keys) == len(to_flat_dict(load("configs/baseline.py")))
    bare = [line.strip() for line in lines if line.strip().startswith("c.") and "#" not in line]
    assert [line for line in bare if "ConfigDict()" not in line] == []
