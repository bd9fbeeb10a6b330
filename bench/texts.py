"""What the bench feeds: real passages, short queries, and passages cut to a given mean length."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vecfleet.fleet.corpus import read_corpus

QUERY_WORDS = 7  # about ten tokens
NULL_TEXT_BYTES = (200, 600)  # 400 on average
_NOT_WORDS = re.compile(r"[^A-Za-z0-9_' -]+")


def read_passages(count: int) -> list[str]:
    """The first docstrings of the installed packages."""
    return [document["text"] for document in read_corpus(limit=count)]


def queries_from(passages: Sequence[str]) -> list[str]:
    """A short question out of the beginning of each passage."""
    return [
        " ".join(_NOT_WORDS.sub(" ", passage).split()[:QUERY_WORDS]) or "what does it do"
        for passage in passages
    ]


def pieces_of(passages: Sequence[str], count: int, seed: int = 1) -> list[str]:
    """``count`` different pieces of running text, 400 bytes on average."""
    chance = random.Random(seed)
    whole = re.sub(r"\s+", " ", " ".join(passages)).encode("ascii", "ignore").decode()
    found = []
    for _ in range(count):
        length = chance.randint(*NULL_TEXT_BYTES)
        start = chance.randrange(max(1, len(whole) - length))
        found.append(whole[start : start + length].strip() or "nothing")
    return found


def rows_of(texts: Sequence[str], prefix: str, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Numbered documents; their texts begin with the one at ``first`` and come round again."""
    for number in range(count):
        yield {"id": f"{prefix}-{number:08d}", "text": texts[(first + number) % len(texts)]}


def save(texts: Sequence[str], path: Path) -> None:
    """Keep texts for a child process."""
    path.write_text(json.dumps(list(texts)))


def load(path: Path) -> list[str]:
    """What ``save`` kept."""
    texts: list[str] = json.loads(path.read_text())
    return texts
