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
_HUNG = "Timeout ("  # so its watch begins to show the threads, and may stumble over those that run
_BROKEN = "the engine fails on every text"
_TOLD = {1: (_HUNG, _BROKEN), -11: (_HUNG,)}  # codes by which a text ends a worker that says so
_SHOWN = 1500


def strange(slot: Slot, *, is_poisoned: bool = False) -> list[int]:
    """The lives of a slot that ended as nobody asked for, from 1; ``is_poisoned``: by texts, too.

    A text kills a worker, or makes its engine hang or break; of the latter two, the worker tells.
    """
    allowed = {SIGKILLED, _DONE, _NO_REDIS, _TOLD_EARLY}
    if slot.role == "aggregator":
        allowed.add(_TAKEN_OVER)
    may_be_told = slot.role == "worker" and is_poisoned
    if may_be_told:
        allowed.add(_ABORTED)
    return [
        life
        for life, code in enumerate(slot.codes, 1)
        if code not in allowed
        and not (may_be_told and any(why in slot.log_of(life) for why in _TOLD.get(code, ())))
    ]


def strange_ends(fleet: Fleet) -> list[str]:
    """Processes that ended in a way that nobody asked for, with the end of their logs."""
    said = []
    for slot in fleet.slots.values():
        if lives := strange(slot, is_poisoned=fleet.plan.poisoners > 0):
            codes = [slot.codes[life - 1] for life in lives]
            said.append(f"{slot.name} ended with {codes}:\n{slot.log_of(lives[-1])[-_SHOWN:]}")
    return said
