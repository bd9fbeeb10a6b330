"""One terminal for many processes: each line with the name of who said it."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from vecfleet.common.logs import LogFormat

FLEET = "fleet"
_COLOURS = ("36", "35", "34", "32", "33", "96", "95", "94")
_LEVEL_COLOURS = {"warning": "33", "error": "31", "critical": "31;1", "debug": "2"}
_NAME_WIDTH = 10
_PLACED = {"time", "level", "logger", "message", "exception"}


class Console:
    """Prints the lines of the fleet's processes: coloured, plain, or as JSON lines."""

    def __init__(self, stream: TextIO | None = None, log_format: LogFormat = "auto") -> None:
        """``auto`` is text on a terminal and JSON lines otherwise."""
        self._stream = stream or sys.stdout
        self._colour = self._stream.isatty()
        self._as_json = log_format == "json" or (log_format == "auto" and not self._colour)
        self._colours: dict[str, str] = {FLEET: "1"}

    def line(self, name: str, line: str) -> None:
        """Print what the process ``name`` said: a JSON log line, or anything else."""
        entry = _parsed(line)
        if self._as_json:
            self._print(json.dumps({**(entry or _entry(line)), "process": name}, default=str))
            return
        text = line if entry is None else render(entry, colour=self._colour)
        for part in text.splitlines() or [""]:
            self._print(f"{self._prefix(name)} {part}")

    def say(self, message: str, *, level: str = "info", **fields: Any) -> None:
        """Print a line of the fleet's own."""
        self.line(FLEET, log_line(message, level=level, **fields))

    def _prefix(self, name: str) -> str:
        if name not in self._colours:
            self._colours[name] = _COLOURS[(len(self._colours) - 1) % len(_COLOURS)]
        return _paint(f"{name:<{_NAME_WIDTH}}│", self._colours[name], colour=self._colour)

    def _print(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            return  # nobody reads any more (`vecfleet up | head`): the fleet goes on


def log_line(message: str, *, level: str = "info", **fields: Any) -> str:
    """A JSON log line of this moment."""
    return json.dumps({**_entry(message), "level": level, **fields}, default=str)


def render(entry: dict[str, Any], *, colour: bool = False) -> str:
    """A JSON log line as a person reads it: time, level, message, and what else there is."""
    level = str(entry.get("level", "info"))
    parts = [_local_time(str(entry.get("time", "")))]
    if level != "info":
        parts.append(_paint(level, _LEVEL_COLOURS.get(level, "0"), colour=colour))
    parts.append(str(entry.get("message", "")))
    extra = " ".join(f"{name}={value}" for name, value in entry.items() if name not in _PLACED)
    if extra:
        parts.append(_paint(extra, "2", colour=colour))
    line = " ".join(parts)
    return f"{line}\n{entry['exception']}" if "exception" in entry else line


def _paint(text: str, code: str, *, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def _local_time(stamp: str) -> str:
    try:
        return datetime.fromisoformat(stamp).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return stamp


def _entry(message: str) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"time": now, "level": "info", "message": message}


def _parsed(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "message" in entry else None
