"""``vecfleet ingest``: documents from files into a collection."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click

from vecfleet.common.collection import Collection
from vecfleet.common.errors import CollectionConflict, UnknownCollection, VecfleetError
from vecfleet.common.names import new_id
from vecfleet.common.settings import Settings
from vecfleet.fleet.client_options import (
    JOURNALS,
    REJECTS,
    json_option,
    print_json,
    redis_option,
    run_with,
)
from vecfleet.fleet.ingest_view import IngestView, RejectsFile, choose_view
from vecfleet.producer.fields import FieldMap
from vecfleet.producer.naming import submission_id
from vecfleet.producer.options import DEFAULT_PATIENCE_S, SubmitOptions
from vecfleet.producer.producer import AsyncProducer
from vecfleet.producer.readers import DocumentFiles, read_documents
from vecfleet.producer.result import SubmissionResult
from vecfleet.producer.sources import FORMATS, Format

log = logging.getLogger(__name__)

EXIT_INCOMPLETE = 1
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class _Order:
    """What the command line asks for."""

    collection: str
    model: str | None
    dimensions: int | None
    create: bool
    submission: str | None
    journal: Path | None
    options: SubmitOptions


@click.command(
    epilog="Exit codes: 0 all documents are in the collection, 1 some were rejected or failed, "
    "2 wrong use or input, 3 Redis or the fleet is not there, 4 no such collection or model, "
    "130 interrupted."
)
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option("--collection", "-c", required=True, metavar="C", help="Where the documents go.")
@redis_option
@click.option("--model", metavar="M", help="The model of a collection that is created.")
@click.option(
    "--dimensions",
    type=click.IntRange(1),
    metavar="N",
    help="Cut the vectors of a collection that is created, where the model is trained for it.",
)
@click.option(
    "--create/--no-create",
    default=True,
    show_default=True,
    help="Create the collection where there is none.",
)
@click.option("--format", "format_", type=click.Choice(FORMATS), help="By default as files end.")
@click.option("--id-field", default="id", show_default=True, metavar="F")
@click.option("--text-field", default="text", show_default=True, metavar="F")
@click.option("--version-field", default="version", show_default=True, metavar="F")
@click.option(
    "--metadata-fields",
    metavar="F,G,...",
    help="Fields to keep as metadata; by default all that are left, none with ''.",
)
@click.option(
    "--submission",
    metavar="KEY",
    help="Names this ingest: the same key and files put documents in once, and go on where an "
    "interrupted run ended.",
)
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to note what is done; by default in the data folder.",
)
@click.option(
    "--rejects",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write what was not accepted, one JSON object a line; by default in the data "
    "folder, where there was anything.",
)
@click.option(
    "--truncate/--no-truncate",
    default=True,
    help="Cut texts that are longer than the model reads, or refuse them.",
)
@click.option("--all", "send_all", is_flag=True, help="Send unchanged documents again, too.")
@click.option(
    "--patience",
    default=DEFAULT_PATIENCE_S,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="S",
    help="Seconds to bear a full queue, or a Redis that is away.",
)
@json_option
@click.option("--progress-json", is_flag=True, help="Progress as JSON lines on standard error.")
@click.pass_obj
def ingest(
    settings: Settings,
    /,
    files: tuple[str, ...],
    redis_url: str | None,
    format_: str | None,
    rejects: Path | None,
    as_json: bool,
    progress_json: bool,
    **given: Any,
) -> int:
    """Put documents from FILES into a collection and wait until they are searchable.

    FILES are JSON lines, CSV, TSV, Parquet or text (one line a document; .md: one file a
    document), also compressed with gzip or zstd; directories and patterns are searched, - is
    standard input. Fields that are neither id, text nor version become metadata; beside a metadata
    object they are refused. A row without an id is named after its file and line.
    """
    named = given.pop("metadata_fields")
    names = None if named is None else tuple(name.strip() for name in named.split(",") if name)
    fields = FieldMap(
        given.pop("id_field"), given.pop("text_field"), given.pop("version_field"), names
    )
    documents = read_documents(files, format=cast("Format | None", format_), fields=fields)
    order = _Order(
        collection=given["collection"],
        model=given["model"],
        dimensions=given["dimensions"],
        create=given["create"],
        submission=given["submission"],
        journal=given["journal"],
        options=SubmitOptions(
            truncate=given["truncate"],
            only_changed=not given["send_all"],
            patience_s=given["patience"],
        ),
    )
    with ExitStack() as stack:
        kept = stack.enter_context(RejectsFile(rejects))
        view = stack.enter_context(choose_view(documents, kept, quiet=as_json, json=progress_json))
        result = run_with(
            settings,
            redis_url,
            lambda producer: _ingest(producer, settings, order, documents, view, kept),
        )
    if as_json:
        print_json({**result.to_wire(), "rejects_file": kept.path and str(kept.path)})
    else:
        view.say_result(result)
    if result.interrupted:
        return EXIT_INTERRUPTED
    return 0 if result.is_complete else EXIT_INCOMPLETE


async def _ingest(
    producer: AsyncProducer,
    settings: Settings,
    order: _Order,
    documents: DocumentFiles,
    view: IngestView,
    kept: RejectsFile,
) -> SubmissionResult:
    collection = await _collection(producer, order, view)
    is_named = order.submission is not None or order.journal is not None
    name = order.submission if is_named else new_id()
    # Where a journal alone names the submission, its id is the journal's affair.
    file = new_id() if name is None else submission_id(collection, name)
    kept.default_to(settings.data / REJECTS / f"{file}.jsonl")
    stop = asyncio.Event()
    again = "with the same command" + ("" if is_named else f" and --submission {name}")
    with _on_interrupt(stop, view):
        try:
            result = await producer.submit(
                documents,
                collection=order.collection,
                submission=name,
                journal=order.journal,
                options=order.options,
                on_progress=view.progress,
                on_reject=view.reject,
                stop=stop,
            )
        except (VecfleetError, asyncio.CancelledError) as error:
            if view.has_begun and (isinstance(error, asyncio.CancelledError) or error.retryable):
                view.say(f"go on {again}")
            if isinstance(error, asyncio.CancelledError):
                raise KeyboardInterrupt from None
            raise
    if result.interrupted:
        view.say(f"interrupted; go on {again}")
    elif not is_named:
        # Nobody knows the name that would continue it, and there is nothing to continue.
        journal = settings.data / JOURNALS / f"{name}.jsonl"
        journal.unlink(missing_ok=True)
    return result


async def _collection(producer: AsyncProducer, order: _Order, view: IngestView) -> Collection:
    """The collection, created where there is none and that is wanted."""
    fleet = await producer.fleet()
    try:
        found = await fleet.collection(order.collection)
    except UnknownCollection as error:
        if not order.create:
            raise UnknownCollection(
                f"{error.message}, or leave --no-create out", field="collection"
            ) from None
        created = await producer.create_collection(
            order.collection, model=order.model, dimensions=order.dimensions
        )
        view.say(f"created collection {created.name} for {created.spec.model}")
        return created
    if order.model is not None and order.model != found.spec.model:
        raise CollectionConflict(
            f"collection {found.name} was made with {found.spec.model}, not {order.model}; "
            "leave --model out or choose another collection"
        )
    if order.dimensions not in (None, found.spec.dimension):
        raise CollectionConflict(
            f"collection {found.name} was made with {found.spec.dimension} dimensions, not "
            f"{order.dimensions}; leave --dimensions out or choose another collection"
        )
    return found


@contextmanager
def _on_interrupt(stop: asyncio.Event, view: IngestView) -> Iterator[None]:
    """The first Ctrl-C sets ``stop``, the second cancels this task."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    cancel: Callable[..., object] = task.cancel

    def interrupted() -> None:
        if stop.is_set():
            cancel()
        else:
            view.say("stopping: waiting for what is on its way; Ctrl-C again leaves at once")
            stop.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, interrupted)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
