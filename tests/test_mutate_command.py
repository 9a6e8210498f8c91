"""The mutate command: what it shows, what it saves, what it refuses; and stacks of mutations."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from foundry_jax import mutate
from foundry_jax.config import load, load_dict, to_flat_dict
from foundry_jax.errors import UserError
from foundry_jax.mutate import __main__ as command
from foundry_jax.mutate.explain import explain
from foundry_jax.mutate.stack import canonical, changes, stack
from foundry_jax.search import children, describe
from tests.conftest import ROOT

TINY = "configs/tiny.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the configs, which is where we are."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__", "children"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Returns what the command prints, in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mutate", *words])
        command.main()
        return capsys.readouterr().out

    return run


def test_it_shows_the_difference_and_saves_a_config_that_is_accepted(run):
    report = json.loads(run("attention", "mla", "--json"))
    assert report["changes"] == {"model.attention": ["gqa", "mla"]}
    assert report["figures"]["kv_bytes_per_token"] == [2048, 1024]  # 4 layers of 2 x 2 x 32, of 48 + 16, in 4 bytes
    assert set(report["figures"]) == set(describe.FIGURES)
    assert report["saved"] and report["config"] == "configs/children/tiny_attention_mla.py"
    assert report["command"] == f"python -m foundry_jax.main --config={report['config']}"
    child, argument = (to_flat_dict(load(spec)) for spec in (report["config"], f"{TINY}:mla"))
    assert child.pop("name") == "tiny_attention_mla" and argument.pop("name") == "tiny"
    assert child == argument
    assert load(f"{report['config']}:lr=1e-4").optimizer.learning_rate == 1e-4
    shown = run("attention", "mla")
    assert "saved" not in shown and re.search(r"bytes of cache per token +2,048 +1,024 +-50.0%", shown)


def test_a_child_says_where_it_comes_from_and_is_a_parent_itself(run, folder):
    run("mla", "lr=3e-4")
    text = (folder / "configs/children/tiny_mla_lr_3e_4.py").read_text()
    assert text.startswith('"""configs/tiny.py with mla, lr=3e-4.\n')
    assert "    model.attention: 'gqa' -> 'mla'\n    optimizer.learning_rate: 0.003 -> 0.0003\n" in text
    assert "python -m foundry_jax.mutate mla lr=3e-4 --config=configs/tiny.py" in text
    parent = "configs/children/tiny_mla_lr_3e_4.py:steps=9"
    report = json.loads(run("grad_clip=2", f"--config={parent}", "--save=other/x.py", "--json"))
    assert report["changes"] == {"optimizer.clip_norm": [1.0, 2.0]}
    config = load("other/x.py")
    assert (config.model.attention, config.num_steps, config.optimizer.clip_norm) == ("mla", 9, 2.0)


def test_what_is_saved_follows_the_style_of_the_project(run, folder):
    run(
        "rope_scaling=yarn(factor=4, original_length=64)",
        "moe=sigmoid:4:2",
        "mlp_dim=96",
        "softcap=30.5",
        "qk_norm=whole",
    )
    (path,) = (folder / "configs/children").glob("*.py")
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, path], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_file_that_is_there_is_never_replaced(run, folder):
    run("mla")
    path = folder / "configs/children/tiny_mla.py"
    before = path.read_text()
    path.write_text(before.replace(children.MADE, f"{children.MADE}earlier than "))  # only the time differs
    assert not json.loads(run("mla", "--json"))["saved"]
    path.write_text(before.replace("mla", "mqa"))
    with pytest.raises(UserError, match="tiny_mla.py is there already, and is another config: delete it, or choose"):
        run("mla")
    assert path.read_text() == before.replace("mla", "mqa")
    assert "--config=configs/tiny.py:mla\n" in run("mla", "--no-save")


@pytest.mark.parametrize(
    ("words", "items"),
    [
        ("attention mla", ["attention=mla"]),
        ("adam_betas 0.9 0.99", ["adam_betas=0.9:0.99"]),
        ("sparse fixed 16 4 lr=3e-4", ["sparse=fixed:16:4", "lr=3e-4"]),
        ("mla 64", ["mla=64"]),
        ("mla moe", ["mla", "moe"]),
        ("attention=mla lr=3e-4", ["attention=mla", "lr=3e-4"]),
        ("mla,lr=3e-4 moe", ["mla", "lr=3e-4", "moe"]),
        ("rope_scaling yarn(factor=4)", ["rope_scaling=yarn(factor=4)"]),
    ],
)
def test_words_are_a_type_and_its_values_or_several_mutations(words, items):
    assert command.items_of(words.split()) == items


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a mutation, such as attention mla, or --list"),
        (["atention", "mla"], "Unknown variant or mutation 'atention'. Did you mean 'attention='"),
        (["attention", "mlla"], "Unknown attention variant 'mlla'. Did you mean 'mla'"),
        (
            ["attention", "mla", "gqa_2kv"],
            "attention can be mla or gqa_2kv, not all at once: .*cli.sweep attention mla",
        ),
        (["mla", "gqa_2kv"], "mla and gqa_2kv both choose attention: leave one out"),
        (["mla", "qk_norm"], "model.attention=mla with model.qk_norm=head is refused: multi-head latent"),
        (["dpo"], "loss.name=dpo learns from pairs of completions: set data.preferences"),
        (["norm", "rmsnorm"], "norm=rmsnorm changes nothing: that is what configs/tiny.py is already"),
        (["depth=x"], "depth='x' must be a whole number"),
        (["--list", "attntion"], "Unknown mutation 'attntion'. Did you mean 'attention'"),
        (["--list", "mla", "moe"], "--list explains all types or one, not 'mla moe'"),
        (["mla", "--config=configs/tinny.py"], "No config file 'configs/tinny.py'"),
    ],
)
def test_a_mistake_is_named_in_one_line_and_leaves_nothing(words, message, run, folder):
    with pytest.raises(UserError, match=message) as caught:
        run(*words)
    assert "\n" not in str(caught.value)
    assert not (folder / "configs/children").exists()


