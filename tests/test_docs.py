"""What the documentation says is true: its commands run, its links, files, keys and tables exist.

Every line of a ```bash, ```console or ```sh block must match a rule of RULES, and every ```python block runs. A block
is run from top to bottom, word for word, in a copy of the checkout's files, so each stands on its own. In that copy
every config gives SMALL sizes; mutations are applied before them, overrides on the command line after them.
"""

import ast
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from foundry_jax import config, mutate
from tests import checkpoints
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
COMMAND_LANGUAGES = {"bash", "console", "sh"}
OTHER_LANGUAGES = {"python", "text", "json", "jinja"}
SECONDS = 300

SMALL = {
    "num_steps": "2",
    "model.num_layers": "1",
    "model.model_dim": "32",
    "model.num_heads": "4",
    "model.mlp_dim": "64",
    "model.kv_lora_rank": "16",
    "model.qk_nope_head_dim": "8",
    "model.qk_rope_head_dim": "8",
    "model.v_head_dim": "8",
    "model.context_length": "32",
    "data.batch_size": "8",
    "eval.batch_size": "64",
    "data.validation": "document(0.01)",
    "data.tokenizer": "byte",  # fitting a BPE tokenizer takes longer than all the rest
}
LONG_CONTEXT = ("--config=configs/smoke.py", "--config.model.context_length=512")  # room for the answers of tasks
PRETRAINED = "smollm2-135m"  # in commands a tiny checkpoint stands for it; python blocks load it
SHRINK = f"""

_full_size = get_config


def get_config(arg=""):
    from foundry_jax.config import set_values

    config, small = _full_size(arg), {SMALL!r}
    if config.data.validation.startswith("tail"):
        small.pop("data.validation", None)
    return set_values(config, small)
"""


