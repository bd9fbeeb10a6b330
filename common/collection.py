"""What a collection is, as its record travels between the catalogue, Redis and the doors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from vecfleet.common.errors import CorruptPayload, InvalidInput
from vecfleet.common.keys import DEFAULT_HOME, DEFAULT_TENANT, QueueName, merge_queue, search_queue
from vecfleet.common.plain import build

VersionMode = Literal["assigned", "given"]
IndexPolicy = Literal["auto", "articles", "exact"]


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """What the creator of a collection chooses."""

    model: str  # the model's name as its worker announces it
    space: str  # Space.id; pinned
    dimension: int  # of its vectors: the model's own, or fewer, to which they are cut
    policy: IndexPolicy = "auto"
    recall_target: float = 0.98
    versions: VersionMode = "assigned"

    def checked(self) -> CollectionSpec:
        """The spec itself; raises an ``InvalidInput`` that names the field at fault."""
        for field, value, allowed in (
            ("policy", self.policy, get_args(IndexPolicy)),
            ("versions", self.versions, get_args(VersionMode)),
        ):
            if value not in allowed:
                raise InvalidInput(f"{field} must be one of {', '.join(allowed)}", field=field)
        if not isinstance(self.recall_target, float) or not 0.5 <= self.recall_target <= 1.0:
            raise InvalidInput("recall_target must be from 0.5 to 1", field="recall_target")
        return self

    def to_wire(self) -> dict[str, Any]:
        """The spec as plain data."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: object) -> CollectionSpec:
        """The spec that ``to_wire`` wrote; raises ``CorruptPayload`` for what it did not."""
        return build(cls, wire)


@dataclass(frozen=True, slots=True)
class Collection:
    """A collection: its name, its unmistakable uid, its spec, and where it lives."""

    name: str
    uid: str  # 128 random bits, hex; a name can be used again, a uid never
    spec: CollectionSpec
    tenant: str = DEFAULT_TENANT
    home: str = DEFAULT_HOME  # the aggregator that holds it
    partitions: int = 1
    created_s: float = 0.0

    @property
    def merge_queue(self) -> QueueName:
        """Where shards for partition 0 go."""
        return merge_queue(self.uid, self.tenant)

    @property
    def search_queue(self) -> QueueName:
        """Where reads go."""
        return search_queue(self.home, self.tenant)

    def to_wire(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: object) -> Collection:
        """The record that ``to_wire`` wrote; raises ``CorruptPayload`` for what it did not."""
        collection = build(cls, wire)
        if collection.spec.dimension < 1:
            raise CorruptPayload("CollectionSpec.dimension is less than 1")
        return collection
