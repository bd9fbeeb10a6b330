"""Does the index find what an exact search finds?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vecfleet.bench.context import Bench
from vecfleet.bench.rig import Rig
from vecfleet.bench.stats import median, quantile
from vecfleet.bench.targets import Measured
from vecfleet.common import codec, limits, payloads
from vecfleet.common.block_job import block_job_id
from vecfleet.common.collection import Collection
from vecfleet.common.names import new_id
from vecfleet.common.queue_client import NewJob, Route
from vecfleet.worker.shard import build_shard

TOP_K = 10
MOST_MIXED = 0.5  # how far a document may lie on the way to another passage
NOISE = 0.3  # length of the noise beside a vector of length 1
JOBS_AT_ONCE = 64


async def measure(bench: Bench, keys: set[str]) -> dict[str, Measured]:
    """``ivf_recall_at_10`` through the running fleet, its index built by the default policy.

    Real vectors of passages are too slow to make for so many documents, so the documents are
    mixed from a few thousand of them: a passage's vector moved towards that of another one, with
    noise. They go in as shards, the way a worker's do. The queries are real: short questions about
    other passages, embedded by the fleet.
    """
    sizes = bench.sizes
    async with bench.rig() as rig:
        bench.say(f"embedding {sizes.recall_anchors} passages to mix documents from")
        anchors = await _embed(rig, bench.passages[: sizes.recall_anchors])
        queries = await _embed(rig, bench.queries[: sizes.recall_queries])
        collection = await rig.client.create_collection("mixed")
        await _fill(rig, collection, _mixed(anchors, sizes.recall_documents))
        stats = await rig.until_calm(collection)
        bench.say(f"searching {stats['documents']} documents, {stats['indexed']} of them indexed")
        found, took_ms = await _search(rig, collection, queries, exact=False)
        truth, exact_ms = await _search(rig, collection, queries, exact=True)
    shares = [len(a & b) / len(b) for a, b in zip(found, truth, strict=True)]
    return {
        "ivf_recall_at_10": Measured(
            sum(shares) / len(shares),
            {
                "queries": len(shares),
                "worst_tenth": round(quantile(shares, 0.1), 2),
                "search_p50_ms": round(median(took_ms), 2),
                "exact_p50_ms": round(median(exact_ms), 2),
                "documents": stats["documents"],
                "indexed": stats["indexed"],
                "segments": stats["segments"],
            },
            also=stats["indexed"] > 0,
        )
    }


async def _embed(rig: Rig, passages: Sequence[str]) -> NDArray[np.float32]:
    parts = []
    for start in range(0, len(passages), limits.BLOCK_DOCUMENTS * 2):
        part = passages[start : start + limits.BLOCK_DOCUMENTS * 2]
        reply = await rig.client.embed(part, lane="bulk")
        parts.append(np.frombuffer(reply.vectors, "<f4").reshape(-1, reply.dimension))
    return np.concatenate(parts)


def _mixed(anchors: NDArray[np.float32], count: int) -> Iterator[NDArray[np.float32]]:
    """Blocks of vectors, each near one real vector and on the way to another."""
    chance = np.random.default_rng(7)
    dimension = anchors.shape[1]
    for start in range(0, count, limits.BLOCK_DOCUMENTS):
        rows = min(limits.BLOCK_DOCUMENTS, count - start)
        one, other = anchors[chance.integers(len(anchors), size=(2, rows))]
        way = chance.uniform(0, MOST_MIXED, (rows, 1)).astype(np.float32)
        noise = chance.standard_normal((rows, dimension), np.float32) / np.sqrt(dimension)
        mixed = one + way * (other - one) + NOISE * noise
        yield (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


async def _fill(rig: Rig, collection: Collection, blocks: Iterator[NDArray[np.float32]]) -> None:
    """Send vectors as a worker hands them on, and wait until they are committed."""
    client, spec, name = rig.client, collection.spec, new_id()
    await client.submissions.open(name, tenant="-", collection="mixed", uid=collection.uid)
    route = Route(box=client.box.name, submission=name)
    room = asyncio.Semaphore(JOBS_AT_ONCE)
    tasks = []
    documents = 0

    async def send(place: int, ids: list[str], vectors: NDArray[np.float32]) -> None:
        job_id = block_job_id(name, place)
        shard = build_shard(
            job_id,
            spec.space,
            spec.dimension,
            ids=ids,
            texts=ids,
            vectors=vectors,
            versions=[1] * len(ids),
        )
        settled = client.box.expect(job_id)
        data = codec.pack_call(payloads.MERGE, shard)
        job = NewJob(job_id, data, len(ids), place, len(ids))
        await client.queues.enqueue(collection.merge_queue, [job], route)
        await settled
        room.release()

    for place, vectors in enumerate(blocks):
        ids = [f"mixed-{documents + row}" for row in range(len(vectors))]
        documents += len(vectors)
        await room.acquire()
        tasks.append(asyncio.create_task(send(place, ids, vectors)))
    await client.submissions.close(name, blocks=len(tasks), documents=documents)
    await asyncio.gather(*tasks)


async def _search(
    rig: Rig, collection: Collection, queries: NDArray[np.float32], *, exact: bool
) -> tuple[list[set[str]], list[float]]:
    """The ids found for each query, and the milliseconds of each."""
    found: list[set[str]] = []
    took_ms: list[float] = []
    for query in queries:
        reply = await rig.client.search(
            collection, query.astype("<f4").tobytes(), top_k=TOP_K, exact=exact
        )
        found.append({hit.id for hit in reply.hits[0]})
        took_ms.append(reply.search_ms)
    return found, took_ms
