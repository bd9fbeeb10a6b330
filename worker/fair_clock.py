"""Orders texts of two priorities for an engine that runs what has the smallest number first.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) with two flows: a virtual clock follows the
work that is done, and each text gets a number from it when it arrives.  Interactive calls get the
clock's time and their own length, so they pass all bulk that waits, and small ones pass large ones.
Bulk texts get numbers one after the other, nine times their length apart.  While interactive texts
saturate the engine the clock runs on with their tokens, and reaches a bulk text for each nine
tokens of theirs: bulk keeps a tenth.
"""

from __future__ import annotations

from vecfleet.worker.engine import Priority

INTERACTIVE_TOKENS_A_BULK_TOKEN = 9


class FairClock:
    """The virtual clock; used by one thread."""

    def __init__(self) -> None:
        self._now = 0
        self._bulk_end = 0  # where the next bulk text begins

    def interactive(self, call_tokens: int) -> int:
        """The number of all texts of an interactive call of so many tokens."""
        return self._now + call_tokens

    def bulk(self, tokens: int) -> int:
        """The number of the next bulk text, which has so many tokens."""
        start = max(self._now, self._bulk_end)
        self._bulk_end = start + INTERACTIVE_TOKENS_A_BULK_TOKEN * tokens
        return start

    def forget_bulk(self, tokens: int) -> None:
        """Bulk texts of so many tokens were given up: those to come take their place."""
        self._bulk_end -= INTERACTIVE_TOKENS_A_BULK_TOKEN * tokens

    def done(self, priority: Priority, number: int, tokens: int) -> None:
        """A text with this number was computed."""
        if priority is Priority.INTERACTIVE:
            self._now += tokens
        else:
            self._now = max(self._now, number)
