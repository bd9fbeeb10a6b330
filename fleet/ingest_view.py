"""What ``vecfleet ingest`` shows: a bar on a terminal, lines elsewhere, JSON lines on demand."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from vecfleet.common.errors import ConfigError
from vecfleet.producer.items import Rejected
from vecfleet.producer.readers import DocumentFiles
from vecfleet.producer.result import Progress, SubmissionResult

log = logging.getLogger(__name__)

_MOST_SHOWN_REJECTS = 10
_LINE_EVERY_S = 5.0
_JSON_EVERY_S = 1.0


class RejectsFile:
    """Rejected documents as JSON lines, in the file that was asked for or else in a default one.

    The default one is made with the first rejected document.
    """

    def __init__(self, asked: Path | None) -> None:
        self.path = asked  # None while there is no file
        self._default: Path | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.path is not None:
            self._open(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def default_to(self, path: Path) -> None:
        """Where to write where nothing was asked for."""
        self._default = path

    def write(self, rejected: Rejected) -> None:
        """Add one."""
        if self._file is None and self._default is not None:
            path, self._default = self._default, None  # tried once
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._open(path)
            except (ConfigError, OSError) as error:
                log.warning("what is rejected is not kept: %s", error)
        if self._file is not None:
            self._file.write(json.dumps(rejected.to_wire(), ensure_ascii=False) + "\n")

    def _open(self, path: Path) -> None:
        try:
            self._file = path.open("w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"rejects {path}: {error.strerror}") from error
        self.path = path


class IngestView:
    """Messages, rejects and the result; a subclass shows the progress."""

    def __init__(self, documents: DocumentFiles, rejects: RejectsFile) -> None:
        self._documents = documents
        self._rejects = rejects
        self._shown = 0
        self.has_begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def say(self, message: str) -> None:
        """A message for people."""
        click.echo(message, err=True)

    def progress(self, progress: Progress) -> None:
        """How far it is."""
        self.has_begun = True

    def reject(self, rejected: Rejected) -> None:
        """Keep a rejected document; the first few are shown."""
        self._rejects.write(rejected)
        self._shown += 1
        if self._shown <= _MOST_SHOWN_REJECTS:
            self.say(_rejection(rejected))
        elif self._shown == _MOST_SHOWN_REJECTS + 1:
            where = f"; all are in {self._rejects.path}" if self._rejects.path else ""
            self.say(f"more are rejected{where}")

    def say_result(self, result: SubmissionResult) -> None:
        """The summary, on standard output."""
        rate = result.documents / result.seconds if result.seconds else 0.0
        parts = [f"{result.committed:,} documents committed to {result.collection}"]
        for count, what in (
            (result.unchanged, "unchanged"),
            (result.rejected, "rejected"),
            (result.failed, "failed"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        click.echo(f"{', '.join(parts)} in {result.seconds:.1f} s ({rate:,.0f} docs/s)")
        if (result.rejected or result.failed) and self._rejects.path:
            click.echo(f"what was not accepted is in {self._rejects.path}")

    def _share(self, progress: Progress) -> float | None:
        """How much of the input is settled, 0 to 1; None where its size is not known."""
        total = self._documents.bytes_total
        if not total:
            return None
        read = progress.settled + progress.in_flight
        settled = progress.settled / read if read else 0.0
        return min(1.0, self._documents.bytes_read / total * settled)


class BarView(IngestView):
    """A bar, on a terminal."""

    def __init__(self, documents: DocumentFiles, rejects: RejectsFile) -> None:
        super().__init__(documents, rejects)
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """Above the bar."""
        self._bar.console.print(message, highlight=False, markup=False)

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        super().progress(progress)
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        share = self._share(progress)
        self._bar.update(
            self._task,
            description=_summary(progress),
            total=None if share is None else 1.0,
            completed=share or 0.0,
        )


class LineView(IngestView):
    """A line now and then, where nobody looks at a terminal."""

    def __init__(
        self,
        documents: DocumentFiles,
        rejects: RejectsFile,
        every_s: float = _LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(documents, rejects)
        self._every_s = every_s
        self._clock = clock
        self._said_at = clock()

    def progress(self, progress: Progress) -> None:
        """Say how far it is, when it is time."""
        super().progress(progress)
        now = self._clock()
        if now - self._said_at >= self._every_s:
            self._said_at = now
            self.show(progress)

    def show(self, progress: Progress) -> None:
        """One line."""
        share = self._share(progress)
        done = "" if share is None else f"{share:.0%}, "
        self.say(f"{done}{_summary(progress)}")


class JsonView(LineView):
    """Progress as JSON lines on standard error."""

    def __init__(self, documents: DocumentFiles, rejects: RejectsFile) -> None:
        super().__init__(documents, rejects, _JSON_EVERY_S)

    def show(self, progress: Progress) -> None:
        """One JSON object."""
        share = self._share(progress)
        line = {name: getattr(progress, name) for name in Progress.__dataclass_fields__}
        click.echo(json.dumps({"event": "progress", **line, "share": share}), err=True)

    def say(self, message: str) -> None:
        """A message as a JSON object."""
        click.echo(json.dumps({"event": "message", "message": message}), err=True)


class QuietView(IngestView):
    """Only messages: the answer will be JSON."""


def choose_view(
    documents: DocumentFiles, rejects: RejectsFile, *, quiet: bool, json: bool
) -> IngestView:
    """The view that fits the options and where standard error leads."""
    if json:
        return JsonView(documents, rejects)
    if quiet:
        return QuietView(documents, rejects)
    return BarView(documents, rejects) if sys.stderr.isatty() else LineView(documents, rejects)


def _summary(progress: Progress) -> str:
    rate = progress.settled / progress.seconds if progress.seconds else 0.0
    parts = [f"{progress.settled:,} documents", f"{rate:,.0f} docs/s"]
    for count, what in (
        (progress.in_flight, "on their way"),
        (progress.unchanged, "unchanged"),
        (progress.rejected, "rejected"),
        (progress.failed, "failed"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    if progress.waiting:
        parts.append(progress.waiting)
    return ", ".join(parts)


def _rejection(rejected: Rejected) -> str:
    place = f"{rejected.file}:{rejected.line}" if rejected.file else f"document {rejected.line}"
    about = f" (id {rejected.id})" if rejected.id else ""
    said = f"rejected {place}{about}: {rejected.message}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in said)
