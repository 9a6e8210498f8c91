"""Which documents are trained on: filters in a row, each seeing what those before it kept; see ../filtering.py.

FILTERS is open to additions: a frozen dataclass whose fields are its options (see base.py), and a line. RECIPES are
names for several filters, and can be written wherever a filter can.
"""

from foundry_jax.data.filters.duplicates import Exact, Near
from foundry_jax.data.filters.knowing import Decontaminate, Language, Perplexity
from foundry_jax.data.filters.repetition import Repetition
from foundry_jax.data.filters.surface import Characters, Length, Urls

FILTERS = {
    filter.name: filter
    for filter in (Length, Exact, Near, Repetition, Characters, Urls, Language, Perplexity, Decontaminate)
}

# Duplicates come last: were a first copy removed for another reason, its copies would already be gone.
RECIPES = {"standard": "length(min=200), characters, urls, repetition, exact, near"}
