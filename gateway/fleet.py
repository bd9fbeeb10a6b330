"""The part of the fleet's client that the gateway uses, so that tests can put another behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vecfleet.common.collection import Collection
from vecfleet.common.dead_letter import DeadLetter
from vecfleet.common.directory import ServedModel
from vecfleet.common.document import Block
from vecfleet.common.fleet_state import FleetState
from vecfleet.common.model import ModelCard, Task
from vecfleet.common.payloads import EmbedReply, RerankReply, SearchReply, StoredDocument
from vecfleet.common.queue_client import Admitted
from vecfleet.common.submission import Submission


class SubmissionBook(Protocol):
    """``common.submission.Submissions``."""

    async def open(
        self,
        submission_id: str,
        *,
        tenant: str,
        collection: str,
        uid: str,
        first_block: str = "",
        once: bool = False,
    ) -> str:
        """Make a submission known."""
        ...

    async def close(
        self, submission_id: str, *, blocks: int, documents: int, content: str = ""
    ) -> str:
        """Tell how many blocks it has."""
        ...

    async def get(self, submission_id: str, *, with_errors: bool = False) -> Submission:
        """How it stands."""
        ...

    async def cancel(self, submission_id: str) -> Submission:
        """Stop it."""
        ...

    async def discard(self, submission_id: str, spare_s: int = 0) -> None:
        """Forget one into which nothing went."""
        ...


class Fleet(Protocol):
    """``common.fleet_client.FleetClient``.

    Unlike there, ``tenant`` has no default: a route that forgets whom it acts for does not pass
    the type check.
    """

    @property
    def submissions(self) -> SubmissionBook:
        """The progress of what was submitted."""
        ...

    @property
    def dead_letter(self) -> DeadLetter:
        """What could not be done."""
        ...

    async def models(self) -> list[ServedModel]:
        """The announced models."""
        ...

    async def embedder(self, collection: Collection) -> ModelCard:
        """A model whose vectors can be compared with the collection's."""
        ...

    async def find_model(self, name: str | None, task: Task, *, live: bool = True) -> ModelCard:
        """The card of a model that does ``task``."""
        ...

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | ModelCard | None = None,
        prompt_name: str | None = None,
        prompt: str = "",
        instruction: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
        tenant: str,
    ) -> EmbedReply:
        """Vectors of texts."""
        ...

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | ModelCard | None = None,
        instruction: str = "",
        truncate: bool = True,
        tenant: str,
    ) -> RerankReply:
        """Relevance of documents to a query."""
        ...

    async def create_collection(
        self,
        name: str,
        *,
        model: str | None = None,
        policy: str = "auto",
        recall_target: float = 0.98,
        versions: str = "assigned",
        dimensions: int | None = None,
        tenant: str,
    ) -> Collection:
        """Create a collection, or find the same one."""
        ...

    async def delete_collection(self, name: str, *, tenant: str) -> str:
        """Delete a collection."""
        ...

    async def collection(self, name: str, *, tenant: str) -> Collection:
        """A collection's record."""
        ...

    async def collections(self, *, tenant: str) -> list[Collection]:
        """All collections of a tenant."""
        ...

    async def collection_stats(self, collection: Collection) -> dict[str, Any]:
        """What the search process sees."""
        ...

    async def check_room(self, collection: Collection, body_bytes: int = 0) -> None:
        """Refuse documents that there is no room for, before they are read."""
        ...

    async def enqueue_blocks(
        self,
        collection: Collection,
        blocks: Sequence[Block],
        *,
        submission: str,
        first_place: int = 0,
        truncate: bool = True,
    ) -> Admitted:
        """Put blocks of documents on their way, all or none."""
        ...

    async def enqueue_delete(
        self,
        collection: Collection,
        ids: Sequence[str],
        *,
        submission: str,
        place: int = 0,
        version: int | None = None,
    ) -> Admitted:
        """Put deletions on their way."""
        ...

    async def documents(
        self, collection: Collection, ids: Sequence[str]
    ) -> list[StoredDocument | None]:
        """Stored documents."""
        ...

    async def search(
        self,
        collection: Collection,
        vectors: bytes,
        *,
        top_k: int = 10,
        threshold: float | None = None,
        exact: bool = False,
    ) -> SearchReply:
        """The nearest documents."""
        ...

    async def state(self) -> FleetState:
        """Queues and workers, for metrics."""
        ...
