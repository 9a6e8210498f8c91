"""nanoGPT's shakespeare_char: the same text, split, vocabulary and budget, on this project's architecture.

    python -m foundry_jax.main --config=configs/shakespeare_char.py:cpu --config.data.path=tinyshakespeare.txt

:cpu  4 layers, 4 heads, 128 wide, T 64, B 12, 2000 steps. nanoGPT publishes a validation loss of 1.88.
      Measured here: 1.658, in 2.5 minutes on 2 CPU cores.
:gpu  6 layers, 6 heads, 384 wide, T 256, B 64, 5000 steps, dropout 0.2. nanoGPT: 1.4697, 3 minutes on an A100.

Losses are in nats per character; nanoGPT estimates them on random windows, here they are over the whole validation
split. The text is the 1.1 MB tinyshakespeare.txt of the char-rnn repository.
"""

from ml_collections import ConfigDict

from configs import baseline
from foundry_jax import mutate
from foundry_jax.registry import lookup


def get_config(arg: str = "cpu") -> ConfigDict:
    """Returns the preset that comes first in `arg` ("cpu" or "gpu"), with the mutations after it applied."""
    preset, _, mutations = (arg or "cpu").partition(",")
    c = lookup({"cpu": _cpu, "gpu": _gpu}, preset, "preset of configs/shakespeare_char.py")()
    return mutate.apply(c, mutations, lineage=__file__)


def _common() -> ConfigDict:
    c = baseline.get_config()
    c.name = "shakespeare_char"
    c.data.source = "text"
    c.data.path = "tinyshakespeare.txt"
    c.data.tokenizer = "char"
    c.data.validation = "tail(fraction=0.1)"  # nanoGPT: the last tenth of the text
    c.model.num_kv_heads = 0  # nanoGPT has one key/value head per query head
    c.optimizer.learning_rate = 1e-3
    c.optimizer.min_learning_rate = 1e-4
    c.optimizer.beta2 = 0.99
    return c


def _cpu() -> ConfigDict:
    c = _common()
    c.num_steps = 2000
    c.model.num_layers = 4
    c.model.num_heads = 4
    c.model.model_dim = 128
    c.model.context_length = 64
    c.data.batch_size = 12
    c.log.every = 50
    return c


def _gpu() -> ConfigDict:
    c = _common()
    c.model.num_layers = 6
    c.model.num_heads = 6
    c.model.model_dim = 384
    c.model.context_length = 256
    c.model.dropout = 0.2
    c.model.dtype = "bfloat16"
    c.data.batch_size = 64
    return c
