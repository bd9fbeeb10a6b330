"""What a client does, derived from a seed: so that it can go on after its death, and be checked.

Each client has ids of its own and does one operation after the other. Operation k writes or deletes
some documents as revision k + 1; a text says whose it is, so that the oracle can recompute it.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from vecfleet.worker.fake_engine import ABORT, BREAK, HANG, NAN, NO_MEMORY, POISON

POOL = 300  # ids of a client: small enough that most operations replace something
MOST_DOCUMENTS = 40
_DELETES = 0.08
DEADLY = (POISON, ABORT, HANG, BREAK, NAN)
"""What a text holds that the fake engine cannot do, or dies of. Nothing else may be buried."""
MARKS = {
    "raise": POISON,
    "abort": ABORT,
    "hang": HANG,
    "break": BREAK,
    "nan": NAN,
    "memory": NO_MEMORY,
}
"""What stands in all texts of an id that ends with "!" and such a word."""
_WORDS = ("red", "green", "blue", "river", "stone", "cloud", "lamp", "tree", "wind", "salt", "iron")


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a client."""

    client: str
    number: int
    ids: tuple[str, ...]
    is_delete: bool

    @property
    def revision(self) -> int:
        """Of all documents in it."""
        return self.number + 1

    @property
    def name(self) -> str:
        """Its submission's name or idempotency key."""
        return f"{self.client}-{self.number}"

    def documents(self, *, with_versions: bool) -> list[dict[str, object]]:
        """As they are sent."""
        return [
            {"id": id, "text": text_of(id, self.revision)}
            | ({"version": self.revision} if with_versions else {})
            for id in self.ids
        ]


def operation(seed: int, client: str, number: int, *, may_delete: bool) -> Operation:
    """Operation ``number`` of a client."""
    chance = random.Random(f"{seed}/{client}/{number}")
    count = chance.randint(1, MOST_DOCUMENTS)
    ids = tuple(f"{client}:{n}" for n in sorted(chance.sample(range(POOL), count)))
    return Operation(client, number, ids, may_delete and chance.random() < _DELETES)


def text_of(id: str, revision: int) -> str:
    """The text of a document's revision."""
    mark = MARKS.get(id.rpartition("!")[2], "")
    return f"{cured_text_of(id, revision)} {mark}".rstrip()


def cured_text_of(id: str, revision: int) -> str:
    """The same without what the engine cannot do."""
    chance = random.Random(f"{id}/{revision}")
    return f"{id} as of {revision}: " + " ".join(chance.choices(_WORDS, k=chance.randint(3, 30)))


def revision_of(id: str, text: str) -> int:
    """Which revision of ``id`` has this text; 0 for a text that nobody wrote."""
    head = f"{id} as of "
    number = text[len(head) :].partition(":")[0] if text.startswith(head) else ""
    if not number.isdigit():
        return 0
    if text not in (text_of(id, int(number)), cured_text_of(id, int(number))):
        return 0
    return int(number)


def digest(text: str) -> str:
    """What the ledger notes of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def may_die(text: str) -> bool:
    """Whether a text was sent to see it die: no other one belongs into the dead letter."""
    return any(mark in text for mark in DEADLY)
