"""Redis's append-only file after a power cut or a kill: made whole before Redis loads it.

Where the file ends in half a transaction, Redis loads it without that transaction, but leaves its
first commands in the file, and appends to them. At the next start but one it carries them out as if
they had been meant so, and what was written in between may be gone. Seen with 6.2 and 7.0.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from vecfleet.common.errors import ConfigError

_TOOL = "redis-check-aof"  # the server's own program under another name
_TIMEOUT_S = 600.0
_MANIFEST, _SINGLE = Path("appendonlydir", "appendonly.aof.manifest"), Path("appendonly.aof")
# What it says of bytes that belong to no command; where the file just ends, it shows zeros. Such a
# file is left for Redis to refuse: the tool would cut off everything behind them.
_DAMAGED = re.compile(r"format error|Expected prefix|Expected \\r\\n, got: (?!00)..(?!00)..")
# Of the file that grows; what it says of another, such as a damaged base, is Redis's to refuse too.
_LOST = re.compile(r"^AOF analyzed: (?:filename=\S+\.incr\.aof, )?size=.* diff=([1-9]\d*)$", re.M)


def make_whole(redis_server: Path, data_dir: Path) -> int:
    """Cut half a transaction off the end of the file; returns how many bytes that was.

    A file that is damaged elsewhere is left alone. ``redis_server`` is the program. Raises
    ``ConfigError`` when it cannot be run.
    """
    files = [data_dir / name for name in (_MANIFEST, _SINGLE) if (data_dir / name).exists()]
    if not files:
        return 0
    found = _run(redis_server, str(files[0]))
    if found.returncode == 0 or _DAMAGED.search(found.stdout):
        return 0
    told = _LOST.findall(found.stdout)
    if not told:
        return 0
    mended = _run(redis_server, "--fix", str(files[0]))
    if mended.returncode != 0:
        raise ConfigError(f"{_TOOL} could not mend {files[0]}: {mended.stdout[-300:]}")
    return int(told[-1])


def _run(redis_server: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [_TOOL, *arguments],
            executable=redis_server,
            input="y\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot check Redis's file with {redis_server}: {error}") from error
