"""Rows of a Parquet file, batch by batch; the one module that imports pyarrow."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import IO, Any

from vecfleet.common.errors import ConfigError

BATCH_ROWS = 1024


def need_pyarrow() -> None:
    """Raise ``ConfigError`` where pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "reading Parquet needs pyarrow; get it with: pip install 'vecfleet[parquet]'"
        )


def read_rows(file: IO[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number from 1; times, dates and decimals become strings.

    Raises ``ConfigError`` without pyarrow, ``OSError`` when the file is none or breaks off.
    """
    need_pyarrow()
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise OSError(f"{name} is no Parquet file: {error}") from error
    number = 0
    try:
        # One thread: the other cores belong to the fleet, and rows come in the file's order.
        for batch in table.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield number, {column: _plain(value) for column, value in row.items()}
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def _plain(value: Any) -> Any:
    """What JSON can hold, of a value as pyarrow gives it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value  # bytes: the document's checks refuse it
