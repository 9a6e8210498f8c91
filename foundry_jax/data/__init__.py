"""From a DataConfig to batches: documents, filters, tokens in a cache, packing, and the order of the batches.

    corpus = prepare(config.data)
    batches = training(corpus, config.data, context_length=256, num_steps=1000, seed=0)
    for step, batch in batches.iterate(0, num_steps): ...

Tables are open to additions, one line each: SOURCES, TOKENIZERS, FILTERS, FORMATS, PACKINGS, CURRICULA.
Nothing here touches a JAX device.
"""

from foundry_jax.data.assembly import training, validation
from foundry_jax.data.batches import TrainBatches, ValidationBatches
from foundry_jax.data.conversation import FORMATS
from foundry_jax.data.corpus import Corpus, prepare
from foundry_jax.data.curriculum import CURRICULA
from foundry_jax.data.filters import FILTERS
from foundry_jax.data.pack import PACKINGS
from foundry_jax.data.sources import SOURCES
from foundry_jax.data.tokenize import TOKENIZERS, load_tokenizer
from foundry_jax.data.tools import TextScorer, Tools

__all__ = [
    "CURRICULA",
    "FILTERS",
    "FORMATS",
    "PACKINGS",
    "SOURCES",
    "TOKENIZERS",
    "Corpus",
    "TextScorer",
    "Tools",
    "TrainBatches",
    "ValidationBatches",
    "load_tokenizer",
    "prepare",
    "training",
    "validation",
]
