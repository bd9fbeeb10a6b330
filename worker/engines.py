"""Choosing an engine; each is imported only when it is chosen, for the imports are heavy."""

from __future__ import annotations

from typing import Any, Protocol, cast

from vecfleet.common.errors import ConfigError
from vecfleet.worker.engine import Engine
from vecfleet.worker.memory import prepare_process


class EngineChoice(Protocol):
    """What decides which engine a worker gets."""

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def engine(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def threads(self) -> int | None: ...  # noqa: D102
    @property
    def served_name(self) -> str | None: ...  # noqa: D102


async def load_engine(choice: EngineChoice) -> Engine:
    """The engine that ``choice`` asks for, ready to work; raises ``ConfigError``."""
    match choice.engine:
        case "auto" | "torch":
            prepare_process()  # before torch is imported
            from vecfleet.worker.torch_engine import TorchEngine
            from vecfleet.worker.torch_loading import TorchSettings

            return await TorchEngine.load(
                choice.model,
                TorchSettings(
                    device=choice.device,
                    dtype=cast(Any, choice.dtype),
                    threads=choice.threads,
                    served_name=choice.served_name,
                ),
            )
        case "fake":
            from vecfleet.worker.fake_engine import FakeEngine, FakeSettings

            return await FakeEngine.load(FakeSettings(name=choice.served_name or choice.model))
        case "null":
            from vecfleet.worker.fake_engine import NullEngine

            return NullEngine(name=choice.served_name or choice.model)
        case other:
            raise ConfigError(f"engine {other!r} is not one of auto, torch, fake, null")
