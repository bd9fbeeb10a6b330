"""The files to read: finding them, telling their formats, opening them decompressed."""

from __future__ import annotations

import glob
import gzip
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast, get_args

import zstandard

from vecfleet.common.errors import ConfigError

Format = Literal["jsonl", "csv", "tsv", "parquet", "text", "files"]
Compression = Literal["", "gzip", "zstd"]
FORMATS: tuple[Format, ...] = get_args(Format)

STDIN = "-"
UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError)  # while a file is being read

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "files",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_MAGIC: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read, or standard input."""

    path: Path | None  # None is standard input
    name: str  # how its rows are named: the path below the argument that led to it
    format: Format
    compression: Compression
    size: int | None  # bytes on disk; None where nobody knows

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """The decompressed stream, and the raw one below it, whose position is the progress."""
        if self.path is None:
            raw = cast(IO[bytes], sys.stdin.buffer)
            yield self._decompressed(raw, self._sniffed(raw)), raw
            return
        with self.path.open("rb", buffering=_BUFFER_BYTES) as file:
            yield self._decompressed(file, self.compression), file

    def _sniffed(self, raw: IO[bytes]) -> Compression:
        peek = getattr(raw, "peek", None)
        head: bytes = peek(4) if peek else b""
        return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")

    def _decompressed(self, raw: IO[bytes], compression: Compression) -> IO[bytes]:
        if compression == "gzip":
            return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
        if compression == "zstd":
            reader = zstandard.ZstdDecompressor().stream_reader(
                raw, read_across_frames=True, closefd=False
            )
            return cast(IO[bytes], reader)
        return raw


def find_sources(paths: Sequence[str | Path], format: Format | None = None) -> list[Source]:
    """The files that arguments lead to: files, patterns, directories, ``-`` for standard input.

    A directory is searched for files whose ending tells a format, or, with ``format``, for all;
    hidden ones are left out. The order is fixed: arguments as given, within them by name. Raises
    ``ConfigError`` that says what is missing or cannot be told.
    """
    if not paths:
        raise ConfigError("name at least one file, or - for standard input")
    if [str(path) for path in paths].count(STDIN) > 1:
        raise ConfigError("standard input (-) can be read once only")
    if "" in map(str, paths):
        # As a path it is the current directory: an unset variable of a script would send all of it.
        raise ConfigError("a file's name must not be empty; write . for the current directory")
    found = [entry for path in paths for entry in _expand(str(path), format)]
    # Two files of one name would give their rows the same ids.
    names = Counter(source.name for source in found)
    return [
        source
        if names[source.name] == 1
        else Source(source.path, str(source.path), source.format, source.compression, source.size)
        for source in found
    ]


def _expand(argument: str, format: Format | None) -> list[Source]:
    if argument == STDIN:
        chosen = format or "jsonl"
        if chosen == "parquet":
            raise ConfigError("Parquet cannot be read from standard input; save it to a file first")
        return [Source(None, "stdin", chosen, "", None)]
    path = Path(argument)
    if path.is_dir():
        return _directory(path, format)
    if path.exists():
        return [_source(path, path.name, format)]
    # Path.glob knows no absolute patterns.
    has_magic = glob.has_magic(argument)
    matches = sorted(glob.glob(argument, recursive=True)) if has_magic else []  # noqa: PTH207
    if not matches:
        raise ConfigError(f"{argument}: there is no such file")
    files = [Path(match) for match in matches if Path(match).is_file()]
    return [_source(file, file.name, format) for file in files]


def _directory(folder: Path, format: Format | None) -> list[Source]:
    sources = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        if format is not None or _format_of(path) is not None:
            sources.append(_source(path, inside.as_posix(), format))
    if not sources:
        raise ConfigError(
            f"{folder}: no file in it has a known ending ({', '.join(sorted(_FORMATS))}); "
            f"say what they are with --format {'|'.join(FORMATS)}"
        )
    return sources


def _source(path: Path, name: str, format: Format | None) -> Source:
    chosen = format or _format_of(path)
    if chosen is None:
        raise ConfigError(
            f"{path}: cannot tell its format; say it with --format {'|'.join(FORMATS)}"
        )
    compression = _COMPRESSIONS.get(path.suffix.lower(), "")
    if chosen == "parquet" and compression:
        raise ConfigError(f"{path}: Parquet is compressed inside; decompress the file first")
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return Source(path, name, chosen, compression, size if path.is_file() else None)


def _format_of(path: Path) -> Format | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None
