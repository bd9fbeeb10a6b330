"""A client whose blocks hold texts that the engine cannot do, or dies of, among innocent ones.

It then clears up the dead letter: some entries stay, some are tried again as they are, some with a
text that is well, some are dropped.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

from chaos.http_client import POLL_S, GatewayClient
from chaos.story import Operation, cured_text_of, digest

_NEIGHBOURS = 12
_KINDS = {"raise": 5, "nan": 3, "memory": 3, "abort": 4, "hang": 1, "break": 2}
_FIRST = ("raise", "abort", "hang", "break")  # of the first calls, that all runs have them
_FATES = {"stays": 4, "again": 1, "cured": 3, "dropped": 2}


class PoisonClient(GatewayClient):
    """One block of a few innocent documents and one or two others at a time."""

    def do(self, now: Operation) -> None:
        chance = random.Random(f"{self.given.seed}/{now.name}/poison")
        kinds = chance.choices(list(_KINDS), list(_KINDS.values()), k=chance.randint(1, 2))
        if now.number < len(_FIRST):
            kinds = [_FIRST[now.number]]
        bad = [f"{now.name}.{place}!{kind}" for place, kind in enumerate(kinds)]
        ids = [*now.ids[:_NEIGHBOURS], *bad]
        chance.shuffle(ids)
        now = replace(now, ids=tuple(ids), is_delete=False)
        submission = str(self.post(now).json()["submission_id"])
        if not self.is_done(submission):
            return  # Redis lost it: the next round sends it again
        self.ledger.note("done", now.number, submission=submission)
        digests: dict[str, str] = {}
        for id in bad:
            fate = chance.choices(list(_FATES), list(_FATES.values()))[0]
            if now.number < len(_FIRST):
                fate = "stays"
            entry = f"{submission}-0-refused-{ids.index(id)}"
            if fate == "dropped" and self._drop(now, entry):
                digests[id] = ""
            elif fate == "again":
                self._retry(entry)
            elif fate == "cured" and self._cure(now, id, entry, submission):
                digests[id] = digest(cured_text_of(id, now.revision))
        self.ledger.acknowledge(now, digests, submission=submission)

    def _is_there(self, entry: str) -> bool:
        return bool(self.ask_until((200, 404), "GET", f"/dead/{entry}").status_code == 200)

    def _drop(self, now: Operation, entry: str) -> bool:
        """Whether it is out of the dead letter, and by us: in this life or an earlier one."""
        if self._is_there(entry):
            self.ledger.note("dropping", now.number, entry=entry)
            while self.ask("DELETE", f"/dead/{entry}").status_code not in (200, 404):
                time.sleep(POLL_S)
            return True
        return any(n.fields["entry"] == entry for n in self.notes("dropping", now.number))

    def _retry(self, entry: str, text: str | None = None) -> None:
        body = {} if text is None else {"json": {"text": text}}
        while self._is_there(entry):
            if self.ask("POST", f"/dead/{entry}/retry", **body).status_code in (202, 404):
                return
            time.sleep(POLL_S)

    def _cure(self, now: Operation, id: str, entry: str, submission: str) -> bool:
        """Whether the document came into the index with a text that is well."""
        if self._is_there(entry):
            self.ledger.note("curing", now.number, entry=entry)
        elif not any(n.fields["entry"] == entry for n in self.notes("curing", now.number)):
            return False
        path = f"/collections/{self.given.collection}/documents/{id}"
        while self.ask_until((200, 404), "GET", path).status_code != 200:
            self._retry(entry, cured_text_of(id, now.revision))  # where it is there, or again
            if self.ask("GET", f"/submissions/{submission}").status_code == 404:
                return False  # Redis has lost it all
            time.sleep(POLL_S)
        return True
