"""`vecfleet demo`: the whole path on real passages, and what it did in figures."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vecfleet.common.errors import VecfleetError
from vecfleet.common.settings import Settings
from vecfleet.fleet.corpus import read_corpus
from vecfleet.fleet.demo_view import DemoView, Summary
from vecfleet.fleet.engine_options import ENGINE_FIELDS
from vecfleet.fleet.http_client import HttpClient
from vecfleet.fleet.process import dies_with_parent
from vecfleet.fleet.up import Fleet, FleetOptions, served_name
from vecfleet.producer import AsyncProducer, Progress, SubmissionResult

COLLECTION = "docstrings"
DOCUMENTS = 8000
_LEAST_DOCUMENTS = 2000
_INGEST_S = 100.0  # a slow machine takes fewer passages, so that the demo ends within minutes
QUESTIONS = (
    "How do I try a failed Redis command again, waiting longer each time?",
    "Which class shows a progress bar in the terminal?",
    "How can a blocking function run in a thread without stopping the event loop?",
    "What finds the shortest path between two nodes of a graph?",
    "How do I solve a system of linear equations?",
    "Where are files that were downloaded from a model hub kept on disk?",
)
_RERANKED = 8  # documents of the list that is reranked
_SEARCHES = 200
_RECALL_AT = 10
_BARE_TEXTS = 1000
_QUERY_WORDS = 8
_LOG_FILE = "fleet.log"
_FIGURES_FILE = "demo.json"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demo runs on."""

    settings: Settings
    documents: int | None = None  # None: as many as fit into the demo's time, as many again later
    source: Path | None = None  # a folder of packages; None: this environment's


