"""How processes may end."""

from __future__ import annotations

from chaos.fleet import Fleet
from chaos.roles import Slot

SIGKILLED = -9
_DONE = 0
_TAKEN_OVER = 1  # a writer that another one has taken over says so
_NO_REDIS = 3  # Redis was away when it began
_TOLD_EARLY = -15  # our SIGTERM, before it listened or when it had done
_ABORTED = -6  # by a text
_HUNG = {1, -11}  # ended by its watch; which shows threads that run, and may stumble over them
_SHOWN = 1500


def strange(slot: Slot, *, is_poisoned: bool = False) -> list[int]:
    """The exit codes of a slot that nobody asked for; ``is_poisoned``: texts kill and hang."""
    allowed = {SIGKILLED, _DONE, _NO_REDIS, _TOLD_EARLY}
    if slot.role == "aggregator":
        allowed.add(_TAKEN_OVER)
    if slot.role == "worker" and is_poisoned:
        allowed |= {_ABORTED, *_HUNG}
    return [code for code in slot.codes if code not in allowed]


def strange_ends(fleet: Fleet) -> list[str]:
    """Processes that ended in a way that nobody asked for, with the end of their logs."""
    said = []
    for slot in fleet.slots.values():
        if codes := strange(slot, is_poisoned=fleet.plan.poisoners > 0):
            log = (fleet.folder / f"{slot.name}.log").read_text(errors="replace")
            said.append(f"{slot.name} ended with {codes}:\n{log[-_SHOWN:]}")
    return said
