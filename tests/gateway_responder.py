"""A worker by hand: claims interactive jobs from their lists and answers them from memory.

For tests of the gateway alone. It knows the embed and rerank jobs of one model and nothing of
leases; the real worker's own tests are elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis.asyncio

from vecfleet.common import codec, keys, payloads
from vecfleet.common.model import ModelCard

DIMENSION = 8
CARD = ModelCard(
    name="test/tiny",
    tasks=("embed", "rerank"),
    space="0123456789abcdef",
    dimension=DIMENSION,
    max_tokens=32,
    dtype="float32",
    engine="fake",
    rerank_method="cosine",
    prompts={"query": "query: "},
)


def vector(text: str, dimension: int = DIMENSION) -> bytes:
    """A vector that only this text has; its length is 1."""
    seed = hashlib.blake2b(text.encode(), digest_size=16).digest()
    numbers = [seed[i % 16] + 1.0 + i for i in range(dimension)]
    length = sum(x * x for x in numbers) ** 0.5
    return struct.pack(f"<{dimension}f", *(x / length for x in numbers))


class Responder:
    """Serves ``card`` while its context is open, but not between ``hold`` and ``go.set``."""

    def __init__(self, client: redis.asyncio.Redis, card: ModelCard = CARD) -> None:
        self.card = card
        self.seen: list[dict[str, Any]] = []
        self.go = asyncio.Event()
        self.go.set()
        self._held = asyncio.Event()
        self.answer: Callable[[str, dict[str, Any]], dict[str, Any]] = self._answer
        self._redis = client
        self._task: asyncio.Task[None] | None = None
        self._queues = [
            keys.embed_queue(card.space, "interactive"),
            keys.rerank_queue(card.space, "interactive"),
        ]

    async def __aenter__(self) -> Responder:
        await self.announce()
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def announce(self) -> None:
        """Show the model and one live worker."""
        seconds, _ = await self._redis.time()
        await self._redis.zadd(keys.MODELS, {self.card.name: seconds * 1000})
        await self._redis.set(keys.model(self.card.name), codec.dumps(self.card.to_wire()))
        for task in self.card.tasks:
            pool = f"{task}.{self.card.space}"
            await self._redis.zadd(keys.live(pool), {"responder": (seconds + 600) * 1000})

    async def hold(self) -> None:
        """Claim nothing more from now on."""
        self._held.clear()
        self.go.clear()
        await self._held.wait()

    async def _serve(self) -> None:
        lists = [keys.queue_list(queue) for queue in self._queues]
        while True:
            if not self.go.is_set():
                self._held.set()
                await self.go.wait()
            found = await self._redis.blpop(lists, timeout=0.05)
            if found is not None:
                await self._do(found[1].decode())

    async def _do(self, job_id: str) -> None:
        data, box, cost, origin = await self._redis.hmget(
            keys.job(job_id), "data", "vf_box", "vf_cost", "origin"
        )
        if data is None:
            return  # cancelled
        await self._redis.delete(keys.job(job_id))
        await self._redis.hincrby(keys.load(origin.decode()), "tokens", -int(cost))
        function, (payload,), _ = codec.unpack_call(data)
        self.seen.append(payload)
        reply = [job_id, "ok", self.answer(function, payload)]
        if "error" in reply[2]:
            reply[1:] = ["error", reply[2]["error"]]
        await self._redis.rpush(keys.reply(box.decode()), codec.dumps(reply))

    def _answer(self, function: str, payload: dict[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.card.name,
            "truncated": [],
            "queue_ms": 1.0,
            "inference_ms": 2.0,
        }
        if function == payloads.EMBED:
            names = ("prompt", "prompt_name", "instruction")
            before = self.card.prompt_of(**{name: payload.get(name) for name in names}) or ""
            length = self.card.vector_length(payload.get("dimensions"))
            texts = [before + text for text in payload["texts"]]
            return {
                **body,
                "dimension": length,
                "vectors": b"".join(vector(text, length) for text in texts),
                "tokens": [len(text.split()) for text in texts],
            }
        words = set(payload["query"].split())
        scores = [
            len(words & set(text.split())) / (len(words) or 1) for text in payload["documents"]
        ]
        return {
            **body,
            "method": "cosine",
            "scores": struct.pack(f"<{len(scores)}f", *scores),
            "tokens": [len(text.split()) for text in payload["documents"]],
        }