SIZES_THAT_FIT = {key: value for key, value in SMALL.items() if key.partition(".")[0] != "model"}
SHRINK_PRETRAINED = SHRINK.replace(repr(SMALL), repr(SIZES_THAT_FIT | {"model.context_length": "32"}))


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text."""

    page: pathlib.Path
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Returns the command lines, continued lines joined; in a console block those after "$ "."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if shlex.split(line, comments=True)]


def blocks_of(page: pathlib.Path) -> list[Block]:
    """Returns the fenced blocks of a page."""
    found, inside = [], None
    for number, line in enumerate(page.read_text("utf-8").splitlines(), start=1):
        if not line.lstrip().startswith("```"):
            if inside is not None:
                inside[1].append(line)
        elif inside is None:
            inside = (number, [], line.strip().strip("`"))
        else:
            found.append(Block(page, inside[0], inside[2], "\n".join(inside[1])))
            inside = None
    assert inside is None, f"{page}: the block of line {inside[0]} is never closed"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture
def checkout(tmp_path):
    """A folder with the files that commands may name, and texts to train on."""
    for name in ("configs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    tiny = checkpoints.write(tmp_path / "tiny")
    for path in (tmp_path / "configs").glob("[a-z]*.py"):
        shrink = SHRINK_PRETRAINED if path.name in ("finetune.py", "dpo.py") else SHRINK
        path.write_text(path.read_text("utf-8").replace(PRETRAINED, str(tiny)) + shrink, "utf-8")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    text = (ROOT / "LICENSE").read_text("utf-8")
    for name in ("tinyshakespeare.txt", "book.txt"):
        (tmp_path / name).write_text(text, "utf-8")
    pair = {"prompt": "Is it so?", "chosen": " It is.", "rejected": " No idea."}
    pairs = [pair | {"prompt": f"Is it {number}?"} for number in range(300)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in pairs), "utf-8")
    chats = [
        [{"role": "user", "content": f"Is it {i}?"}, {"role": "assistant", "content": "It is."}] for i in range(400)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps({'messages': one})}\n" for one in chats), "utf-8")
    tasks = [{"instruction": f"Add {i} and {i}.", "input": "", "output": f"{2 * i}"} for i in range(400)]
    (tmp_path / "seed_tasks.jsonl").write_text("".join(f"{json.dumps(task)}\n" for task in tasks), "utf-8")
    write_items(tmp_path / "data", pair)
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for number in range(40):  # so many that a tenth of them is not nothing
        (tmp_path / "texts" / "more" / f"{number}.txt").write_text(f"{number} {text}", "utf-8")
    return tmp_path


def write_items(folder: pathlib.Path, pair: dict) -> None:
    """Makes the folder of evaluation data that the documentation speaks of, with an item or a few of each task."""
    sums = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]
    question = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2}
    problem = {
        "task_id": "HumanEval/0", "prompt": 'def one():\n    """1."""\n', "entry_point": "one",
        "canonical_solution": "    return 1\n", "test": "def check(one):\n    assert one() == 1\n",
    }  # fmt: skip
    splits = {"gsm8k/test": sums, "gsm8k/train": sums, "mmlu/test": [question] * 3, "mmlu/dev": [question] * 5}
    for name, rows in {**splits, "humaneval": [problem], "preferences/pairs": [pair] * 3}.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def execute(arguments: list[str], folder: pathlib.Path) -> str:
    """Runs a command in a folder and returns its stdout."""
    environment = os.environ | {"FOUNDRY_CACHE": str(ROOT / ".cache" / "data")}
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stderr[-3000:]}"
    return done.stdout


def python(words: list[str], folder: pathlib.Path) -> str:
    """Runs a command that begins with python under this interpreter."""
    return execute([sys.executable, *words[1:]], folder)


# Bytes have no control tokens, and to fit a tokenizer to a few conversations takes no time.
FITTED = ["--config.data.tokenizer=bpe", "--config.data.vocab_size=300"]


def train(words: list[str], folder: pathlib.Path) -> None:
    of_chats = "--config.data.source=chat" in words and "configs/tiny.py" in " ".join(words)
    shown = python([*words, *FITTED] if of_chats else words, folder)
    if "--json" in words:
        assert json.loads(shown)["status"] == "done"
    else:
        assert "bits per byte" in shown


def plan(words: list[str], folder: pathlib.Path) -> None:
    shown = python(words, folder)
    assert json.loads(shown)["plan"] if "--json" in words else shown.startswith("strategy: ")


def zoo(words: list[str], folder: pathlib.Path) -> None:
    """Runs a command on pretrained models, a tiny one in place of the real one; trains a run that is not there yet."""
    words = [str(folder / "tiny") if word == PRETRAINED else word for word in words]
    if "export" in words and not (folder / words[4]).exists():
        train(shlex.split(f"python -m foundry_jax.main --config=configs/smoke.py --workdir={words[4]}"), folder)
    assert python(words, folder)


def evaluate(words: list[str], folder: pathlib.Path) -> None:
    """Runs the evaluation command on a tiny model, or on the run that it names, which is trained first."""
    tiny = f"--path={checkpoints.write(folder / 'long', max_position_embeddings=2048)}"
    words = [tiny if word.startswith(("--model=", "--path=")) else word for word in words]
    for run in [word.partition("=")[2] for word in words if word.startswith("--checkpoint=")]:
        train(["python", "-m", "foundry_jax.main", *LONG_CONTEXT, f"--workdir={run}"], folder)
    shown = python(words, folder)
    if "--json" in words:
        assert json.loads(shown)["results"] and not json.loads(shown)["failed"]
    else:
        assert "standard error" in shown and "bits_per_byte" in shown


def sweep(words: list[str], folder: pathlib.Path) -> None:
    """Runs a sweep with two seeds, and wants to see a decision and the report that it names."""
    seeds = [] if any(word.startswith("--seeds") for word in words) else ["--seeds=2"]
    shown = json.loads(python([*words, *seeds, "--json"], folder))
    if "--dry-run" in words:
        assert shown["decision"] is None and shown["contestants"]["mla"]["forecast"]["params"] > 0
        return
    assert shown["decision"]["why"] and len(shown["contestants"]["incumbent"]["runs"]) == 2
    assert list(folder.glob("runs/sweeps/*/report.html"))


def synthesize(words: list[str], folder: pathlib.Path) -> None:
    """Runs the command on a tiny model, which writes nothing that is of use: it is given up."""
    tiny = checkpoints.write(folder / "long", max_position_embeddings=2048)
    words = [f"--model={tiny}" if word.startswith("--model=") else word for word in words]
    short = ["--style=text", "--prompts=1", "--list-tokens=8"]
    done = subprocess.run([sys.executable, *words[1:], *short], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "made nothing" in done.stderr


def loop(words: list[str], folder: pathlib.Path) -> None:
    """Runs another command of the loop, which says something."""
    assert python(words, folder).strip()


def make(words: list[str], _: pathlib.Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in words[1:]:
        recipe = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
        assert recipe, f"the Makefile has no target {target}"
        assert re.search(rf"^\.PHONY:.* {re.escape(target)}( |$)", makefile, re.MULTILINE)
        for path in re.findall(r"[\w/]+\.py", recipe[1]):
            made = f"--save={path}" in recipe[1]
            assert made or (ROOT / path).is_file(), f"make {target} runs {path}, which is not there"
        for module in re.findall(r"-m (foundry_jax[\w.]*)", recipe[1]):
            assert importlib.util.find_spec(module), f"make {target} runs {module}, which is not there"


def pip_install(words: list[str], _: pathlib.Path) -> None:
    wanted = words[-1].partition("[")[2].removesuffix("]")
    for extra in filter(None, wanted.split(",")):
        assert extra in project()["optional-dependencies"], f"pyproject.toml has no extra {extra}"


def activate(words: list[str], _: pathlib.Path) -> None:
    venv = re.search(r"^VENV \?= (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1]
    assert words[1] == f"{venv}/bin/activate"


# What a command line looks like -> what is done about it. Whatever no pattern matches in full fails the test.
RULES = {
    r"python -m foundry_jax[\w.]* --help": python,
    r"python -m foundry_jax\.main --config=\S+( --\S.*)*": train,
    r"python -m foundry_jax\.cli\.plan --config=\S+( --\S+)*": plan,
    r"python -m foundry_jax\.zoo (list|convert|verify|export)( \S+)*": zoo,
    r"python -m foundry_jax\.eval --task=\S+( --\S+)*": evaluate,
    r"python -m foundry_jax\.cli\.sweep( \S+)*": sweep,
    r"python -m foundry_jax\.(mutate|cli\.(lineage|compare|lr_finder))( \S+)*": loop,
    r"python -m foundry_jax\.cli\.(data|tokenize) .*": loop,
    r"python -m foundry_jax\.cli\.synthesize( --\S+)*": synthesize,
    r"python docs/make_(configuration|variants)\.py": python,
    r"cp configs/\w+\.py configs/\w+\.py": execute,
    r"make( [a-z-]+)+": make,
    r"source \S+/bin/activate": activate,
    r"python -m pip install -e \.(\[[\w,-]+\])?": pip_install,
}


def rule_for(command: str):
    """Returns (the words of a command, what to do about it)."""
    words = shlex.split(command, comments=True)
    for pattern, action in RULES.items():
        if re.fullmatch(pattern, " ".join(words)):
            return words, action
    pytest.fail(f"no rule in tests/test_docs.py knows how to check {command!r}")


def cost_of(block: Block):
    """Returns the marks of a block: those that start JAX are slow, and those of the README run more often."""
    if block.language != "python" and "python " not in block.text:
        return []
    # What a sweep's command does is tested by test_sweep_command.py each time.
    is_often = block.page.name == "README.md" and "cli.sweep" not in block.text
    return [pytest.mark.slow] if is_often else [pytest.mark.slow, pytest.mark.exhaustive]


def parameters(languages: set[str]):
    return [pytest.param(block, id=block.id, marks=cost_of(block)) for block in BLOCKS if block.language in languages]


@pytest.mark.parametrize("block", parameters(COMMAND_LANGUAGES))
def test_every_command_works(block, checkout):
    assert block.commands()
    for command in block.commands():
        words, action = rule_for(command)
        action(words, checkout)


@pytest.mark.parametrize("block", parameters({"python"}))
def test_every_python_snippet_runs(block, checkout):
    assert execute([sys.executable, "-c", block.text], checkout)


@pytest.mark.parametrize("block", [pytest.param(block, id=block.id) for block in BLOCKS])
def test_no_block_hides_commands(block):
    assert block.language in COMMAND_LANGUAGES | OTHER_LANGUAGES, f"{block.id}: say what language the block is in"
    if block.language in COMMAND_LANGUAGES:
        for command in block.commands():
            rule_for(command)
    else:
        assert not re.search(r"^(\$|python|make|pip|cp|source) ", block.text, re.MULTILINE), f"{block.id} has commands"


@pytest.mark.parametrize("command", ["python -m foundry_jax.sweep mla", "pip install x", "curl x", "make demo; x"])
def test_a_command_without_a_rule_fails(command):
    with pytest.raises(pytest.fail.Exception, match="no rule in tests/test_docs.py"):
        rule_for(command)


def test_a_make_target_that_is_not_there_fails():
    with pytest.raises(AssertionError, match="the Makefile has no target deploy"):
        make(["make", "deploy"], ROOT)


def test_commands_are_read_as_a_shell_reads_them():
    text = "make test   # a comment\n# a line of comment\n\npython -m a \\\n  --b\n"
    assert Block(ROOT, 1, "bash", text).commands() == ["make test   # a comment", "python -m a    --b"]
    assert Block(ROOT, 1, "console", "$ make test\n3 passed\n").commands() == ["make test"]


@functools.cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def docstring_commands():
    """Yields the commands in the docstrings of configs and modules."""
    for path in sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "foundry_jax").rglob("*.py")]):
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        for command in re.findall(r"python -m foundry_jax\S+ --config=[^\n#]+", docstring):
            yield pytest.param(command, id=f"{path.relative_to(ROOT)}: {command.split('--config=')[1]}")


@pytest.mark.parametrize("command", list(docstring_commands()))
def test_commands_in_docstrings_name_a_module_and_a_valid_config(command, checkout, monkeypatch):
    shutil.copy(ROOT / "configs" / "forkme.py", checkout / "configs" / "mine.py")
    monkeypatch.chdir(checkout)
    _, _, module, *flags = shlex.split(command)
    assert importlib.util.find_spec(module)
    values = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    overrides = [f"{key.removeprefix('config.')}={value}" for key, value in values.items() if key.startswith("config.")]
    config.load(values["config"], overrides)


def test_the_configuration_page_is_up_to_date():
    script = load_script()
    assert script.TARGET.read_text("utf-8") == script.render(), "run: python docs/make_configuration.py"


def test_the_page_of_variants_is_up_to_date_and_complete():
    script = load_script("make_variants")
    assert script.TARGET.read_text("utf-8") == script.render(), "run: python docs/make_variants.py"
    for row in script.on_text():
        figures = script.read()["rows"][row.argument]
        assert set(figures["bits_per_byte"]) == {str(seed) for seed in range(script.SEEDS)}, row
        assert figures["speed"] > 0, row


def test_the_configuration_page_has_every_key_and_every_mutation():
    rows = load_script().read_baseline()
    assert [key for key, _, _ in rows] == list(config.to_flat_dict(config.load(str(ROOT / "configs" / "baseline.py"))))
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert all(f"| `{name}=" in page for name in mutate.MUTATIONS)


def load_script(name: str = "make_configuration"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def code_spans(page: pathlib.Path) -> list[str]:
    """Returns what stands between backticks, outside of fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for span in code_spans(page):
        if re.fullmatch(r"[\w/.]+\.py|[\w/]+/", span) and span not in (
            "checkpoints/",
            "quarantine/",
            "runs/",
            "evals/step-N/",
        ):
            assert (ROOT / span).exists() or (ROOT / "foundry_jax" / span).exists(), f"{page.name} names {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_are_named_exist(page):
    flat = config.to_flat_dict(config.load(str(ROOT / "configs" / "baseline.py")))
    sections = {key.partition(".")[0] for key in flat if "." in key}
    for span in code_spans(page):
        name, _, _ = span.removeprefix("--config.").partition("=")
        section, dot, key = name.partition(".")
        if dot and section in sections and key not in ("py", "*"):
            assert name in flat, f"{page.name} names {span}"


def test_the_architecture_page_names_every_module():
    spans = set(code_spans(ARCHITECTURE))
    for path in (ROOT / "foundry_jax").rglob("*.py"):
        name = path.relative_to(ROOT / "foundry_jax").as_posix()
        if path.name != "__init__.py" or re.search(r"^[A-Z]+ = ", path.read_text("utf-8"), re.MULTILINE):
            assert name in spans, f"docs/architecture.md does not name {name}"


def test_the_readme_names_every_extra_config_and_make_target():
    readme = (ROOT / "README.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert all(f"make {target}" in readme for target in targets if target != "clean")
    extras = ",".join(re.findall(r"-e \"\.\[(.*?)\]\"", readme)).split(",")
    assert set(extras) == set(project()["optional-dependencies"]) - {"test", "oracle"}
    assert all(f"configs/{path.name}" in readme for path in (ROOT / "configs").glob("[a-z]*.py"))


def test_the_readme_is_short_and_marks_the_output_of_the_demo():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) < 200
    assert "<!-- demo output -->\n```text\n" in readme
