"""``vecfleet search``, ``rerank`` and ``embed``: questions to the fleet."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vecfleet.common import limits
from vecfleet.common.document import Document
from vecfleet.common.errors import ConfigError, InvalidInput
from vecfleet.common.keys import Lane
from vecfleet.common.model import QUERY
from vecfleet.common.payloads import EmbedReply
from vecfleet.common.settings import Settings
from vecfleet.fleet.client_options import json_option, print_json, redis_option, run_with
from vecfleet.producer.found import Found
from vecfleet.producer.items import Rejected
from vecfleet.producer.producer import AsyncProducer
from vecfleet.producer.readers import read_documents
from vecfleet.producer.sources import STDIN

_PREVIEW_CHARACTERS = 200
_PART = limits.BLOCK_DOCUMENTS
_NPY_HEADER_BYTES = 128


@click.command()
@click.argument("query")
@click.option("--collection", "-c", required=True, metavar="C", help="Where to look.")
@redis_option
@click.option("-k", "--top-k", default=10, show_default=True, type=click.IntRange(1))
@click.option("--threshold", type=click.FloatRange(-1, 1), help="The least cosine similarity.")
@click.option("--exact", is_flag=True, help="Compare with every document, without an index.")
@click.option("--instruction", metavar="TASK", help="What QUERY is for, as the model is told.")
@click.option("--rerank", is_flag=True, help="Order what was found by a reranker's relevance.")
@click.option("--reranker", metavar="M", help="Which one, where several are served.")
@json_option
@click.pass_obj
def search(
    settings: Settings,
    query: str,
    collection: str,
    redis_url: str | None,
    top_k: int,
    threshold: float | None,
    exact: bool,
    instruction: str | None,
    rerank: bool,
    reranker: str | None,
    as_json: bool,
) -> int:
    """Find the documents of a collection that are nearest to QUERY."""

    async def ask(producer: AsyncProducer) -> list[Found]:
        return await producer.search(
            collection,
            query,
            top_k=top_k,
            threshold=threshold,
            exact=exact,
            instruction=instruction,
            rerank=rerank or reranker is not None,
            reranker=reranker,
        )

    found = run_with(settings, redis_url, ask)
    if as_json:
        print_json({"query": query, "collection": collection, "results": [_wire(f) for f in found]})
    elif found:
        Console().print(_table(found))
    else:
        click.echo("nothing found")
    return 0


@click.command()
@click.argument("query")
@click.argument("file")
@redis_option
@click.option("--model", metavar="M", help="The reranker, where several are served.")
@click.option("--instruction", default="", help="What the reranker is told to look for.")
@click.option("-k", "--top-k", type=click.IntRange(1), help="How many to show; by default all.")
@json_option
@click.pass_obj
def rerank(
    settings: Settings,
    query: str,
    file: str,
    redis_url: str | None,
    model: str | None,
    instruction: str,
    top_k: int | None,
    as_json: bool,
) -> int:
    """Order the documents of FILE (- is standard input) by their relevance to QUERY.

    FILE is read as ``ingest`` reads it; a file of unknown ending, and standard input, as one
    document a line.
    """
    documents = list(_documents(file))
    if not documents:
        raise InvalidInput(f"{file} holds no documents")
    most = limits.MAX_RERANK_DOCUMENTS

    async def ask(producer: AsyncProducer) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(documents), most):
            texts = [document.text for document in documents[start : start + most]]
            reply = await producer.rerank(query, texts, model=model, instruction=instruction)
            scores += reply.scores
        return scores

    scores = run_with(settings, redis_url, ask)
    order = sorted(range(len(documents)), key=lambda i: scores[i], reverse=True)[:top_k]
    ranked = [Found(documents[i].id, scores[i], documents[i].text, None, scores[i]) for i in order]
    if as_json:
        rows = [{"id": f.id, "relevance": f.relevance, "text": f.text} for f in ranked]
        print_json({"query": query, "results": rows})
    else:
        Console().print(_table(ranked))
    return 0


@click.command()
@click.argument("source", metavar="FILE|TEXT")
@redis_option
@click.option("--model", metavar="M", help="The model, where several are served.")
@click.option("--query", "as_query", is_flag=True, help="Embed as questions, not documents.")
@click.option("--prompt-name", metavar="P", help="Embed after this prompt of the model's own.")
@click.option("--instruction", metavar="TASK", help="Embed as questions that are for this.")
@click.option(
    "--dimensions",
    type=click.IntRange(1),
    metavar="N",
    help="Cut the vectors, where the model is trained for it.",
)
@click.option(
    "--output",
    type=click.Choice(["jsonl", "npy", "raw"]),
    default="jsonl",
    show_default=True,
    help="JSON lines; a NumPy array; or little-endian float32, row after row.",
)
@click.option(
    "--out", "-o", type=click.Path(dir_okay=False, path_type=Path), help="By default to stdout."
)
@click.pass_obj
def embed(
    settings: Settings,
    source: str,
    redis_url: str | None,
    model: str | None,
    as_query: bool,
    prompt_name: str | None,
    instruction: str | None,
    dimensions: int | None,
    output: str,
    out: Path | None,
) -> int:
    """Turn a text, or each document of a file (- is standard input), into a vector."""
    is_file = _names_a_file(source)
    documents = _documents(source) if is_file else iter((Document("text", source),))
    if out is None and output != "jsonl" and sys.stdout.isatty():
        raise ConfigError("these are bytes, not text: say where to with --out FILE")

    if as_query and prompt_name is not None:
        raise ConfigError("--query is --prompt-name query; leave one of them out")
    prompt_name = QUERY if as_query else prompt_name
    is_question = prompt_name == QUERY or instruction is not None
    lane: Lane = "interactive" if is_question else "bulk"

    async def ask(producer: AsyncProducer) -> int:
        try:
            target: BinaryIO = sys.stdout.buffer if out is None else out.open("wb")
        except OSError as error:
            raise ConfigError(f"{out}: {error.strerror}") from error
        writer = _VectorWriter(target, output)
        try:
            for part in _parts(documents):
                texts = [document.text for document in part]
                reply = await producer.embed(
                    texts,
                    model=model,
                    prompt_name=prompt_name,
                    instruction=instruction,
                    dimensions=dimensions,
                    lane=lane,
                )
                writer.write(part, reply)
            writer.end()
        finally:
            if out is not None:
                target.close()
        return writer.rows

    rows = run_with(settings, redis_url, ask)
    if out is not None:
        click.echo(f"{rows:,} vectors in {out}", err=True)
    return 0


class _VectorWriter:
    """Writes vectors as they come; a NumPy header is completed at the end."""

    def __init__(self, target: BinaryIO, output: str) -> None:
        self._target = target
        self._output = output
        self._dimension = 0
        self._held: list[bytes] = []  # of an array into a pipe, whose header comes first
        self.rows = 0

    def write(self, documents: Sequence[Document], reply: EmbedReply) -> None:
        """Add the vectors of some documents."""
        self.rows += len(reply)
        self._dimension = reply.dimension
        if self._output == "jsonl":
            for place, document in enumerate(documents):
                row = struct.unpack(f"<{reply.dimension}f", reply.row(place))
                line = json.dumps({"id": document.id, "vector": row}, ensure_ascii=False)
                self._target.write(line.encode() + b"\n")
        elif self._output == "raw":
            self._target.write(reply.vectors)
        elif self._target.seekable():
            if self.rows == len(reply):
                self._target.write(b"\0" * _NPY_HEADER_BYTES)
            self._target.write(reply.vectors)
        else:
            self._held.append(reply.vectors)

    def end(self) -> None:
        """Complete the output."""
        if self._output == "npy":
            if self._target.seekable():
                self._target.seek(0)
            self._target.write(_npy_header(self.rows, self._dimension))
            for part in self._held:
                self._target.write(part)
        self._target.flush()


def _npy_header(rows: int, dimension: int) -> bytes:
    """Version 1.0 of NumPy's format, for float32 rows; always 128 bytes."""
    described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dimension}), }}"
    space = _NPY_HEADER_BYTES - 10
    text = described.encode().ljust(space - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", space) + text


def _names_a_file(source: str) -> bool:
    try:
        return source == STDIN or Path(source).exists()
    except (OSError, ValueError):
        return False  # a text longer than a file's name may be, or with a null character


def _documents(source: str) -> Iterator[Document]:
    """The documents of a file; raises ``InvalidInput`` at the first line that is none."""
    try:
        files = read_documents([source], format="text" if source == STDIN else None)
    except ConfigError:
        files = read_documents([source], format="text")
    for item in files:
        if isinstance(item, Rejected):
            raise InvalidInput(f"{item.file}:{item.line}: {item.message}")
        yield item.document


def _parts(documents: Iterator[Document]) -> Iterator[list[Document]]:
    part: list[Document] = []
    for document in documents:
        part.append(document)
        if len(part) == _PART:
            yield part
            part = []
    if part:
        yield part


def _wire(found: Found) -> dict[str, object]:
    wire = {"id": found.id, "score": found.score, "text": found.text}
    more = {"metadata": found.metadata, "relevance_score": found.relevance}
    return {**wire, **{name: value for name, value in more.items() if value is not None}}


def _table(found: Sequence[Found]) -> Table:
    table = Table(box=None, pad_edge=False)
    is_reranked = any(f.relevance is not None for f in found)
    table.add_column("relevance" if is_reranked else "score", justify="right")
    table.add_column("id", overflow="fold")
    table.add_column("text", ratio=1)
    for f in found:
        preview = " ".join(f.text[: 2 * _PREVIEW_CHARACTERS].split())[:_PREVIEW_CHARACTERS]
        score = f.score if f.relevance is None else f.relevance
        table.add_row(f"{score:.4f}", Text(f.id), Text(preview))
    return table
