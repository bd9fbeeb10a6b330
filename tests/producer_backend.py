"""The fleet behind Redis, by hand: takes blocks as a worker and an aggregator would, in memory.

For tests of the producer alone: it can hold still, lose jobs and answers, and refuse documents.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio
import redis.exceptions

from vecfleet.common import codec, keys, payloads
from vecfleet.common.collection import Collection, CollectionSpec, VersionMode
from vecfleet.common.hashing import content_key, id_key
from vecfleet.common.model import ModelCard

SPACE = "0123456789abcdef"
CARD = ModelCard("test/tiny", ("embed",), SPACE, 8, 64, "float32", "fake")

# Settles a block as settle.lua does: the job goes in the same step that sets the bit.
_SETTLE = """
local job = redis.call('HMGET', KEYS[1], 'vf_box', 'vf_sub', 'vf_block')
if not job[1] and not job[2] then return 0 end
redis.call('DEL', KEYS[1])
local sub = 'vf:sub:' .. job[2]
if redis.call('HGET', sub, 'state') then
  redis.call('SETBIT', sub .. ':' .. ARGV[1], job[3], 1)
  redis.call('HINCRBY', sub, 'committed_documents', ARGV[2])
  redis.call('HINCRBY', sub, 'failed_documents', ARGV[3])
end
if ARGV[4] ~= '' and job[1] and redis.call('EXISTS', 'vf:alive:' .. job[1]) == 1 then
  redis.call('RPUSH', 'vf:reply:' .. job[1], ARGV[4])
