"""Where documents come from: a name in data.source -> find(data.path, **options) -> a Source, or TokenFiles.

A source has a `name`, a `fingerprint()` of its whole content, a list of `undecodable()` ids, and iterates over its
Documents in an order that never changes, holding few of them in memory. Its options are the keyword arguments of its
`find`. To add one, write such a `find` and give it a line.
"""

from foundry_jax.data.sources import bin, chat, constitution, huggingface, jsonl, parquet, pystdlib, text, tfds

SOURCES = {
    "pystdlib": pystdlib.find,
    "text": text.find,
    "jsonl": jsonl.find,
    "parquet": parquet.find,
    "chat": chat.find,
    "constitution": constitution.find,
    "tfds": tfds.find,
    "huggingface": huggingface.find,
    "bin": bin.find,
}
