"""Writes docs/configuration.md from configs/baseline.py and the tables of names and mutations.

python docs/make_configuration.py
"""

import inspect
import pathlib
import re

from foundry_jax import mutate, optimizer
from foundry_jax.config import SCHEDULES, STRATEGIES
from foundry_jax.data.sources import SOURCES
from foundry_jax.data.tokenize import TOKENIZERS
from foundry_jax.losses import LOSSES
from foundry_jax.metrics import TRACKERS
from foundry_jax.model.attention import ATTENTIONS
from foundry_jax.model.config import DTYPES, REMAT_POLICIES
from foundry_jax.model.mlp import MLPS
from foundry_jax.model.norm import NORMS
from foundry_jax.model.position import POSITIONS

ROOT = pathlib.Path(__file__).parents[1]
TARGET = ROOT / "docs" / "configuration.md"
ASSIGNMENT = re.compile(r"    c\.([\w.]+) = (.+?)(?:  # (.*))?")

CHOICES = {
    "model.attention": ATTENTIONS,
    "model.mlp": MLPS,
    "model.norm": NORMS,
    "model.position": POSITIONS,
    "model.dtype": DTYPES,
    "model.remat": REMAT_POLICIES,
    "data.source": SOURCES,
    "data.tokenizer": TOKENIZERS,
    "optimizer.name": optimizer.OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
    "loss.name": LOSSES,
    "sharding.strategy": STRATEGIES,
    "log.trackers": TRACKERS,
}

HEAD = """\
# Configuration

<!-- Written by docs/make_configuration.py; edit configs/baseline.py or a docstring in foundry_jax/mutate/ instead. -->

A config file defines `get_config(arg: str = "")` and returns an `ml_collections.ConfigDict` with exactly the keys
below. On the command line:

- `--config=FILE:ARGUMENT` hands `ARGUMENT` to `get_config`: mutations and variants, separated by commas, applied in
  order.
- `--config.KEY=VALUE` sets one key, after all mutations.

A key that does not exist, a value of the wrong type or a value out of range is refused with a one-line error before
anything is compiled. Text is read as the type of the key: `6e-4` is a number, `true` and `false` are truth values, and
a whole number may not be written as `8.0`. A size of the model that is 0 is derived before the run starts;
`config.json` in the run folder holds the derived one.
"""


def read_baseline() -> list[tuple[str, str, str]]:
    """Returns (key, value, comment) of every assignment in configs/baseline.py, in order."""
    lines = (ROOT / "configs" / "baseline.py").read_text("utf-8").splitlines()
    found = [match.groups(default="") for line in lines if (match := ASSIGNMENT.fullmatch(line))]
    return [row for row in found if row[1] != "ConfigDict()"]


def meaning(key: str, comment: str) -> str:
    """Returns a key's comment, completed by the names it may have if the comment does not list them."""
    missing = [name for name in CHOICES.get(key, ()) if not re.search(rf"\b{name}\b", comment)]
    names = f"one of: {', '.join(CHOICES[key])}" if missing else ""
    return "; ".join(filter(None, [comment, names]))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    cells = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def key_sections() -> list[str]:
    """Returns the tables of keys, one for the top level and one for each section."""
    rows = read_baseline()
    lines = [f"## Keys\n\n{len(rows)} keys; the values are those of `configs/baseline.py`."]
    for section in dict.fromkeys(key.rpartition(".")[0] for key, _, _ in rows):
        lines += ["", f"### {section or 'The run'}", ""]
        chosen = [row for row in rows if row[0].rpartition(".")[0] == section]
        cells = [(f"`{key}`", f"`{value}`", meaning(key, comment)) for key, value, comment in chosen]
        lines += table(("key", "baseline", "meaning"), cells)
    return lines


def mutation_rows() -> list[tuple[str, ...]]:
    """Returns (call, bare names, docstring) of every mutation."""
    rows = []
    for name, mutation in mutate.MUTATIONS.items():
        values = ":".join(list(inspect.signature(mutation).parameters)[1:])
        bare = ", ".join(f"`{variant}`" for variant in mutate.VARIANTS.get(name, ()))
        rows.append((f"`{name}={values}`", bare, " ".join(inspect.getdoc(mutation).split()).replace("<", r"\<")))
    return rows


def render() -> str:
    """Returns the whole page."""
    variants = [
        (f"`{variant}`", f"`{name}={variant}`", text)
        for name, group in mutate.VARIANTS.items()
        for variant, text in group.items()
    ]
    return "\n".join(
        [
            HEAD,
            *key_sections(),
            "\n## Mutations\n\nSeveral values are separated by colons: `adam_betas=0.8:0.99`.\n",
            *table(("mutation", "bare names", "meaning"), mutation_rows()),
            "\n## Variants\n\nA bare name in a config argument stands for a mutation with that value.\n",
            *table(("name", "stands for", "meaning"), variants),
            "",
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(render(), "utf-8")
    print(f"wrote {TARGET}")
