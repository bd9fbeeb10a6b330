"""Clients of the gateway: one that writes, deletes and cancels, and what all of them share."""

from __future__ import annotations

import argparse
import logging
import random
import time
from dataclasses import replace
from typing import Any

from chaos.client import RETRY_S, Client
from chaos.story import Operation

log = logging.getLogger("chaos.client")

POLL_S = 0.05
_REQUEST_TIMEOUT_S = 10.0
_DELETE_TIMEOUT_S = 60.0  # longer than a gateway works at it: a late one must not come after us
_LOST_AFTER_S = 3.0  # what is still open then will never be closed: its gateway's call is over
_DELETED_AT_ONCE = 5
_CANCELS = 0.1
_AGAIN = (404, 429, 500, 502, 503, 504)


class GatewayClient(Client):
    """Calls the gateway, again and again until it is answered."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given)
        import httpx

        headers = {"Authorization": f"Bearer {given.key}"} if given.key else {}
        self._http = httpx.Client(base_url=given.url, timeout=_REQUEST_TIMEOUT_S, headers=headers)
        self._transport_error = httpx.TransportError

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """The answer to a request that may be sent more than once."""
        while True:
            try:
                return self._http.request(method, path, **options)
            except self._transport_error as error:
                log.debug("%s %s: %s", method, path, error)
                time.sleep(RETRY_S)

    def ask_until(self, wanted: tuple[int, ...], method: str, path: str, **options: Any) -> Any:
        """The first answer with one of the ``wanted`` statuses; others must be worth a retry."""
        while True:
            answer = self.ask(method, path, **options)
            if answer.status_code in wanted:
                return answer
            if answer.status_code not in _AGAIN:
                raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text}")
            time.sleep(RETRY_S)

    def post(self, now: Operation, collection: str = "", *statuses: int) -> Any:
        """Send documents until they are accepted, or one of ``statuses`` says otherwise."""
        return self.ask_until(
            (202, *statuses),
            "POST",
            f"/collections/{collection or self.given.collection}/documents",
            json={"documents": now.documents(with_versions=self.given.versions == "given")},
            headers={"Idempotency-Key": now.name},
        )

    def is_done(self, submission: str) -> bool:
        """Wait until the submission is done; False when the fleet says that it is lost."""
        open_since: float | None = None
        while True:
            answer = self.ask("GET", f"/submissions/{submission}")
            if answer.status_code == 404:
                return False
            if answer.status_code == 200:
                state = answer.json()["state"]
                if state == "done":
                    return True
                # Accepted means closed. One that is open again has lost its end.
                open_since = (open_since or time.monotonic()) if state == "open" else None
                if open_since and time.monotonic() - open_since > _LOST_AFTER_S:
                    return False
            time.sleep(POLL_S)

    def until_it_holds(self, now: Operation, send: Any) -> str:
        """Send until it is acknowledged, and again where Redis lost it; the submission's id."""
        while True:
            submission: str = send()
            if self.given.until == "accepted":
                return submission
            self.ledger.note("accepted", now.number, submission=submission)
            if self.is_done(submission):
                self.ledger.note("done", now.number, submission=submission)
                return submission
            self.ledger.note("lost", now.number, submission=submission)
            log.warning("%s: lost by Redis, which was told; sending it again", now.name)

    def close(self) -> None:
        self._http.close()


class HttpClient(GatewayClient):
    """Writes, each call with an Idempotency-Key; deletes; and cancels some of what it wrote.

    Acknowledged is what was answered with 202, or, with ``--until done``, what the submission then
    reported as done. What was cancelled is in no ledger: it may be there or not.
    """

    def do(self, now: Operation) -> None:
        chance = random.Random(f"{self.given.seed}/{now.name}/how")
        if now.is_delete:
            self.ledger.note("deleting", now.number)  # all of it, whatever an earlier life did
            now = replace(now, ids=now.ids[:_DELETED_AT_ONCE])
            for id in now.ids:
                self.until_it_holds(now, lambda id=id: self._delete(now, id))
            self.ledger.acknowledge(now)
        elif self.given.cancels == "yes" and chance.random() < _CANCELS:
            self._cancel(now, chance.random() * POLL_S)
        else:
            told = self.until_it_holds(now, lambda: self.post(now).json()["submission_id"])
            self.ledger.acknowledge(now, submission=told)

    def _delete(self, now: Operation, id: str) -> str:
        path = f"/collections/{self.given.collection}/documents/{id}"
        version = {"version": now.revision} if self.given.versions == "given" else {}
        answer = self.ask_until((202,), "DELETE", path, params=version, timeout=_DELETE_TIMEOUT_S)
        return str(answer.json()["submission_id"])

    def _cancel(self, now: Operation, after_s: float) -> None:
        answer = self.post(now, "", 409)  # 409: an earlier life of ours has cancelled it
        if answer.status_code == 202:
            time.sleep(after_s)
            path = f"/submissions/{answer.json()['submission_id']}"
            answer = self.ask_until((200, 404), "DELETE", path)
            if answer.status_code == 200 and answer.json()["state"] not in ("cancelled", "done"):
                self.ledger.note("wrong", now.number, said=f"cancelled, and is {answer.text}")
        self.ledger.acknowledge(replace(now, ids=()))
