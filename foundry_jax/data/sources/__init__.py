"""Where documents come from: data.source -> find(data.path) -> TextFiles, ChatFiles or TokenFiles.

A source of text has a `name`, a `fingerprint()` of its whole content, a list of `undecodable()` ids, and iterates
over its Documents (id, text) in an order that never changes. To add one, write such a `find` and give it a line.
"""

from foundry_jax.data.sources import bin, chat, pystdlib, text

SOURCES = {
    "pystdlib": pystdlib.find,
    "text": text.find,
    "chat": chat.find,
    "bin": bin.find,
}
