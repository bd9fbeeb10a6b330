"""The judgement: what was acknowledged against what the index and the dead letter hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from chaos.client_ledger import Entry
from chaos.fleet import GIVEN
from chaos.settlements import MOST_DEATHS
from chaos.story import digest, may_die, revision_of

from vecfleet.worker.fake_engine import fake_vector

_COSINE = 0.9999
_SHOWN = 10


@dataclass(slots=True)
class Verdict:
    """What is wrong, in words; empty lists are the promise kept."""

    acknowledged: int = 0  # documents, each call's apart
    documents: int = 0  # in the index
    dead: int = 0  # acknowledged and in the dead letter
    worn: int = 0  # documents that are in the dead letter because their worker died so often
    forgotten: int = 0  # those that came into the index before, which Redis no longer knew
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether the promise was."""
        return not (self.lost or self.doubled or self.stuck)

    def __str__(self) -> str:
        said = []
        for name in ("lost", "doubled", "stuck"):
            found = getattr(self, name)
            said += [f"{name}: {line}" for line in found[:_SHOWN]]
            if len(found) > _SHOWN:
                said.append(f"{name}: and {len(found) - _SHOWN} more")
        return "\n".join(said) or "the promise was kept"


@dataclass(slots=True)
class Held:
    """What one collection holds: of each id all (text, version) that can be seen."""

    visible: dict[str, list[tuple[str, int]]]
    vectors: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Buried:
    """One document in the dead letter."""

    job: str  # the entry's id
    id: str
    text: str | None  # None for a deletion
    error: str = ""

    @property
    def digest(self) -> str:
        """As in a client's ledger."""
        return "" if self.text is None else digest(self.text)

    @property
    def submission(self) -> str:
        """Whose job it was."""
        return self.job.partition("-")[0]

    @property
    def block(self) -> str:
        """The job that it was put in with; a document that was refused alone has one of its own."""
        return self.job.partition("-refused-")[0]


def judge(
    entries: Iterable[Entry],
    held: Mapping[str, Held],
    buried: Iterable[Buried],
    verdict: Verdict,
    deaths: Mapping[str, int] | None = None,
    *,
    redis_lost_data: bool = False,
) -> None:
    """Compare; adds to ``verdict``. ``deaths``: how often each job's worker died."""
    dead: dict[str, Counter[str]] = defaultdict(Counter)
    worn: set[tuple[str, str]] = set()
    for one in buried:
        dead[one.id][one.digest] += 1
        if _check_burial(one, dead[one.id][one.digest], deaths or {}, verdict):
            worn.add((one.id, one.digest))
    for name, collection in held.items():
        verdict.documents += len(collection.visible)
        for id, copies in collection.visible.items():
            if len(copies) > 1:
                verdict.doubled.append(f"{name}/{id} is there {len(copies)} times: {copies}")
            _check_copy(name, id, copies[-1], collection, verdict)
            for text, _ in copies:
                if not dead[id][digest(text)]:
                    continue
                if redis_lost_data and (id, digest(text)) in worn:
                    verdict.forgotten += 1  # its block waited again, and only then met its deaths
                else:
                    verdict.doubled.append(f"{name}/{id} is in the index and in the dead letter")
    newest: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        verdict.acknowledged += 1
        key = entry.collection, entry.id
        if key not in newest or newest[key].revision < entry.revision:
            newest[key] = entry
    for (name, id), entry in newest.items():
        copies = held[name].visible.get(id, []) if name in held else []
        _check_newest(entry, copies, dead[id], verdict)


def _check_burial(one: Buried, times: int, deaths: Mapping[str, int], verdict: Verdict) -> bool:
    """Only what cannot be done belongs there, and what three workers died with; and once.

    Of deletions nobody can tell one from the next. Returns whether it is there for the deaths.
    """
    if times > 1 and one.text is not None:
        verdict.doubled.append(f"{one.id} is in the dead letter {times} times: {one.text[:60]!r}")
    if one.text is not None and may_die(one.text):
        return False
    if deaths.get(one.block, 0) >= MOST_DEATHS:
        verdict.worn += 1
        return True
    what = "its deletion" if one.text is None else "a text with nothing wrong in it"
    verdict.lost.append(f"{one.id}: {what} was buried as {one.job}: {one.error}")
    return False


def _check_newest(
    entry: Entry, copies: list[tuple[str, int]], dead: Counter[str], verdict: Verdict
) -> None:
    seen = max((revision_of(entry.id, text) for text, _ in copies), default=0)
    if (seen == 0) if entry.is_delete else (seen >= entry.revision):
        return
    if dead[entry.digest]:
        verdict.dead += 1
    elif seen <= entry.revision:
        wanted = "its deletion" if entry.is_delete else "it"
        verdict.lost.append(
            f"{entry.collection}/{entry.id}: {wanted} was acknowledged as revision "
            f"{entry.revision}, the index has {seen or 'none'}"
        )
    # Else a later write, on its way when the run ended, undid a deletion.


def _check_copy(
    name: str, id: str, copy: tuple[str, int], collection: Held, verdict: Verdict
) -> None:
    text, version = copy
    revision = revision_of(id, text)
    if not revision:
        verdict.lost.append(f"{name}/{id} has a text that nobody wrote: {text[:60]!r}")
        return
    if name == GIVEN and version != revision:
        verdict.lost.append(f"{name}/{id} has version {version} with the text of {revision}")
    stored = collection.vectors[id].astype(np.float32)
    wanted = fake_vector(text, len(stored))
    cosine = float(stored @ wanted / (np.linalg.norm(stored) or 1.0))
    if cosine < _COSINE:
        verdict.lost.append(f"{name}/{id} has another vector than its text: cosine {cosine:.4f}")
