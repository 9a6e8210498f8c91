"""A process that encodes documents for another one; encoding.py starts it and says what it reads."""

import sys

from foundry_jax.data.encoding import answer, codec_from, read_frame, write_frame


def main() -> None:
    """Answers requests until there are no more; also when whoever sends them was killed."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    codec = codec_from(read_frame(requests))
    while (request := read_frame(requests)) is not None:
        write_frame(answers, *answer(codec, request))