def test_every_type_is_explained_with_its_variants_and_a_source(run):
    explained = {one["name"]: one for one in json.loads(run("--list", "--json"))}
    assert list(explained) == list(mutate.MUTATIONS)
    for name, one in explained.items():
        assert one["variants"] == mutate.CHOICES.get(name, {})
        assert re.search(r"\b(19|20)\d\d, ", f"{one['meaning']} {one['variants']}"), f"{name} names no paper"
    shown = run("--list", "moe")
    assert shown.startswith("moe[=router[:experts[:top_k]]]\n") and "moe=sigmoid: a balancing bias" in shown
    assert [one.usage for one in explain("adam_betas")] == ["adam_betas=beta1:beta2"]


@pytest.mark.parametrize(
    ("items", "changed", "note"),
    [
        (["mha", "width=160"], {"model.model_dim": 160, "model.num_heads": 5, "model.num_kv_heads": 5}, None),
        (["mlp_dim=96", "gelu"], {"model.mlp": "gelu", "model.mlp_dim": 144}, None),
        (["gelu", "mlp_dim=96"], {"model.mlp": "gelu", "model.mlp_dim": 96}, None),
        (["pattern=SSL", "depth=6"], {"model.pattern": "SSL", "model.num_layers": 6}, None),
        (
            ["sliding_window=16", "pattern=SL"],
            {"model.pattern": "SL", "model.window": 16},
            "pattern=SL sets model.pattern=SL instead of S of sliding_window=16.",
        ),
        (["steps=9", "rmsnorm"], {"num_steps": 9}, "rmsnorm changes nothing: that is what it is already."),
    ],
)
def test_mutations_stack(items, changed, note, folder):
    parent = load_dict(TINY)
    stacked = stack(parent, items)
    assert {key: new for key, (_, new) in changes(parent, stacked.config).items()} == changed
    assert stacked.notes == ((note,) if note else ())
    assert to_flat_dict(load(f"{TINY}:{','.join(items)}"))  # the same argument is a config


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["gqa_2kv", "mla=64"], "gqa_2kv and mla=64 both choose attention: leave one out"),
        (["lr=1e-3", "lr=3e-3"], "lr=1e-3 and lr=3e-3 both choose lr: leave one out"),
        (["loss=focal", "dpo"], "loss=focal and dpo both choose loss"),
        (
            ["pattern=SL", "sliding_window"],
            "sliding_window sets model.pattern=S instead of SL, so nothing is left of pat",
        ),
        (
            ["label_smoothing=0.1", "loss=dpo:0.1:0.2"],
            "sets loss.label_smoothing=0.2 instead of 0.1, so nothing",
        ),
    ],
)
def test_mutations_at_odds_are_refused(items, message, folder):
    with pytest.raises(UserError, match=message):
        stack(load_dict(TINY), items)


def test_a_mutation_with_the_name_of_a_variant_is_about_the_same():
    assert canonical("mla") == canonical("attention=mla") == ("attention", ("mla",))
    assert canonical("mla=64") == ("attention", ("mla", "64"))
    assert canonical("lr=3e-4") == ("lr", ("3e-4",))
    m = load(f"{ROOT / TINY}:mla=24:40").model
    assert (m.attention, m.kv_lora_rank, m.q_lora_rank) == ("mla", 24, 40)
    config = load(f"{ROOT / TINY}:dpo=pairs.jsonl:0.2")
    assert (config.loss.name, config.loss.dpo_beta, config.data.preferences) == ("dpo", 0.2, "pairs.jsonl")


@pytest.mark.parametrize(
    ("argument", "figure", "expected"),
    [
        ("loss=dpo", "memory_bytes", lambda old, new: new > 1.5 * old),  # batches of two sequences each
        ("lora_rank=4", "trained_params", lambda old, new: new < 0.1 * old),
        ("moe", "active_params", lambda old, new: new == pytest.approx(old, rel=0.01)),
        ("moe", "params", lambda old, new: new > 2 * old),
        ("batch_size=4", "memory_bytes", lambda old, new: new < old),
    ],
)
def test_the_figures_are_those_of_the_child(argument, figure, expected):
    overrides = ["data.preferences=pairs.jsonl"] if "dpo" in argument else []
    parent, child = load(str(ROOT / TINY)), load(f"{ROOT / TINY}:{argument}", overrides)
    assert expected(*(describe.figures(describe.on_one_device(config))[figure] for config in (parent, child)))


@pytest.mark.slow
def test_the_command_takes_no_accelerator_and_exits_with_1_for_a_mistake(folder):
    arguments = [sys.executable, "-m", "foundry_jax.mutate", "lr", "fast"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: lr='fast' must be a number such as 3e-4.\n")
