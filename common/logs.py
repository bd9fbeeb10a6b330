"""Log lines: readable on a terminal, JSON otherwise, each with its request's id.

No line holds a text, a vector or a key: what goes into a line is a number, a name or an id. So what
nobody caught, in a task, a callback, a thread or the main program, is told by the same rule.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

from vecfleet.common.errors import CorruptData, InvalidInput, JobFailed, VecfleetError

LogFormat = Literal["auto", "text", "json"]  # auto: text on a terminal, else JSON

request_id: ContextVar[str] = ContextVar("request_id", default="")

# Other errors' messages quote what they could not use, and that may be somebody's text.
_PLAIN = (VecfleetError, OSError, MemoryError, TimeoutError)
_QUOTING = (InvalidInput, JobFailed, CorruptData)
_PLAIN_MODULES = ("redis", "torch", "sqlite3", "faiss")
_OF_THE_MACHINE = ("CUDA", "cuDNN", "CUBLAS", "cuBLAS", "NCCL", "HIP", "[enforce fail")
_SHOWN_CHARACTERS = 500
_COMMAND = re.compile(r"Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)  # redis-py's

log = logging.getLogger(__name__)
_QUIET = dict.fromkeys(
    ("uvicorn.access", "uvicorn.error", "httpx", "faiss.loader"), logging.WARNING
)


def setup_logging(
    level: str = "info", stream: TextIO | None = None, log_format: LogFormat = "auto"
) -> None:
    """Send every logger's lines of at least ``level`` to ``stream`` (standard error)."""
    out = stream or sys.stderr
    handler = logging.StreamHandler(out)
    readable = log_format == "text" or (log_format == "auto" and out.isatty())
    handler.setFormatter(ReadableFormatter() if readable else JsonFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name, least in _QUIET.items():
        logging.getLogger(name).setLevel(max(least, root.level))
    logging.getLogger("asyncio").addFilter(_without_values)
    threading.excepthook = _on_dead_thread
    sys.excepthook = _on_end
    sys.unraisablehook = _on_unraisable


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Named values for a line: ``log.info("closed", extra=fields(rows=3))``."""
    return {"fields": values}


def shown(error: BaseException) -> str:
    """An error as a log may have it: its type, and its message where that quotes nobody's text.

    The whole message is for the one who sent the text: it is in the answer and in the dead letter.
    """
    name = type(error).__name__
    message = str(error)
    is_plain = isinstance(error, _PLAIN) and not isinstance(error, _QUOTING)
    is_plain |= type(error).__module__.split(".")[0] in _PLAIN_MODULES
    if message and (is_plain or message.startswith(_OF_THE_MACHINE)):
        return f"{name}: {_COMMAND.sub('', message)}"[:_SHOWN_CHARACTERS]
    return name


def _without_values(record: logging.LogRecord) -> bool:
    """Cut what an event loop says of a failure to what failed.

    After that it shows the task or the call, with its result, its error or its arguments.
    """
    if record.levelno >= logging.ERROR:
        said = record.getMessage().partition("\n")[0].partition("(")[0]
        record.msg, record.args = said, ()
    return True


def _on_dead_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_type is not SystemExit:
        log.error("a thread died", exc_info=_info(ended.exc_value, ended.exc_traceback))


def _on_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("the program ends", exc_info=_info(error, trace))


def _on_unraisable(failed: sys.UnraisableHookArgs) -> None:
    log.error(
        "an error where none can be raised", exc_info=_info(failed.exc_value, failed.exc_traceback)
    )


def _info(error: BaseException | None, trace: TracebackType | None) -> Any:
    return error and (type(error), error, trace)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, logger, message, request id, named values, and where it failed."""
        line: dict[str, Any] = {
            "time": _utc(record.created).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        line.update(getattr(record, "fields", {}))
        if trace := _trace(record):
            line["exception"] = trace
        return json.dumps(line, ensure_ascii=False, default=str)


class ReadableFormatter(logging.Formatter):
    """One line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, message, named values, request id."""
        parts = [
            f"{_utc(record.created):%H:%M:%S} {record.levelname.lower():7} {record.getMessage()}"
        ]
        parts += [f"{name}={value}" for name, value in getattr(record, "fields", {}).items()]
        if current := request_id.get():
            parts.append(f"[{current}]")
        if trace := _trace(record):
            parts.append(f"\n{trace}")
        return " ".join(parts)


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _trace(record: logging.LogRecord) -> str:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return ""
    return "".join(traceback.format_tb(error.__traceback__)) + shown(error)
