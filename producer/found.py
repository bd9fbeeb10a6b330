"""What a producer's reads answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vecfleet.common.collection import Collection
from vecfleet.common.directory import ServedModel
from vecfleet.common.fleet_state import FleetState, RedisMemory
from vecfleet.common.submission import Submission


@dataclass(frozen=True, slots=True)
class Found:
    """One found document."""

    id: str
    score: float  # cosine similarity
    text: str
    metadata: dict[str, Any] | None
    relevance: float | None = None  # from 0 to 1, where a reranker was asked


@dataclass(frozen=True, slots=True)
class CollectionStatus:
    """A collection and its numbers: documents, segments, bytes."""

    collection: Collection
    stats: dict[str, Any] | None  # None where the search process did not answer


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The fleet at a glance."""

    models: tuple[ServedModel, ...]
    state: FleetState
    collections: tuple[CollectionStatus, ...]
    submissions: tuple[Submission, ...]  # not done yet, newest first
    memory: RedisMemory | None  # None where this user may not ask for it
