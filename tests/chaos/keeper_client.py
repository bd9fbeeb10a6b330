"""A client that creates and deletes collections, and puts documents into them in between."""

from __future__ import annotations

from dataclasses import replace

from chaos.http_client import GatewayClient
from chaos.story import Operation

_NAMES = 3
_DOCUMENTS = 5
_TIMEOUT_S = 60.0  # longer than a gateway works at it: a late one must not come after us
MODEL = "chaos"


class KeeperClient(GatewayClient):
    """By turns a collection comes and goes; the same few names again and again."""

    def do(self, now: Operation) -> None:
        turn, place = divmod(now.number, _NAMES)
        name = f"{self.given.name}-{place}"
        path = f"/collections/{name}"
        if turn % 2:
            self._post_to_its_end(now, name)
            # 404: a reply that we did not get, here or in an earlier life.
            self.ask_until((200, 404), "DELETE", path, timeout=_TIMEOUT_S)
            self.ledger.acknowledge(replace(now, ids=()), collection=name, exists=False)
            return
        self.ask_until((201,), "PUT", path, json={"model": MODEL}, timeout=_TIMEOUT_S)
        ids = tuple(f"{self.given.name}:{now.number}.{n}" for n in range(_DOCUMENTS))
        now = replace(now, ids=ids, is_delete=False)
        told = self.until_it_holds(now, lambda: self.post(now, name).json()["submission_id"])
        self.ledger.acknowledge(now, collection=name, submission=told)

    def _post_to_its_end(self, now: Operation, name: str) -> None:
        """Some documents that are on their way when their collection goes."""
        ids = tuple(f"{self.given.name}:{now.number}.{n}" for n in range(_DOCUMENTS))
        path = f"/collections/{name}/documents"
        body = {"documents": replace(now, ids=ids, is_delete=False).documents(with_versions=False)}
        self.ask("POST", path, json=body, headers={"Idempotency-Key": now.name})
