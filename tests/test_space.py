"""From words to contestants."""

import subprocess
import sys

import pytest

from foundry_jax.config import load, to_flat_dict
from foundry_jax.errors import UserError
from foundry_jax.search import space
from foundry_jax.search.space import Contestant, contestants, settings, slug
from tests.conftest import ROOT

TINY = str(ROOT / "configs" / "tiny.py")


def asked(*words, spec=TINY, **options):
    """Returns {name: argument} of the contestants besides the incumbent."""
    incumbent, *others = contestants(spec, words, **options)
    assert incumbent == Contestant("incumbent", "")
    return {one.name: one.argument for one in others}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["attention", "mla", "gqa_1kv"], {"mla": "attention=mla", "gqa_1kv": "attention=gqa_1kv"}),
        (["attention", "mla,gqa_4kv"], {"mla": "attention=mla", "attention=gqa_4kv": "attention=gqa_4kv"}),
        (["lr", "3e-4", "1e-3"], {"lr=3e-4": "lr=3e-4", "lr=1e-3": "lr=1e-3"}),
        (
            ["attention=mla,gqa_1kv", "lr=3e-4,1e-3"],
            {
                "mla,lr=3e-4": "attention=mla,lr=3e-4",
                "mla,lr=1e-3": "attention=mla,lr=1e-3",
                "gqa_1kv,lr=3e-4": "attention=gqa_1kv,lr=3e-4",
                "gqa_1kv,lr=1e-3": "attention=gqa_1kv,lr=1e-3",
            },
        ),
        (["attention", "mla", "lr=1e-3"], {"mla,lr=1e-3": "attention=mla,lr=1e-3"}),
        (["mla", "moe"], {"mla": "attention=mla", "moe": "moe"}),
        (["mla", "lr=1e-3,2e-3"], {"mla": "attention=mla", "lr=1e-3": "lr=1e-3", "lr=2e-3": "lr=2e-3"}),
        (["moe", "softmax:4:2", "sigmoid"], {"moe=softmax:4:2": "moe=softmax:4:2", "moe=sigmoid": "moe=sigmoid"}),
        (["adam_betas=0.9:0.98,0.8:0.9"], {f"adam_betas={b}": f"adam_betas={b}" for b in ("0.9:0.98", "0.8:0.9")}),
        (
            ["rope_scaling", "linear:2", "yarn(factor=4, original_length=64)"],
            {
                "rope_scaling=linear:2": "rope_scaling=linear:2",
                "rope_scaling=yarn(factor=4, original_length=64)": "rope_scaling=yarn(factor=4, original_length=64)",
            },
        ),
        (
            ["rope_scaling=yarn(factor=4, original_length=64),linear:2", "norm=layernorm"],
            {
                "rope_scaling=yarn(factor=4, original_length=64),layernorm": (
                    "rope_scaling=yarn(factor=4, original_length=64),norm=layernorm"
                ),
                "rope_scaling=linear:2,layernorm": "rope_scaling=linear:2,norm=layernorm",
            },
        ),
    ],
)
def test_words_name_contestants(words, expected):
    assert asked(*words) == expected


def test_a_stack_adds_one_change_at_a_time():
    found = asked("mla", "norm=layernorm", "lr=1e-3", stack=True)
    assert list(found.values()) == ["attention=mla", "attention=mla,norm=layernorm",
                                    "attention=mla,norm=layernorm,lr=1e-3"]  # fmt: skip
    assert list(found) == ["mla", "mla,layernorm", "mla,layernorm,lr=1e-3"]


def test_a_contestant_has_the_argument_of_the_spec_and_its_own_and_overrides_win():
    spec, mla = f"{TINY}:norm=layernorm", Contestant("mla", "attention=mla")
    config = settings(spec, mla, ["num_steps=7"])
    assert to_flat_dict(config) == to_flat_dict(load(f"{TINY}:norm=layernorm,mla", ["num_steps=7"]))
    assert to_flat_dict(settings(TINY, Contestant("incumbent", ""))) == to_flat_dict(load(TINY))


def test_who_is_the_incumbent_or_another_one_is_refused():
    _, first, same, other = contestants(TINY, ["lr", "3e-3", "1e-3", "0.001"])
    assert first.refusal == "it is the incumbent: the config, or a --config override, says all of it already."
    assert same.refusal is None
    assert other.refusal == "it is the same as lr=1e-3."
    _, layernorm, mla = contestants(TINY, ["layernorm", "mla"], overrides=["model.norm=rmsnorm"])
    assert layernorm.refusal.startswith("it is the incumbent") and mla.refusal is None


def test_who_cannot_be_built_is_refused_and_the_others_go_on():
    found = contestants(TINY, ["dropout=0.1,2"])
    assert [one.refusal for one in found[:2]] == [None, None]
    assert "model.dropout=2.0 must be a finite number between 0 and 0.999" in found[2].refusal
    refusals = {one.name: one.refusal for one in contestants(TINY, ["pattern=L,SSSL", "depth=6,8"])}
    assert "depth=6 must be a positive multiple of the 4 letters" in refusals["pattern=SSSL,depth=6"]
    assert refusals["pattern=L,depth=6"] is refusals["pattern=SSSL,depth=8"] is None


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([], {}, "Name what to change: attention mla"),
        (["atention", "mla"], {}, "Unknown variant or mutation 'atention'. Did you mean 'attention='"),
        (["atention=mla"], {}, "Unknown mutation 'atention'. Did you mean 'attention'"),
        (["attention", "mlaa"], {}, "Unknown attention variant 'mlaa'. Did you mean 'mla'"),
        (["attention", "mla", "moe"], {}, "Unknown attention variant 'moe'"),
        (["attention"], {}, "Mutation 'attention' needs a value: attention=variant"),
        (["lr="], {}, "'lr=' has no value"),
        (["lr=fast"], {}, "lr='fast' must be a number"),
        (["width=100"], {}, "width=100 must be a positive multiple"),
        (["lr=1e-3", "lr=2e-3"], {}, "lr is named twice: give all its values at once, lr=A,B."),
        (["mla", "attention=mla"], {}, "mla is asked for twice"),
        (["lr=1e-3,2e-3", "mla"], {"stack": True}, "A stack adds one change at a time: give lr one value, not 2"),
        (["norm", "rmsnorm"], {}, "There is nothing to compare the incumbent with. rmsnorm: it is the incumbent"),
        (["mla"], {"overrides": ["num_stepz=3"]}, "Unknown config key 'num_stepz'. Did you mean 'num_steps'"),
    ],
)
def test_what_cannot_be_meant_is_one_line(words, options, message):
    with pytest.raises(UserError, match=message):
        contestants(TINY, words, **options)


def test_slugs_are_short_safe_and_different():
    assert slug("mla,lr=3e-4") == "mla,lr=3e-4"
    long = [f"rope_scaling=yarn(factor={i}, original_length=64),attention=mla,norm=layernorm,lr=1e-3" for i in (4, 5)]
    names = [
        *long,
        "adam_betas=0.9:0.98",
        "adam_betas=0.9/0.98",
        "..",
        "",
        "-x",
        "x" * 61,
        "x" * 62,
        "adam_betas=0.9-0.98",
    ]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    for one in slugs:
        assert 0 < len(one) <= 60 and one[0] not in "." and not set(one) & set(' /\\:*?"<>|()')


def test_space_and_matching_do_without_jax():
    code = "import sys; from foundry_jax.search import matching, space; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert space.INCUMBENT == "incumbent"
