"""The texts that engines are compared and measured with."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from vecfleet.common.errors import ConfigError
from vecfleet.fleet.corpus import read_corpus
from vecfleet.producer.items import Sourced
from vecfleet.producer.readers import read_documents

MAX_QUERY_CHARACTERS = 120
LEAST_TEXTS = 2


def sample_texts(path: Path | None, count: int) -> list[str]:
    """Up to ``count`` texts of a file as ``vecfleet ingest`` reads it, or of the docstrings here.

    Raises ``ConfigError`` where there are fewer than two.
    """
    if path is None:
        texts = [str(document["text"]) for document in read_corpus(limit=count)]
    else:
        found = (item for item in read_documents([path]) if isinstance(item, Sourced))
        texts = [item.document.text for item in islice(found, count)]
    if len(texts) < LEAST_TEXTS:
        raise ConfigError(f"{path or 'this environment'} has {len(texts)} texts; two are needed")
    return texts


def queries_of(texts: list[str], count: int) -> list[str]:
    """Up to ``count`` questions: how texts spread over the sample begin."""
    step = max(1, len(texts) // count)
    return [_beginning(text) for text in texts[::step][:count]]


def pairs_of(queries: list[str], texts: list[str]) -> list[tuple[str, str]]:
    """Every query with every text, query by query."""
    return [(query, text) for query in queries for text in texts]


def _beginning(text: str) -> str:
    """The first line, or as many whole words of it as make a question."""
    line = text.strip().splitlines()[0].strip() if text.strip() else ""
    if len(line) <= MAX_QUERY_CHARACTERS:
        return line or "what is this"
    return line[:MAX_QUERY_CHARACTERS].rsplit(" ", 1)[0]
