"""A client as a process of its own, which may be killed: it continues from its ledger.

``producer`` calls the Producer API; acknowledged is what ``submit`` or ``delete_documents``
returned for. ``http`` calls the gateway; acknowledged is what it answered with 202, or, with
``--until done``, what the submission then reported as done. It goes on until there is a file
``stop`` beside its ledger; each life does at least one operation, so none is left half done.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos.client_ledger import ClientLedger
from chaos.story import Operation, operation

log = logging.getLogger("chaos.client")

_RETRY_S = 0.1
_POLL_S = 0.05
_REQUEST_TIMEOUT_S = 10.0
_LOST_AFTER_S = 3.0  # what is still open then will never be closed: its gateway's call is over


class Client:
    """One operation after the other."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.ledger = ClientLedger(Path(given.ledger), given.collection)
        self.stop = Path(given.ledger).with_name("stop")
        self.noticed_losses = 0

    def run(self) -> int:
        """Go on where the ledger ends; the exit code."""
        given = self.given
        while not given.operations or self.ledger.next < given.operations:
            now = operation(
                given.seed,
                given.name,
                self.ledger.next,
                may_delete=given.deletes == "yes",
            )
            self.do(now)
            self.ledger.acknowledge(now)
            if self.stop.exists():
                break
            time.sleep(given.pause)
        log.info("client done: %d operations", self.ledger.next)
        self.close()
        return 0

    def do(self, now: Operation) -> None:
        """Return when it is acknowledged."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go."""


class ProducerClient(Client):
    """Through the Producer API, each submission with a journal."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given)
        from vecfleet.producer.sync_producer import Producer

        self._producer = Producer(given.url, timeout_s=5.0)

    def do(self, now: Operation) -> None:
        from vecfleet.common.errors import VecfleetError

        given_versions = self.given.versions == "given"
        while True:
            try:
                if now.is_delete:
                    version = now.revision if given_versions else None
                    self._producer.delete_documents(
                        self.given.collection, list(now.ids), version=version
                    )
                    return
                result = self._producer.submit(
                    now.documents(with_versions=given_versions),
                    collection=self.given.collection,
                    submission=now.name,
                    journal=Path(self.given.ledger).with_suffix(f".{now.number}.jsonl"),
                )
                if result.documents != len(now.ids):
                    raise RuntimeError(f"{now.name}: {len(now.ids)} documents, told {result}")
                if result.failed or result.rejected:
                    log.warning("%s: %s", now.name, result)
                return
            except VecfleetError as error:
                if not error.retryable:
                    raise
                log.warning("%s again: %s", now.name, error)
                time.sleep(_RETRY_S)

    def close(self) -> None:
        self._producer.close()


class HttpClient(Client):
    """Through the gateway, each call with an Idempotency-Key until it is answered."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given)
        import httpx

        self._http = httpx.Client(base_url=given.url, timeout=_REQUEST_TIMEOUT_S)
        self._transport_error = httpx.TransportError

    def do(self, now: Operation) -> None:
        while True:
            submission = self._post(now)
            if self.given.until == "accepted" or self._is_done(submission):
                return
            self.noticed_losses += 1
            log.warning("%s: lost by Redis, which was told; sending it again", now.name)

    def _post(self, now: Operation) -> str:
        """Send until it is accepted; the submission's id."""
        path = f"/collections/{self.given.collection}/documents"
        body = {"documents": now.documents(with_versions=self.given.versions == "given")}
        while True:
            answer = self._ask("POST", path, json=body, headers={"Idempotency-Key": now.name})
            if answer.status_code == 202:
                return str(answer.json()["submission_id"])
            if answer.status_code not in (404, 429, 500, 502, 503, 504):
                raise RuntimeError(f"{now.name}: {answer.status_code} {answer.text}")
            time.sleep(_RETRY_S)

    def _is_done(self, submission: str) -> bool:
        """Wait until the submission is done; False when the fleet says that it is lost."""
        open_since: float | None = None
        while True:
            answer = self._ask("GET", f"/submissions/{submission}")
            if answer.status_code == 404:
                return False
            if answer.status_code == 200:
                told = answer.json()
                if told["state"] == "done":
                    return True
                if told["state"] == "lost" or told.get("lost"):
                    return False
                # Accepted means closed. One that is open again has lost its end.
                open_since = (open_since or time.monotonic()) if told["state"] == "open" else None
                if open_since and time.monotonic() - open_since > _LOST_AFTER_S:
                    return False
            time.sleep(_POLL_S)

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        while True:
            try:
                return self._http.request(method, path, **options)
            except self._transport_error as error:
                log.debug("%s %s: %s", method, path, error)
                time.sleep(_RETRY_S)

    def close(self) -> None:
        self._http.close()


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="client")
    parser.add_argument("kind", choices=["producer", "http"])
    parser.add_argument("--url", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--versions", default="assigned")
    parser.add_argument("--ledger", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--operations", type=int, default=0, help="0: until told to stop")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--deletes", default="no", choices=["yes", "no"])
    parser.add_argument("--until", default="accepted", choices=["accepted", "done"])
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return (ProducerClient if given.kind == "producer" else HttpClient)(given).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
