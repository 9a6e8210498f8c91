"""A template: copy this file, change what your experiment changes, and delete the rest.

    cp configs/forkme.py configs/mine.py
    python -m foundry_jax.main --config=configs/mine.py

All keys and their defaults stand in configs/baseline.py. A misspelt key or a value of the wrong type is refused.
"""

from ml_collections import ConfigDict

from configs import tiny
from foundry_jax import mutate


def get_config(arg: str = "") -> ConfigDict:
    """Returns this config with the mutations named in `arg` applied (":mla,lr=3e-4" on the command line)."""
    c = tiny.get_config()
    c.name = "mine"

    # Your own text: one file, a folder, or a glob. Each file is a document; a twentieth of them is for validation.
    # c.data.source = "text"
    # c.data.path = "texts/**/*.txt"
    # c.data.validation = "document(fraction=0.05)"

    # The architecture.
    c.model.num_layers = 2
    c.model.attention = "mla"

    # The recipe.
    c.num_steps = 200
    c.optimizer.learning_rate = 1e-3
    c.optimizer.min_learning_rate = 1e-4
    return mutate.apply(c, arg, lineage=__file__)  # keep this line: it makes ":mla,lr=3e-4" work
