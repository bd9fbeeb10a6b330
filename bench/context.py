"""What all measurements share: sizes, the working folder, the texts, and the fleets they run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vecfleet.bench import texts
from vecfleet.bench.rig import Rig
from vecfleet.common.settings import DEFAULT_MODEL, Settings

NULL_POOL = 20_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    passages: int = 2000  # of one pass through the engine
    repetitions: int = 5
    held_out: int = 1500  # passages that no collection holds; queries come from them
    null_documents: int = 200_000
    null_repetitions: int = 3
    http_queries: int = 300  # one at a time
    single_s: float = 10.0  # of single queries, 32 at once
    interactive_queries: int = 300  # one at a time while bulk saturates
    share_s: float = 20.0
    searches: int = 1000  # in each phase of the search measurement
    recall_documents: int = 200_000
    recall_anchors: int = 6000  # real vectors that these are mixed from
    recall_queries: int = 300
    growth_documents: int = 1_000_000


QUICK = Sizes(
    passages=64,
    repetitions=1,
    held_out=64,
    null_documents=5000,
    null_repetitions=1,
    http_queries=20,
    single_s=1.0,
    interactive_queries=10,
    share_s=5.0,
    searches=50,
    recall_documents=5000,
    recall_anchors=200,
    recall_queries=20,
    growth_documents=20_000,
)


@dataclass(slots=True)
class Bench:
    """One run of the bench."""

    folder: Path  # for data and logs; removed at the end
    sizes: Sizes
    model: str = DEFAULT_MODEL
    say: Callable[[str], None] = print
    _passages: list[str] = field(default_factory=list)
    _rigs: int = 0

    @property
    def passages(self) -> list[str]:
        """Real passages to index."""
        return self._all_passages()[: -self.sizes.held_out]

    @property
    def queries(self) -> list[str]:
        """Short questions about passages that are in no collection."""
        return texts.queries_from(self._all_passages()[-self.sizes.held_out :])

    def pool(self, name: str) -> Path:
        """A file of texts for a child process: "passages", or "pieces" of 400 bytes on average."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            if name == "passages":
                texts.save(self.passages[: self.sizes.passages], path)
            else:
                texts.save(texts.pieces_of(self.passages, NULL_POOL), path)
        return path

    @asynccontextmanager
    async def rig(self, engine: str = "torch") -> AsyncIterator[Rig]:
        """A fleet of its own, with data that start empty."""
        self._rigs += 1
        data = self.folder / f"fleet-{self._rigs}"
        data.mkdir()
        model = engine if engine in ("fake", "null") else self.model
        never = {"max_cpu_percent": 100, "max_memory_percent": 100}  # no worker shall pause
        settings = Settings.checked(
            {"data": data, "port": 0, "engine": engine, "model": model, **never}
        )
        self.say(f"starting a fleet with the {engine} engine")
        async with Rig(settings) as rig:
            yield rig

    def _all_passages(self) -> list[str]:
        if not self._passages:
            self.say("reading passages: docstrings of the installed packages")
            wanted = max(self.sizes.passages, self.sizes.recall_anchors) + self.sizes.held_out
            self._passages = texts.read_passages(wanted)
        return self._passages
