"""A run of seconds for tests of the machinery: two layers, 16 wide, on bytes.

python -m foundry_jax.main --config=configs/smoke.py
"""

from ml_collections import ConfigDict

from configs import tiny
from foundry_jax import mutate


def get_config(arg: str = "") -> ConfigDict:
    """Returns the smoke config with the mutations named in `arg` applied."""
    c = tiny.get_config()
    c.name = "smoke"
    c.num_steps = 40
    c.model.context_length = 32
    c.model.num_layers = 2
    c.model.model_dim = 16
    c.model.num_heads = 4
    c.data.tokenizer = "byte"
    c.data.batch_size = 8
    c.eval.every = 10
    c.eval.batch_size = 64
    c.checkpoint.every = 5
    c.log.every = 1
    return mutate.apply(c, arg, lineage=__file__)
