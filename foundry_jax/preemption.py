"""SIGTERM as a question the training loop asks, instead of an end."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Turns SIGTERM, and the first Ctrl-C, into a flag while it is entered; a second Ctrl-C interrupts.

    With several processes, jax.distributed has its own SIGTERM handler, and all processes agree on the step at
    which they stop.
    """

    def __init__(self):
        self._asked = False
        self._previous = {}

    def __enter__(self) -> "Preemption":
        signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Returns whether the run should save and stop now; call it once a step, on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _note(self, number: int, _: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
