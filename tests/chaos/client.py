"""A client as a process of its own, which may be killed: it continues from its ledger.

``producer`` calls the Producer API; acknowledged is what ``submit`` or ``delete_documents``
returned for. The others call the gateway: ``http`` writes, deletes and cancels; ``poison`` sends
texts that the engine cannot do or dies of, and clears up the dead letter; ``keeper`` creates and
deletes collections; ``asker`` asks and waits for answers. Each goes on until there is a file
``stop`` beside its ledger; each life does at least one operation, so none is left half done.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from chaos.client_ledger import ClientLedger, Note, read_notes
from chaos.story import Operation, operation

log = logging.getLogger("chaos.client")

RETRY_S = 0.1
KINDS = {
    "producer": "chaos.client:ProducerClient",
    "http": "chaos.http_client:HttpClient",
    "poison": "chaos.poison_client:PoisonClient",
    "keeper": "chaos.keeper_client:KeeperClient",
    "asker": "chaos.asker:Asker",
}


class Client:
    """One operation after the other."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.ledger = ClientLedger(Path(given.ledger), given.collection)
        self.stop = Path(given.ledger).with_name("stop")

    def run(self) -> int:
        """Go on where the ledger ends; the exit code."""
        given = self.given
        while not given.operations or self.ledger.next < given.operations:
            self.do(
                operation(
                    given.seed,
                    given.name,
                    self.ledger.next,
                    may_delete=given.deletes == "yes",
                )
            )
            if self.stop.exists():
                break
            time.sleep(given.pause)
        log.info("client done: %d operations", self.ledger.next)
        self.close()
        return 0

    def do(self, now: Operation) -> None:
        """Return when it is acknowledged, and in the ledger."""
        raise NotImplementedError

    def notes(self, what: str, number: int) -> list[Note]:
        """What this or an earlier life wrote down of an operation."""
        found = read_notes(Path(self.given.ledger), what)
        return [note for note in found if note.number == number]

    def close(self) -> None:
        """Let go."""


class ProducerClient(Client):
    """Through the Producer API, each submission with a journal."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given)
        from vecfleet.producer.sync_producer import Producer

        self._producer = Producer(given.url, tenant=given.tenant, timeout_s=5.0)

    def do(self, now: Operation) -> None:
        from vecfleet.common.errors import VecfleetError

        while True:
            try:
                self._send(now)
                break
            except VecfleetError as error:
                if not error.retryable:
                    raise
                log.warning("%s again: %s", now.name, error)
                time.sleep(RETRY_S)
        self.ledger.acknowledge(now)

    def _send(self, now: Operation) -> None:
        given_versions = self.given.versions == "given"
        if now.is_delete:
            version = now.revision if given_versions else None
            self._producer.delete_documents(self.given.collection, list(now.ids), version=version)
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

    def close(self) -> None:
        self._producer.close()


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="client")
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--url", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--tenant", required=True)
    parser.add_argument("--key", default="", help="an API key, where the gateway asks for one")
    parser.add_argument("--versions", default="assigned")
    parser.add_argument("--ledger", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--operations", type=int, default=0, help="0: until told to stop")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--deletes", default="no", choices=["yes", "no"])
    parser.add_argument("--cancels", default="no", choices=["yes", "no"])
    parser.add_argument("--until", default="accepted", choices=["accepted", "done"])
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return _client(given).run()


def _client(given: argparse.Namespace) -> Client:
    import importlib

    module, _, name = KINDS[given.kind].partition(":")
    made: Client = getattr(importlib.import_module(module), name)(given)
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
