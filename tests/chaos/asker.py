"""A client that waits for answers: texts to vectors, and searches.

Each call must end in time with an answer that is right, or with an error that the contract names.
What it got goes into a file beside the ledger, one word a line; what was wrong into the ledger.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

from chaos.http_client import GatewayClient
from chaos.story import Operation, revision_of, text_of

GATEWAY_TIMEOUT_S = 10.0  # its setting in storms
_MOST_S = 25.0  # with a gateway that stands still for a while, and Redis behind it
_COSINE = 0.9999
_SCORE_ERROR = 2e-3  # vectors are kept as float16
_REFUSALS = {
    "queue_full": 429,
    "unavailable": 503,
    "no_worker": 503,
    "redis_unavailable": 503,
    "engine_broken": 503,
    "deadline_exceeded": 504,
    "job_failed": 500,  # its worker died three times
}
SUFFIX = ".asked"


class Asker(GatewayClient):
    """One call after the other."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given)
        self._asked = Path(given.ledger).with_suffix(SUFFIX).open("a", buffering=1)

    def do(self, now: Operation) -> None:
        text = text_of(now.ids[0], now.revision)
        ask = self._search if now.number % 2 else self._embed
        began = time.monotonic()
        try:
            word = ask(now, text)
        except self._transport_error as error:
            word = "cut"
            if time.monotonic() - began > _MOST_S:
                word = self._wrong(now, f"no answer within {_MOST_S} s: {error!r}")
        self._asked.write(f"{word}\n")
        self.ledger.acknowledge(self._nothing(now))

    @staticmethod
    def _nothing(now: Operation) -> Operation:
        return Operation(now.client, now.number, (), is_delete=False)

    def _embed(self, now: Operation, text: str) -> str:
        body = {"model": "chaos", "input": [text]}
        answer = self._http.post("/v1/embeddings", json=body, timeout=_MOST_S)
        if answer.status_code != 200:
            return self._refusal(now, answer)
        (found,) = answer.json()["data"]
        if _cosine(text, found["embedding"]) < _COSINE:
            return self._wrong(now, f"another vector than that of {text[:60]!r}")
        return "answered"

    def _search(self, now: Operation, text: str) -> str:
        path = f"/collections/{self.given.collection}/search"
        body = {"query": text, "top_k": 3}
        answer = self._http.post(path, json=body, timeout=_MOST_S)
        if answer.status_code != 200:
            return self._refusal(now, answer)
        hits = answer.json()["results"]
        for hit in hits:
            if not revision_of(hit["id"], hit["text"]):
                return self._wrong(now, f"a text that nobody wrote: {hit}")
            if abs(_cosine(text, _vector(hit["text"])) - hit["score"]) > _SCORE_ERROR:
                return self._wrong(now, f"a score that is not its text's: {hit}")
        if len({hit["id"] for hit in hits}) < len(hits):
            return self._wrong(now, f"one document twice: {hits}")
        return "answered"

    def _refusal(self, now: Operation, answer: Any) -> str:
        try:
            code = answer.json()["error"]["code"]
        except (ValueError, KeyError, TypeError):
            code = ""
        if _REFUSALS.get(code) != answer.status_code:
            return self._wrong(now, f"{answer.status_code} {answer.text[:200]}")
        return str(code)

    def _wrong(self, now: Operation, said: str) -> str:
        self.ledger.note("wrong", now.number, said=said)
        return "wrong"


def _vector(text: str, dimension: int = 32) -> Any:
    from vecfleet.worker.fake_engine import fake_vector

    return fake_vector(text, dimension)


def _cosine(text: str, vector: Any) -> float:
    import numpy as np

    other = np.asarray(vector, np.float32)
    return float(_vector(text, len(other)) @ other / (np.linalg.norm(other) or 1.0))


def answers(folder: Path) -> Counter[str]:
    """How often which answer came, over all askers."""
    return Counter(
        line for path in folder.glob(f"*{SUFFIX}") for line in path.read_text().splitlines()
    )
