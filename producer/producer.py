"""The door for programs: documents into collections through Redis, without HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from vecfleet.common import keys, limits
from vecfleet.common.admission import Admission
from vecfleet.common.collection import Collection
from vecfleet.common.dead_entry import DeadEntry
from vecfleet.common.dead_letter import DeadPage
from vecfleet.common.dead_walk import DeadFilter, parse_since
from vecfleet.common.document import check_text, check_texts, naming_texts
from vecfleet.common.errors import InvalidInput, ReplyTooLarge
from vecfleet.common.fleet_client import DEFAULT_TIMEOUT_S, FleetClient
from vecfleet.common.payloads import EmbedReply, RerankReply, StoredDocument
from vecfleet.common.redis_client import connect_async
from vecfleet.common.vectors import as_numbers, parse_vector
from vecfleet.producer.asking import find, fleet_status, query_vector, reranked
from vecfleet.producer.cutting import Cutter, Item
from vecfleet.producer.deleting import delete
from vecfleet.producer.found import FleetStatus, Found
from vecfleet.producer.items import Rejected
from vecfleet.producer.naming import begin
from vecfleet.producer.options import SubmitOptions
from vecfleet.producer.pulling import AsyncPuller, IterablePuller, WorkLine
from vecfleet.producer.result import Progress, SubmissionResult
from vecfleet.producer.submitter import Submitter, Task

log = logging.getLogger(__name__)

Documents = Iterable[Item] | AsyncIterable[Item]

_MANY_IDS = 1024
_A = TypeVar("_A")


class AsyncProducer:
    """Puts documents into collections and asks the fleet; for one event loop.

    Connects at its first call. Use it as an async context manager, or ``close`` it.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        tenant: str = keys.DEFAULT_TENANT,
        admission: Admission | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        journal_dir: str | Path | None = None,
    ) -> None:
        """``journal_dir`` keeps a journal of each submission; ``timeout_s`` bounds each question.

        Raises ``ConfigError`` when the URL is none.
        """
        self._fleet = FleetClient(
            connect_async(redis_url), admission=admission, timeout_s=timeout_s
        )
        self._tenant = tenant
        self._timeout_s = timeout_s
        self._journal_dir = None if journal_dir is None else Path(journal_dir)
        self._opening = asyncio.Lock()
        self._is_open = False

    async def __aenter__(self) -> Self:
        await self.fleet()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def fleet(self) -> FleetClient:
        """The connected client; raises ``RedisUnavailable``."""
        async with self._opening:
            if not self._is_open:
                await self._fleet.box.open()
                self._is_open = True
        return self._fleet

    async def close(self) -> None:
        """Disconnect; what was submitted goes on without us."""
        self._is_open = False
        await self._fleet.box.close()
        await self._fleet.redis.aclose()

    # Documents in

    async def submit(
        self,
        documents: Documents,
        *,
        collection: str,
        submission: str | None = None,
        journal: str | Path | None = None,
        options: SubmitOptions | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_reject: Callable[[Rejected], None] | None = None,
        stop: asyncio.Event | None = None,
        line: WorkLine | None = None,
    ) -> SubmissionResult:
        """Put documents into ``collection`` and wait until they are in the index.

        ``documents`` holds ``Document``s, mappings with id, text, metadata and version, or what
        ``readers`` read; an iterable is read in a thread of its own, or the one that serves
        ``line``. ``submission`` names the call: the same name with the same documents puts them in
        once, however often it is tried; a result's ``submission`` continues that one. The journal
        also keeps the versions of an interrupted call. What is no document goes to ``on_reject``.
        ``stop`` ends early: nothing more is sent, what is in flight is waited for.

        Raises ``UnknownCollection``; ``Conflict`` when the submission was for other documents;
        ``QueueFull`` or ``RedisUnavailable`` past the patience; and what ``documents`` raises.
        Nothing that was counted as committed is lost then, and the call can be made again.
        """
        fleet = await self.fleet()
        target = await fleet.collection(collection, tenant=self._tenant)
        is_named = submission is not None or journal is not None
        id, book = begin(target, submission, journal, self._journal_dir)
        cutter = Cutter(target.spec.versions)
        own_line = WorkLine() if line is None else line
        with_digests = book is not None or is_named
        if isinstance(documents, AsyncIterable):
            puller: Any = AsyncPuller(documents, cutter, with_digests=with_digests)
        else:
            puller = IterablePuller(documents, cutter, own_line, with_digests=with_digests)
            if line is None:
                own_line.start()
        task = Task(
            submission=id,
            is_continued=is_named,
            options=options or SubmitOptions(),
            journal=book,
            stop=stop or asyncio.Event(),
            on_progress=harmless(on_progress),
            on_reject=harmless(on_reject),
        )
        try:
            result = await Submitter(fleet, target, puller, task).run()
        finally:
            if line is None:
                own_line.shutdown()
            if book is not None:
                book.close()
        if book is not None and not is_named and not result.interrupted:
            book.remove()  # nobody can name it again
        return result

    async def delete_documents(
        self, collection: str, ids: Sequence[str], *, version: int | None = None
    ) -> int:
        """Delete documents by id and wait until they are gone; returns how many ids that were.

        ``version`` where the collection's versions are given.
        """
        fleet = await self.fleet()
        target = await fleet.collection(collection, tenant=self._tenant)
        if (version is None) is (target.spec.versions == "given"):
            wanted = "wants" if version is None else "assigns versions itself and takes no"
            raise InvalidInput(f"this collection {wanted} version", field="version")
        await delete(fleet, target, ids, version, self._timeout_s)
        return len(ids)

    async def create_collection(
        self,
        name: str,
        *,
        model: str | None = None,
        policy: str = "auto",
        recall_target: float = 0.98,
        versions: str = "assigned",
        dimensions: int | None = None,
    ) -> Collection:
        """Create a collection for a model's vectors; the same call again returns the same one.

        ``dimensions`` cuts them, where the model is trained for it.
        """
        return await (await self.fleet()).create_collection(
            name,
            model=model,
            policy=policy,
            recall_target=recall_target,
            versions=versions,
            dimensions=dimensions,
            tenant=self._tenant,
        )

    async def delete_collection(self, name: str) -> str:
        """Delete a collection with its documents; returns its uid."""
        return await (await self.fleet()).delete_collection(name, tenant=self._tenant)

    async def collections(self) -> list[Collection]:
        """All collections, by name."""
        return await (await self.fleet()).collections(tenant=self._tenant)

    # The dead letter

    async def dead(
        self,
        *,
        collection: str | None = None,
        code: str | None = None,
        since: str | None = None,
        cursor: str = "",
        limit: int = 50,
    ) -> DeadPage:
        """What could not be done, the newest first; ``since`` as ``parse_since`` reads it."""
        fleet = await self.fleet()
        uid = None
        if collection is not None:
            uid = (await fleet.collection(collection, tenant=self._tenant)).uid
        since_ms = None if since is None else parse_since(since)
        wanted = DeadFilter(self._tenant, uid, code, since_ms)
        return await fleet.dead_letter.page(wanted, cursor=cursor, limit=limit)

    async def dead_entry(self, entry_id: str) -> DeadEntry:
        """One entry with all its texts; raises ``UnknownEntry``."""
        return await (await self.fleet()).dead_letter.get(entry_id, self._tenant)

    async def retry_dead(
        self, entry_id: str, *, text: str | None = None, document: str | None = None
    ) -> DeadEntry:
        """Queue an entry again, with ``text`` in place of the old one; see ``DeadLetter.retry``."""
        letter = (await self.fleet()).dead_letter
        return await letter.retry(entry_id, tenant=self._tenant, text=text, document=document)

    async def drop_dead(self, entry_id: str) -> DeadEntry:
        """Remove an entry for good; raises ``UnknownEntry``, ``Conflict``."""
        return await (await self.fleet()).dead_letter.drop(entry_id, tenant=self._tenant)

    # Questions

    async def get(self, collection: str, ids: Sequence[str]) -> list[StoredDocument | None]:
        """Documents by id, None where there is none."""
        fleet = await self.fleet()
        target = await fleet.collection(collection, tenant=self._tenant)
        found: list[StoredDocument | None] = []
        step = _MANY_IDS
        while len(found) < len(ids):
            try:
                found += await fleet.documents(target, ids[len(found) : len(found) + step])
            except ReplyTooLarge:
                if step == 1:
                    raise
                step //= 2  # their texts are long
        return found

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        prompt_name: str | None = None,
        instruction: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
        lane: keys.Lane = "interactive",
    ) -> EmbedReply:
        """Vectors of texts, as raw float32; ``prompt_name`` "query" for questions.

        ``instruction`` is what the questions are for, where the model's query prompt has a task;
        ``dimensions`` cuts the vectors, where the model is trained for it. Raises an
        ``InvalidInput`` for a model that does not take them.
        """
        check_texts(texts, "texts")
        fleet = await self.fleet()
        with naming_texts("texts"):
            return await fleet.embed(
                texts,
                model=model,
                prompt_name=prompt_name,
                instruction=instruction,
                dimensions=dimensions,
                truncate=truncate,
                lane=lane,
                tenant=self._tenant,
            )

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | None = None,
        instruction: str = "",
    ) -> RerankReply:
        """How relevant each document is to ``query``, from 0 to 1, in the documents' order."""
        check_text(query, "query")
        check_texts(documents, "documents", limits.MAX_RERANK_DOCUMENTS)
        fleet = await self.fleet()
        with naming_texts("documents"):
            return await fleet.rerank(
                query, documents, model=model, instruction=instruction, tenant=self._tenant
            )

    async def search(
        self,
        collection: str,
        query: str | None = None,
        *,
        vector: Any = None,
        top_k: int = 10,
        threshold: float | None = None,
        exact: bool = False,
        instruction: str | None = None,
        rerank: bool = False,
        reranker: str | None = None,
    ) -> list[Found]:
        """The documents nearest to ``query``, best first; by relevance with ``rerank``.

        ``instruction`` replaces the task of the model's query prompt.

        ``vector`` takes the place of the query's own: a list of numbers, a NumPy row, or raw
        float32, of any length but zero.
        """
        if query is not None and vector is not None and not rerank:
            raise InvalidInput("send query or vector, not both", field="vector")
        if rerank and query is None:
            raise InvalidInput("rerank needs a query", field="query")
        if query is not None or vector is None:
            check_text(query, "query")
        if vector is not None and instruction is not None:
            raise InvalidInput("instruction is for a query, not a vector", field="instruction")
        if not 0 < top_k <= limits.MAX_TOP_K:
            raise InvalidInput(f"top_k must be from 1 to {limits.MAX_TOP_K}", field="top_k")
        fleet = await self.fleet()
        target = await fleet.collection(collection, tenant=self._tenant)
        if vector is None:
            raw = await query_vector(fleet, target, str(query), instruction)
        else:
            raw = parse_vector(as_numbers(vector), target.spec.dimension)
        hits = await find(fleet, target, raw, top_k=top_k, threshold=threshold, exact=exact)
        if not rerank or not hits:
            return hits
        return await reranked(fleet, str(query), hits, reranker, self._tenant)

    async def status(self) -> FleetStatus:
        """Models, workers, queues, collections and unfinished submissions."""
        return await fleet_status(await self.fleet(), self._tenant)


def harmless(callback: Callable[[_A], None] | None) -> Callable[[_A], None]:
    """The callback, whose errors are told and do not stop the submission."""

    def call(argument: _A) -> None:
        if callback is None:
            return
        try:
            callback(argument)
        except Exception:
            log.exception("the callback for %s failed", type(argument).__name__)

    return call