end
return 1
"""

_AWAY = (redis.exceptions.ConnectionError, redis.exceptions.BusyLoadingError)


class Backend:
    """One collection ``c``; what it holds is ``rows``: id -> (version, text)."""

    def __init__(self, client: redis.asyncio.Redis, versions: VersionMode = "assigned") -> None:
        self.collection = Collection(
            "c", "a" * 32, CollectionSpec("test/tiny", SPACE, 8, versions=versions)
        )
        self.rows: dict[str, tuple[int, str]] = {}
        self.merged: list[tuple[str, list[str]]] = []  # job id and the ids of its documents
        self.go = asyncio.Event()
        self.go.set()
        self.most_blocks: int | None = None  # takes so many, then holds still
        self.drop_answers = False
        self.lose_next = 0  # so many jobs vanish
        self.discards = False  # as an aggregator does for a deleted collection
        self.refused_ids: set[str] = set()
        self.failing_ids: set[str] = set()  # their whole block goes to the dead letter
        self._redis = client
        self._task: asyncio.Task[None] | None = None
        self._settle = client.register_script(_SETTLE)

    async def __aenter__(self) -> Backend:
        await self.announce()
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        while not self._task.done():  # redis-py can lose a cancellation while it connects
            self._task.cancel()
            await asyncio.wait([self._task], timeout=0.1)

    async def announce(self) -> None:
        """Show the model, one worker and the collection."""
        seconds, _ = await self._redis.time()
        await self._redis.zadd(keys.MODELS, {CARD.name: seconds * 1000})
        await self._redis.set(keys.model(CARD.name), codec.dumps(CARD.to_wire()))
        await self._redis.zadd(keys.live(f"embed.{SPACE}"), {"backend": (seconds + 600) * 1000})
        record = codec.dumps(self.collection.to_wire())
        await self._redis.hset(keys.collections(), "c", record)
        await self._redis.set(keys.PUBLISHED, 1)

    @property
    def jobs(self) -> list[str]:
        """The ids of the jobs whose documents were merged, each time they were."""
        return [job_id for job_id, _ in self.merged]

    async def _serve(self) -> None:
        bulk = keys.queue_list(keys.embed_queue(SPACE, "bulk"))
        reads = keys.queue_list(keys.search_queue())
        deletes = keys.queue_list(self.collection.merge_queue)
        while True:
            try:
                lists = [reads, deletes] + ([bulk] if self._takes_blocks() else [])
                found = await self._redis.blpop(lists, timeout=0.02)
            except _AWAY:
                await asyncio.sleep(0.01)
                continue
            if found is not None:
                await self._persist(found[1].decode(), is_read=found[0].decode() == reads)

    async def _persist(self, job_id: str, *, is_read: bool) -> None:
        """What a lease is for: a claimed job is done, also when Redis restarts meanwhile."""
        while True:
            try:
                return await self._do(job_id, is_read=is_read)
            except _AWAY:
                await asyncio.sleep(0.01)
                if self.merged and self.merged[-1][0] == job_id:
                    self.merged.pop()

    def _takes_blocks(self) -> bool:
        enough = self.most_blocks is not None and len(self.merged) >= self.most_blocks
        return self.go.is_set() and not enough

    async def _do(self, job_id: str, *, is_read: bool) -> None:
        fields = await self._redis.hgetall(keys.job(job_id))
        if not fields:
            return
        load = keys.load(fields[b"origin"].decode())
        await self._redis.hincrby(load, "tokens", -int(fields[b"vf_cost"]))
        await self._redis.hincrby(load, "bytes", -len(fields[b"data"]))
        function, (payload,), _ = codec.unpack_call(fields[b"data"])
        if is_read:
            await self._redis.delete(keys.job(job_id))
            reply = codec.dumps([job_id, "ok", self._read(function, payload)])
            await self._redis.rpush(keys.reply(fields[b"vf_box"].decode()), reply)
        elif self.lose_next:
            self.lose_next -= 1
            await self._redis.delete(keys.job(job_id))
        else:
            await self._merge(job_id, payload, fields)

    async def _merge(
        self, job_id: str, payload: dict[str, Any], fields: dict[bytes, bytes]
    ) -> None:
        assigned = int(fields.get(b"vf_version", 0))
        ids = payload.get("ids") or payload["delete"]
        if self.failing_ids & set(ids):
            error = {"code": "engine_failed", "message": "the engine failed"}
            reply = codec.dumps([job_id, "error", error])
            await self._settle(keys=[keys.job(job_id)], args=["bad", 0, len(ids), reply])
            return
        kept = [] if self.discards else [i for i in ids if i not in self.refused_ids]
        for document_id in ids:
            if document_id in self.refused_ids:
                entry = {"id": document_id, "code": "text_too_long", "message": "too long"}
                errors = f"{keys.submission(fields[b'vf_sub'].decode())}:errors"
                await self._redis.rpush(errors, codec.dumps(entry))
        given = payload.get("versions") or [payload.get("version")] * len(ids)
        for place, document_id in enumerate(ids):
            version = assigned or given[place]
            if document_id in kept and version >= self.rows.get(document_id, (0, ""))[0]:
                if "delete" in payload:
                    self.rows.pop(document_id, None)
                else:
                    self.rows[document_id] = (version, payload["texts"][place])
        self.merged.append((job_id, kept))
        body = {"version": assigned, "documents": len(kept)}
        reply = b"" if self.drop_answers else codec.dumps([job_id, "ok", body])
        arguments = ["ok", len(kept), len(ids) - len(kept), reply]
        await self._settle(keys=[keys.job(job_id)], args=arguments)

    def _read(self, function: str, payload: dict[str, Any]) -> dict[str, Any]:
        if function == payloads.STATS:
            return {"documents": len(self.rows), "segments": 1, "bytes": 0}
        if function == payloads.GET:
            found = [self.rows.get(i) for i in payload["ids"]]
            return {
                "documents": [
                    None if row is None else {"id": i, "text": row[1], "version": row[0]}
                    for i, row in zip(payload["ids"], found, strict=True)
                ]
            }
        assert function == payloads.UNCHANGED
        known = {id_key(i): content_key(text, None) for i, (_, text) in self.rows.items()}
        ids, contents = payload["id_keys"], payload["content_keys"]
        flags = [
            known.get(ids[16 * i : 16 * i + 16]) == contents[8 * i : 8 * i + 8]
            for i in range(len(ids) // 16)
        ]
        return {"unchanged": bytes(flags)}