@dataclass(slots=True)
class _Latencies:
    milliseconds: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """The value that ``share`` of the measurements do not pass."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run_demo(options: DemoOptions) -> int:
    """Run the demo and return its exit code."""
    view = DemoView()
    asyncio.run(_demo(options, view))
    return 0


async def _demo(options: DemoOptions, view: DemoView) -> None:
    data = options.settings.data
    data.mkdir(parents=True, exist_ok=True)
    view.title(data)
    with (data / _LOG_FILE).open("a") as log:
        fleet = Fleet(FleetOptions(options.settings), lambda name, line: _note(log, name, line))
        try:
            with view.working("starting Redis, worker, aggregator, search and gateway"):
                await _started(fleet, data)
            view.done(f"the fleet answers at {fleet.http_url}")
            work = asyncio.create_task(_work(options, fleet, view))
            failure = asyncio.create_task(fleet.failure())
            await asyncio.wait((work, failure), return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                work.cancel()
                raise _with_log(failure.result(), data)
            failure.cancel()
            await work
        finally:
            with view.working("draining the fleet"):
                await fleet.stop()
    view.end(data, COLLECTION)


def _note(log: Any, name: str, line: str) -> None:
    log.write(f"{name}: {line}\n")
    log.flush()


async def _started(fleet: Fleet, data: Path) -> None:
    start = asyncio.create_task(fleet.start())
    failure = asyncio.create_task(fleet.failure())
    await asyncio.wait((start, failure), return_when=asyncio.FIRST_COMPLETED)
    if failure.done():
        start.cancel()
        raise _with_log(failure.result(), data)
    failure.cancel()
    await start


def _with_log(error: VecfleetError, data: Path) -> VecfleetError:
    lines = (data / _LOG_FILE).read_text(errors="replace").splitlines()[-5:]
    return type(error)("\n".join([str(error), *lines, f"(more in {data / _LOG_FILE})"]))


async def _work(options: DemoOptions, fleet: Fleet, view: DemoView) -> None:
    earlier = _figures(options.settings.data)
    limit = options.documents or earlier.get("documents") or DOCUMENTS
    with view.working("reading the docstrings of the installed packages"):
        documents = await asyncio.to_thread(lambda: list(read_corpus(options.source, limit)))
    if not documents:
        raise VecfleetError("no docstrings found: are there packages in this environment?")
    bare = None
    if not earlier:
        with view.working("measuring the engine alone, the fleet idle"):
            bare = await _bare_docs_per_s(options.settings, documents)
        view.done(f"the engine alone: {bare:,.0f} docs/s")
        if options.documents is None:
            documents = documents[: max(_LEAST_DOCUMENTS, int(bare * _INGEST_S))]
    packages = len({document["metadata"]["package"] for document in documents})
    view.done(f"{len(documents):,} passages of {packages} packages")

    async with AsyncProducer(fleet.redis_url) as producer:
        client = await producer.fleet()
        await client.create_collection(COLLECTION, model=served_name(options.settings.model))
        result = await _ingest(producer, documents, view)
        http = HttpClient(fleet.http_url, api_key=options.settings.api_key)
        try:
            for question in QUESTIONS:
                view.answers(question, *await _ask(http, question))
            question, model, order = await _rerank(http, documents)
            card = await client.find_model(model, "rerank")
            view.reranked(question, f"by {model}, {card.rerank_method}", order)
            with view.working(f"{_SEARCHES} searches, each also exactly"):
                latencies, recall = await asyncio.to_thread(_searches, http, documents)
        finally:
            http.close()
    summary = Summary(
        documents=result.documents,
        embedded=result.committed,
        unchanged=result.unchanged,
        seconds=result.seconds,
        bare_docs_per_s=bare,
        p50_ms=latencies.percentile(0.5),
        p99_ms=latencies.percentile(0.99),
        searches=_SEARCHES,
        recall=recall,
    )
    view.summary(summary)
    figures = json.dumps(asdict(summary), indent=2)
    (options.settings.data / _FIGURES_FILE).write_text(figures + "\n")


def _figures(data: Path) -> dict[str, Any]:
    """What an earlier run that came to its end has measured."""
    try:
        figures = json.loads((data / _FIGURES_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) else {}


async def _ingest(
    producer: AsyncProducer, documents: Sequence[dict[str, Any]], view: DemoView
) -> SubmissionResult:
    with view.ingesting(len(documents)) as show:

        def on_progress(progress: Progress) -> None:
            show(progress.settled, progress.seconds)

        result = await producer.submit(documents, collection=COLLECTION, on_progress=on_progress)
    if not result.is_complete:
        raise VecfleetError(
            f"{result.rejected + result.failed} of {result.documents} passages were refused"
        )
    return result


async def _bare_docs_per_s(settings: Settings, documents: Sequence[dict[str, Any]]) -> float:
    step = max(1, len(documents) // _BARE_TEXTS)
    task = {
        "model": settings.model,
        **{name: getattr(settings, name) for name in ENGINE_FIELDS},
        "texts": [document["text"] for document in documents[::step]][:_BARE_TEXTS],
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "vecfleet.fleet.bare_engine",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=dies_with_parent(),
    )
    try:
        out, err = await process.communicate(json.dumps(task).encode())
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise VecfleetError(f"the engine alone failed: {err.decode(errors='replace')[-500:]}")
    figures = json.loads(out)
    return float(figures["texts"] / figures["seconds"])


async def _ask(client: HttpClient, question: str) -> tuple[list[dict[str, Any]], float]:
    body = {"query": question, "top_k": 3}
    began = time.perf_counter()
    answer = await asyncio.to_thread(client.post, f"/collections/{COLLECTION}/search", body)
    return answer["results"], (time.perf_counter() - began) * 1000


async def _rerank(
    client: HttpClient, documents: Sequence[dict[str, Any]]
) -> tuple[str, str, list[tuple[str, float]]]:
    question = QUESTIONS[1]
    step = max(1, len(documents) // (_RERANKED // 2))
    hits = (await _ask(client, question))[0]
    others = list(itertools.islice(documents[::step], _RERANKED - len(hits)))
    chosen = [*others, *hits]  # the right ones last
    body = {"query": question, "documents": [entry["text"] for entry in chosen]}
    answer = await asyncio.to_thread(client.post, "/v1/rerank", body)
    order = [(chosen[r["index"]]["id"], r["relevance_score"]) for r in answer["results"]]
    return question, str(answer["model"]), order


def _searches(client: HttpClient, documents: Sequence[dict[str, Any]]) -> tuple[_Latencies, float]:
    """Time searches one after the other, then ask each again exactly.

    The queries are pieces from the middle of passages: no document as a whole.
    """
    path = f"/collections/{COLLECTION}/search"
    latencies, shares = _Latencies(), []
    queries = [
        _piece(documents[place * len(documents) // _SEARCHES]["text"]) for place in range(_SEARCHES)
    ]
    found = []
    for query in queries:
        began = time.perf_counter()
        answer = client.post(path, {"query": query, "top_k": _RECALL_AT})
        latencies.milliseconds.append((time.perf_counter() - began) * 1000)
        found.append({hit["id"] for hit in answer["results"]})
    for query, ids in zip(queries, found, strict=True):
        answer = client.post(path, {"query": query, "top_k": _RECALL_AT, "exact": True})
        exact = {hit["id"] for hit in answer["results"]}
        shares.append(len(ids & exact) / max(1, len(exact)))
    return latencies, statistics.mean(shares)


def _piece(text: str) -> str:
    words = text.split()
    middle = max(0, len(words) // 2 - _QUERY_WORDS // 2)
    return " ".join(words[middle : middle + _QUERY_WORDS])
