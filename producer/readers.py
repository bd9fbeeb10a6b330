"""Documents out of files: JSON lines, CSV, Parquet, plain text; one after the other, never whole.

A line that is no document becomes a ``Rejected`` and the rest goes on; so does a file that cannot
be read to its end.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from vecfleet.common import limits
from vecfleet.common.document import Document
from vecfleet.common.errors import CorruptData, InvalidInput, TextTooLong, VecfleetError
from vecfleet.producer.fields import FieldMap
from vecfleet.producer.items import Rejected, Sourced, reject
from vecfleet.producer.lines import MAX_LINE_BYTES, cut_lines
from vecfleet.producer.sources import UNREADABLE, Format, Source, find_sources

Items = Iterator[Sourced | Rejected]
_Parse = Callable[[bytes, int], Document]
_DELIMITERS = {"csv": ",", "tsv": "\t"}


@dataclass(slots=True)
class DocumentFiles:
    """The documents of some files, to be iterated; what it has read so far shows the progress.

    The same files give the same items, however often they are read; standard input only once.
    """

    sources: list[Source]
    fields: FieldMap = field(default_factory=FieldMap)
    bytes_read: int = 0  # on disk, of compressed files the compressed bytes

    @property
    def bytes_total(self) -> int | None:
        """Bytes on disk together; None where standard input or a pipe is among the files."""
        sizes = [source.size for source in self.sources if source.size is not None]
        return sum(sizes) if len(sizes) == len(self.sources) else None

    def __iter__(self) -> Items:
        self.bytes_read = 0
        for source in self.sources:
            before = self.bytes_read
            line = 0
            try:
                with source.open() as (stream, raw):
                    for item in self._read(source, stream, raw, before):
                        line = item.line
                        yield item
            except UNREADABLE as error:
                reason = CorruptData(f"the file cannot be read further: {error}")
                yield reject(reason, source.name, line + 1)
            self.bytes_read = before + (source.size or 0)

    def _read(self, source: Source, stream: IO[bytes], raw: IO[bytes], before: int) -> Items:
        tell = _position(raw)
        match source.format:
            case "jsonl" | "text":
                parse = _line_parser(source, self.fields)
                for first, lines in cut_lines(stream):
                    self.bytes_read = before + tell()
                    yield from _parse_lines(source.name, first, lines, parse)
            case "csv" | "tsv":
                for item in _read_csv(source, stream, self.fields):
                    self.bytes_read = before + tell()
                    yield item
            case "parquet":
                from vecfleet.producer.parquet import read_rows

                for number, row in read_rows(raw, source.name):
                    self.bytes_read = before + tell()
                    yield _parse_row(source, number, row, self.fields)
            case "files":
                yield _read_whole(source, stream)


def read_documents(
    paths: Sequence[str | Path],
    *,
    format: Format | None = None,
    fields: FieldMap | None = None,
) -> DocumentFiles:
    """The documents of files, directories, patterns and standard input (``-``).

    Raises ``ConfigError`` when a file is missing, its format cannot be told, or a library that
    reads it is not installed.
    """
    sources = find_sources(paths, format)
    if any(source.format == "parquet" for source in sources):
        from vecfleet.producer.parquet import need_pyarrow

        need_pyarrow()
    return DocumentFiles(sources, fields or FieldMap())


def _position(raw: IO[bytes]) -> Callable[[], int]:
    return raw.tell if raw.seekable() else lambda: 0


def _default_id(source: Source, line: int) -> str:
    return f"{source.name}:{line}"


def _line_parser(source: Source, fields: FieldMap) -> _Parse:
    """A function of one line, decoded from bytes, and its number."""
    name = source.name
    if source.format == "text":

        def parse_text(line: bytes, number: int) -> Document:
            text = _decode(line).removesuffix("\r")
            return fields.parse({fields.text_field: text}, f"{name}:{number}")

        return parse_text

    loads, parse = orjson.loads, fields.parse

    def parse_json(line: bytes, number: int) -> Document:
        try:
            row = loads(line)
        except orjson.JSONDecodeError as error:
            raise InvalidInput(f"the line is not valid JSON: {error}") from None
        if type(row) is not dict:
            raise InvalidInput("the line is not a JSON object")
        return parse(row, f"{name}:{number}")

    return parse_json


def _parse_lines(name: str, first: int, lines: list[bytes | None], parse: _Parse) -> Items:
    for number, line in enumerate(lines, first):
        if not line:
            if line is None:
                error = TextTooLong(f"the line has more than {MAX_LINE_BYTES} bytes")
                yield reject(error, name, number)
            continue
        try:
            yield Sourced(parse(line, number), name, number)
        except VecfleetError as error:
            if not line.isspace():
                yield reject(error, name, number, line)


def _parse_row(
    source: Source, number: int, row: dict[str, Any], fields: FieldMap
) -> Sourced | Rejected:
    try:
        return Sourced(fields.parse(row, _default_id(source, number)), source.name, number)
    except VecfleetError as error:
        found = row.get(fields.id_field)
        id = str(found) if isinstance(found, str | int) else None
        return reject(error, source.name, number, str(row.get(fields.text_field, "")), id)


def _read_csv(source: Source, stream: IO[bytes], fields: FieldMap) -> Items:
    # What is not UTF-8 becomes surrogates, which the checks of a document refuse row by row.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader(text, delimiter=_DELIMITERS[source.format], strict=True)
    header: list[str] | None = None
    try:
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield reject(InvalidInput(f"the row cannot be read: {error}"), source.name, line)
                continue
            if header is None:
                header = row
            elif len(row) == len(header):
                yield _parse_row(source, line, dict(zip(header, row, strict=True)), fields)
            elif row:
                reason = f"the row has {len(row)} fields, the header {len(header)}"
                yield reject(InvalidInput(reason), source.name, line, ",".join(row))
    finally:
        text.detach()  # or its end would close the stream


def _read_whole(source: Source, stream: IO[bytes]) -> Sourced | Rejected:
    most = limits.MAX_TEXT_BYTES
    raw = stream.read(most + 4)  # with a byte order mark of three
    try:
        if len(raw) > most + 3:
            raise TextTooLong(f"the file has more than {most} bytes")
        text = _decode(raw).removeprefix("\ufeff")
        return Sourced(FieldMap().parse({"text": text}, source.name), source.name, 1)
    except VecfleetError as error:
        return reject(error, source.name, 1, raw)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"it is not valid UTF-8: {error}", field="text") from None
