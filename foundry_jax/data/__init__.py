"""From a DataConfig to batches: sources of text, tokenizers, the token cache, and the order of the batches.

    corpus = prepare(config.data)
    batches = train_batches(corpus.train_tokens, batch_size=32, context_length=256, seed=0)
    for step, batch in batches.iterate(0, num_steps): ...

Two tables are open to additions, one line each: SOURCES (in sources/__init__.py) and TOKENIZERS (in tokenize.py).
Nothing here touches a JAX device.
"""

from foundry_jax.data.batches import TrainBatches, ValidationBatches, train_batches, validation_batches
from foundry_jax.data.corpus import Corpus, prepare
from foundry_jax.data.sources import SOURCES
from foundry_jax.data.tokenize import TOKENIZERS, load_tokenizer

__all__ = [
    "SOURCES",
    "TOKENIZERS",
    "Corpus",
    "TrainBatches",
    "ValidationBatches",
    "load_tokenizer",
    "prepare",
    "train_batches",
    "validation_batches",
]
