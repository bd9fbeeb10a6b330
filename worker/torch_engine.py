"""Embeds and reranks with transformers, on a CPU or one GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from vecfleet.worker.calls import Encode, Rows
from vecfleet.worker.engine import EngineStats, Priority
from vecfleet.worker.model_files import ModelFiles, find_model
from vecfleet.worker.step_loop import StepLoop
from vecfleet.worker.text_engine import TextEngine
from vecfleet.worker.tokenizer import TextTokenizer, Tokens, load_tokenizer
from vecfleet.worker.torch_loading import TorchSettings, load_model
from vecfleet.worker.torch_model import TorchModel

T = TypeVar("T")


def _quantization(model: TorchModel) -> dict[str, float]:
    """What the card says of 8-bit weights: the cosine to the model without, on the worst trial."""
    found = model.quantized_cosine
    return {} if found is None else {"quantization_cosine": round(found, 4)}


class TorchEngine(TextEngine):
    """One model and its step thread; made by ``load``."""

    def __init__(
        self,
        files: ModelFiles,
        tokenizer: TextTokenizer,
        model: TorchModel,
        steps: StepLoop[Tokens],
        settings: TorchSettings,
    ) -> None:
        super().__init__(files, tokenizer)
        self._steps = steps
        self.card = files.card(
            dtype=str(model.dtype).removeprefix("torch."),
            engine="torch",
            served_name=settings.served_name,
            quantization=settings.quantization,
            settings={
                **settings.chosen,
                "max_num_batched_tokens": model.step_tokens,
                **_quantization(model),
            },
        )
        self.device = str(model.device)
        self.step_tokens = model.step_tokens  # tokens of a forward pass
        self.model_is_packed = model.packed  # whether passes run without padding

    @classmethod
    async def load(cls, name: str, settings: TorchSettings | None = None) -> TorchEngine:
        """Find a model and ``start``; raises ``ConfigError``."""
        settings = settings or TorchSettings()
        files = await asyncio.to_thread(
            find_model, name, max_tokens=settings.max_tokens, task=settings.task
        )
        return await cls.start(files, settings)

    @classmethod
    async def start(cls, files: ModelFiles, settings: TorchSettings) -> TorchEngine:
        """Load, warm up and measure a model: seconds. Raises ``ConfigError``.

        ``memory.prepare_process`` is called before this module is imported.
        """
        tokenizer = await asyncio.to_thread(load_tokenizer, files)
        steps = StepLoop[Tokens]("torch", on_step=settings.on_step)
        loaded: list[TorchModel] = []

        def load() -> TorchModel:
            loaded.append(load_model(files, tokenizer, settings))
            return loaded[0]

        await steps.start(load)
        return cls(files, tokenizer, loaded.pop(), steps, settings)

    @property
    def stats(self) -> EngineStats:
        """See ``Engine.stats``."""
        return self._steps.stats

    async def _compute(
        self, texts: Sequence[T], encode: Encode[T, Tokens], priority: Priority, *, whole: bool
    ) -> Rows:
        return await self._steps.submit(texts, encode, priority=priority, whole=whole)

    async def close(self) -> None:
        """See ``Engine.close``."""
        await self._steps.close()
