"""Which module may import which: the table of docs/architecture.md, held against every import in the package."""

import ast
import graphlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "foundry_jax"

# From the top down: a unit imports only units of later lines. A unit is a file or folder of the package; model.config
# is a unit of its own, because the config of a run holds it; mutate.__main__, because it is a command.
LAYERS = (
    ("main", "cli", "eval", "mutate.__main__"),
    ("search",),
    ("train",),
    ("data_tools",),
    ("forecast", "tasks", "rewards"),
    ("zoo",),
    ("compilation",),
    ("train_step", "provenance"),
    ("optimizer", "sharding", "metrics", "checkpoint", "generate"),
    ("model", "losses", "mutate", "runfolder", "preemption", "command"),
    ("config",),
    ("data",),
    ("model.config",),
    ("schema",),
    ("registry",),
    ("errors",),
)
LEVEL = {unit: level for level, units in enumerate(reversed(LAYERS)) for unit in units}

FORBIDDEN = {"torch", "transformers", "tensorflow", "pickle", "cloudpickle", "dill"}
FLAX_MODULES = {"model", "sharding", "train_step"}  # flax.linen: modules, logical axes
FLAX_STRUCT = FLAX_MODULES | {"losses", "optimizer"}  # flax.struct: dataclasses that are pytrees
HELP_SECONDS = 1.5

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
COMMANDS = [name for name, path in MODULES.items() if "__main__" in path.read_text("utf-8")]
SUBMODULES = {name: path for name, path in MODULES.items() if name != "foundry_jax"}


def imports_of(path: pathlib.Path) -> set[str]:
    """Returns the dotted names a file imports, wherever they stand; those for type checkers only do not count."""
    return {name for statement in _statements(ast.parse(path.read_text("utf-8"))) for name in _names(statement)}


def _statements(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from _statements(child)


def _names(statement: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert statement.level == 0, "relative imports hide where they point"
    whole = [f"{statement.module}.{alias.name}" for alias in statement.names]
    # `from package import module` imports the module, `from module import name` the module that holds the name.
    return [name if name in MODULES else statement.module for name in whole]


def unit_of(module: str) -> str:
    """Returns the unit of a module of the package: "foundry_jax.data.cache" -> "data"."""
    inner = module.removeprefix("foundry_jax.")
    return inner if inner in LEVEL else inner.partition(".")[0]


def inner_imports(module: str) -> set[str]:
    return {name for name in imports_of(MODULES[module]) if name.partition(".")[0] == "foundry_jax"}


def test_imports_are_read_wherever_they_stand(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "import os.path\nfrom foundry_jax import train, __version__\nfrom foundry_jax.data import cache, prepare\n"
        "if TYPE_CHECKING:\n    import torch\ndef f():\n    import jax\n"
    )
    inner = {"foundry_jax", "foundry_jax.train", "foundry_jax.data", "foundry_jax.data.cache"}
    assert imports_of(path) == inner | {"os.path", "jax"}


@pytest.mark.parametrize("module", SUBMODULES)
def test_every_module_has_a_layer(module):
    assert unit_of(module) in LEVEL, f"{module} belongs in LAYERS and in docs/architecture.md"


def test_every_layer_has_a_module():
    assert set(LEVEL) == {unit_of(module) for module in SUBMODULES}


@pytest.mark.parametrize("module", SUBMODULES)
def test_imports_point_down(module):
    here = unit_of(module)
    for name in inner_imports(module):
        there = unit_of(name)
        assert there == here or LEVEL[there] < LEVEL[here], f"{module} imports {name}, which does not lie below it"


def test_no_module_imports_itself_by_a_detour():
    graphlib.TopologicalSorter({module: inner_imports(module) - {module} for module in MODULES}).prepare()


def test_the_table_of_the_documentation_is_this_one():
    table = "\n".join(", ".join(units) for units in LAYERS)
    assert f"```text\n{table}\n```" in (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_the_model_never_sees_a_mesh():
    for module in [name for name in SUBMODULES if unit_of(name) == "model"]:
        assert "foundry_jax.sharding" not in inner_imports(module)
        assert not any(name.startswith("jax.sharding") for name in imports_of(MODULES[module])), module


def test_data_knows_neither_the_model_nor_jax():
    for module in [name for name in SUBMODULES if unit_of(name) == "data"]:
        found = imports_of(MODULES[module])
        assert not any(name.startswith(("foundry_jax.model", "foundry_jax.config")) for name in found), module
        assert not roots(module) & {"jax", "flax", "optax", "orbax"}, module


def roots(module: str) -> set[str]:
    """Returns the packages a module imports."""
    return {name.partition(".")[0] for name in imports_of(MODULES[module])}


@pytest.mark.parametrize("module", MODULES)
def test_each_package_stays_where_it_belongs(module):
    found = imports_of(MODULES[module])
    assert not roots(module) & FORBIDDEN
    assert "orbax" not in roots(module) or module == "foundry_jax.checkpoint"
    assert not any(name.startswith("flax") for name in found) or unit_of(module) in FLAX_STRUCT
    assert unit_of(module) in FLAX_MODULES or {name for name in found if name.startswith("flax")} <= {"flax.struct"}


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_package_file_holds_a_docstring_and_its_table(module):
    docstring, *body = ast.parse(MODULES[module].read_text("utf-8")).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str)
    allowed = (ast.Import, ast.ImportFrom, ast.Assign)
    if module == "foundry_jax.mutate":
        allowed += (ast.FunctionDef,)  # the parser of config arguments
    if module == "foundry_jax.zoo":
        allowed += (ast.FunctionDef, ast.If)  # its exports are imported when they are asked for
    assert all(isinstance(statement, allowed) for statement in body)


# Runs a module as `python -m` does, and then says what was imported.
TRACED = """
import json, runpy, sys
module, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    print(json.dumps({"code": stop.code, "modules": list(sys.modules)}), file=sys.stderr)
"""


@pytest.mark.parametrize("module", COMMANDS)
def test_help_answers_at_once_and_without_jax(module):
    def run(*arguments):
        # The tunable is what the training command would otherwise restart itself to set.
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)

    traced = json.loads(run("-c", TRACED, module, "--help").stderr)
    assert traced["code"] == 0
    assert not {"jax", "numpy", "grain", "orbax"} & set(traced["modules"])
    seconds = []
    for _ in range(3):  # the machine may be busy with other tests
        start = time.perf_counter()
        shown = run("-m", module, "--help").stdout
        seconds.append(time.perf_counter() - start)
    assert shown.startswith(f"usage: python -m {module.removesuffix('.__main__')} ")
    assert min(seconds) < HELP_SECONDS
