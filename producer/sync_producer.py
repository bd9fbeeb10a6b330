"""The producer for programs without an event loop: a facade over the asynchronous one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from vecfleet.common import keys
from vecfleet.common.admission import Admission
from vecfleet.common.collection import Collection
from vecfleet.common.dead_entry import DeadEntry
from vecfleet.common.dead_letter import DeadPage
from vecfleet.common.fleet_client import DEFAULT_TIMEOUT_S
from vecfleet.common.payloads import EmbedReply, RerankReply, StoredDocument
from vecfleet.producer.found import FleetStatus, Found
from vecfleet.producer.items import Rejected
from vecfleet.producer.options import SubmitOptions
from vecfleet.producer.producer import AsyncProducer, Documents, harmless
from vecfleet.producer.pulling import WorkLine
from vecfleet.producer.result import Progress, SubmissionResult

_T = TypeVar("_T")
_A = TypeVar("_A")


class Producer:
    """``AsyncProducer`` on a private event loop in a thread; its methods block.

    Documents are iterated, and callbacks called, in the caller's own thread.
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
        """As ``AsyncProducer``."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="producer-loop", daemon=True
        )
        self._thread.start()
        try:
            self._inner = self._call(
                _make(
                    lambda: AsyncProducer(
                        redis_url,
                        tenant=tenant,
                        admission=admission,
                        timeout_s=timeout_s,
                        journal_dir=journal_dir,
                    )
                )
            )
        except BaseException:
            self._stop_loop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; may be called twice."""
        if not self._loop.is_closed():
            try:
                self._call(self._inner.close())
            finally:
                self._stop_loop()

    def submit(
        self,
        documents: Documents,
        *,
        collection: str,
        submission: str | None = None,
        journal: str | Path | None = None,
        options: SubmitOptions | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_reject: Callable[[Rejected], None] | None = None,
    ) -> SubmissionResult:
        """As ``AsyncProducer.submit``.

        The first Ctrl-C stops sending and waits for what is in flight, the second leaves at once;
        both end with ``KeyboardInterrupt``.
        """
        line = WorkLine()
        stop = self._call(_make(asyncio.Event))
        work = self._inner.submit(
            documents,
            collection=collection,
            submission=submission,
            journal=journal,
            options=options,
            on_progress=None if on_progress is None else _in_line(line, on_progress),
            on_reject=None if on_reject is None else _in_line(line, on_reject),
            stop=stop,
            line=line,
        )
        task = self._call(_start(work, line))
        try:
            try:
                line.serve()
            except KeyboardInterrupt:
                self._loop.call_soon_threadsafe(stop.set)
                line.serve()
                raise
        finally:
            self._call(_end(task))
        return task.result()

    def delete_documents(
        self, collection: str, ids: Sequence[str], *, version: int | None = None
    ) -> int:
        """As ``AsyncProducer.delete_documents``."""
        return self._call(self._inner.delete_documents(collection, ids, version=version))

    def dead(
        self,
        *,
        collection: str | None = None,
        code: str | None = None,
        since: str | None = None,
        cursor: str = "",
        limit: int = 50,
    ) -> DeadPage:
        """As ``AsyncProducer.dead``."""
        return self._call(
            self._inner.dead(
                collection=collection, code=code, since=since, cursor=cursor, limit=limit
            )
        )

    def dead_entry(self, entry_id: str) -> DeadEntry:
        """As ``AsyncProducer.dead_entry``."""
        return self._call(self._inner.dead_entry(entry_id))

    def retry_dead(
        self, entry_id: str, *, text: str | None = None, document: str | None = None
    ) -> DeadEntry:
        """As ``AsyncProducer.retry_dead``."""
        return self._call(self._inner.retry_dead(entry_id, text=text, document=document))

    def drop_dead(self, entry_id: str) -> DeadEntry:
        """As ``AsyncProducer.drop_dead``."""
        return self._call(self._inner.drop_dead(entry_id))

    def create_collection(self, name: str, **settings: Any) -> Collection:
        """As ``AsyncProducer.create_collection``."""
        return self._call(self._inner.create_collection(name, **settings))

    def delete_collection(self, name: str) -> str:
        """As ``AsyncProducer.delete_collection``."""
        return self._call(self._inner.delete_collection(name))

    def collections(self) -> list[Collection]:
        """As ``AsyncProducer.collections``."""
        return self._call(self._inner.collections())

    def get(self, collection: str, ids: Sequence[str]) -> list[StoredDocument | None]:
        """As ``AsyncProducer.get``."""
        return self._call(self._inner.get(collection, ids))

    def embed(self, texts: Sequence[str], **options: Any) -> EmbedReply:
        """As ``AsyncProducer.embed``."""
        return self._call(self._inner.embed(texts, **options))

    def rerank(self, query: str, documents: Sequence[str], **options: Any) -> RerankReply:
        """As ``AsyncProducer.rerank``."""
        return self._call(self._inner.rerank(query, documents, **options))

    def search(self, collection: str, query: str | None = None, **options: Any) -> list[Found]:
        """As ``AsyncProducer.search``."""
        return self._call(self._inner.search(collection, query, **options))

    def status(self) -> FleetStatus:
        """As ``AsyncProducer.status``."""
        return self._call(self._inner.status())

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _in_line(line: WorkLine, callback: Callable[[_A], None]) -> Callable[[_A], None]:
    def call(argument: _A) -> None:
        line.submit(harmless(callback), argument)

    return call


async def _start(
    work: Coroutine[Any, Any, SubmissionResult], line: WorkLine
) -> asyncio.Task[SubmissionResult]:
    task = asyncio.create_task(work)
    task.add_done_callback(lambda _: line.shutdown())
    return task


async def _end(task: asyncio.Task[SubmissionResult]) -> None:
    """Cancel what is not done, and wait until it has let go of its journal."""
    task.cancel()
    await asyncio.wait([task])


async def _make(make: Callable[[], _T]) -> _T:
    return make()
