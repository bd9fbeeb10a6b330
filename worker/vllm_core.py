"""One ``AsyncLLM``, its processes and its errors: what of vLLM runs in the worker's process.

Written for vLLM 0.32.  Import it only after ``memory.prepare_vllm_process``, and in a main module
behind an ``if __name__ == "__main__"``: vLLM may start its processes by spawning.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm import PoolingParams
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from vecfleet.common.errors import ConfigError, EngineFailed
from vecfleet.worker.engine_plan import EnginePlan
from vecfleet.worker.model_files import ModelFiles
from vecfleet.worker.prompts import QWEN3_NO, QWEN3_YES
from vecfleet.worker.tokenizer import Tokens

_END_S = 15.0
_POOLING = {"mean": "MEAN", "cls": "CLS", "last": "LAST"}

OnStepEnd = Callable[[list[str]], None]  # the requests that a step finished, or none

log = logging.getLogger(__name__)


class CoreDiedError(Exception):
    """vLLM's process is gone, and with it all that was asked of it."""


class TextRefusedError(Exception):
    """vLLM takes everything but this text."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A text that vLLM was asked to compute."""

    request_id: str
    collector: RequestOutputCollector


class _StepLog(StatLoggerBase):  # type: ignore[misc]
    """Hears of each of vLLM's steps."""

    def __init__(self, on_step_end: OnStepEnd) -> None:
        self._on_step_end = on_step_end

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None:  # word of requests, and no step
            return
        finished = iteration_stats.finished_requests if iteration_stats is not None else ()
        self._on_step_end([str(request.request_id) for request in finished])

    def log_engine_initialized(self) -> None:
        """Nothing to say: the worker logs its own start."""


class VllmCore:
    """A running vLLM, used on one event loop; only ``start`` blocks."""

    def __init__(
        self,
        llm: AsyncLLM,
        params: PoolingParams,
        vocabulary: int,
        children: Collection[BaseProcess] = (),
    ) -> None:
        """``children`` are the processes that ``llm`` has started."""
        self._children = children
        self._llm = llm
        self._params = params
        self._vocabulary = vocabulary
        self.in_flight = 0  # texts; at a death, those that it died with

    @classmethod
    def start(
        cls, files: ModelFiles, plan: EnginePlan, step_tokens: int, on_step_end: OnStepEnd
    ) -> VllmCore:
        """Load the model: half a minute.

        Raises ``ConfigError`` with what vLLM says of the model or the settings, ``EngineFailed``
        where its process ends: what it printed tells why, and another try may go well.
        """
        arguments = engine_arguments(files, plan, step_tokens)
        others = multiprocessing.active_children()
        try:
            llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**arguments),
                stat_loggers=[lambda config, index: _StepLog(on_step_end)],
            )
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"vLLM cannot run {files.name}: {error}"[:600], field="model"
            ) from error
        except RuntimeError as error:
            raise EngineFailed(f"vLLM does not start with {files.name}: {error}"[:600]) from error
        task = "embed" if files.kind == "embedding" else "classify"
        # Scores come as logits: which activation vLLM would take depends on a model's files.
        params = PoolingParams(task=task, use_activation=task == "embed")
        children = [one for one in multiprocessing.active_children() if one not in others]
        return cls(llm, params, files.shape.vocabulary, children)

    async def ask(self, request_id: str, tokens: Tokens, number: int) -> Asked:
        """Let a text wait for its step; what has the smallest ``number`` goes first.

        Raises ``TextRefusedError`` and ``CoreDiedError``.
        """
        if int(tokens.ids.max()) >= self._vocabulary:
            # vLLM asks its tokenizer, which is not loaded here, and the process would die.
            raise TextRefusedError("the tokenizer gave a token that the model does not have")
        params = self._params
        if tokens.types is not None and tokens.types.any():
            second = int(np.argmax(tokens.types))  # where the second text of a pair begins
            params = params.clone()
            params.extra_kwargs = {"compressed_token_type_ids": second}
        try:
            collector = await self._llm.add_request(
                request_id, tokens_input(tokens.ids.tolist()), params, priority=number
            )
        except EngineDeadError as error:
            raise CoreDiedError(str(error)) from error
        except (VLLMClientError, ValueError) as error:
            raise TextRefusedError(str(error)) from error
        self.in_flight += 1
        return Asked(request_id, collector)

    async def result(self, asked: Asked) -> tuple[NDArray[np.float32], int]:
        """The row that was computed, (width,) float32, and how many tokens a cache spared.

        Raises ``CoreDiedError``.
        """
        try:
            output = asked.collector.get_nowait() or await asked.collector.get()
        except EngineDeadError as error:
            raise CoreDiedError(str(error)) from error
        self.in_flight -= 1
        row: NDArray[np.float32] = output.outputs.data.float().numpy()
        if self._params.task == "classify":
            row = relevance(row)
        return row, int(output.num_cached_tokens)

    async def forget(self, asked: Iterable[Asked]) -> None:
        """Drop texts that no step has taken yet."""
        if not self.is_dead:
            names = [one.collector.request_id for one in asked]
            self.in_flight -= len(names)
            await self._llm.abort(names, internal=True)

    @property
    def is_dead(self) -> bool:
        """Whether vLLM's process is gone."""
        return bool(self._llm.errored)

    async def stop(self) -> None:
        """End vLLM's processes; who waits for a result of one that died is told."""
        if self.is_dead:
            # Its own handler may not have come to it yet, and is cancelled here.
            self._llm.output_processor.propagate_error(EngineDeadError())
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # or it would report the end as a failure
        await asyncio.to_thread(self._end_processes)

    def _end_processes(self) -> None:
        self._llm.shutdown()
        for child in self._children:
            child.join(_END_S)
            if child.is_alive():
                log.warning("vLLM's process %s does not end and is killed", child.name)
                child.kill()
                child.join()


def relevance(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(1,) in [0, 1] from (1,) or (2,) logits: by sigmoid, by softmax."""
    score = logits[0] if len(logits) == 1 else logits[1] - logits[0]
    return np.array([1 / (1 + np.exp(-score))], np.float32)


def engine_arguments(files: ModelFiles, plan: EnginePlan, step_tokens: int) -> dict[str, Any]:
    """What ``AsyncEngineArgs`` is told."""
    is_reranker = files.kind == "qwen3-reranker"
    arguments: dict[str, Any] = {
        "model": str(files.path),
        "runner": "pooling",
        "dtype": plan.dtype,
        "max_model_len": plan.max_model_len,
        "max_num_batched_tokens": step_tokens,
        "max_num_seqs": plan.max_num_seqs,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "scheduling_policy": "priority",
        "scheduler_cls": "vecfleet.worker.vllm_scheduler.QueriesFirst",
        "worker_extension_cls": "vecfleet.worker.vllm_child.DiesWithParent",
        # Pairs share the instruction and often the query. Documents share nothing, and one that is
        # sent again is not embedded again: for them, hashes and kept blocks would buy nothing.
        "enable_prefix_caching": is_reranker,
        "disable_log_stats": True,
        "enable_log_requests": False,
        "trust_remote_code": False,
        "load_format": "safetensors",
    }
    if plan.quantization == "fp8":
        arguments["quantization"] = "fp8"
    if files.kind == "embedding":
        arguments["convert"] = "embed"
        arguments["skip_tokenizer_init"] = True
        arguments["pooler_config"] = PoolerConfig(
            seq_pooling_type=_POOLING[files.pooling], use_activation=True
        )
    if is_reranker:
        arguments["hf_overrides"] = {
            "architectures": ["Qwen3ForSequenceClassification"],
            "classifier_from_token": [QWEN3_NO, QWEN3_YES],
            "is_original_qwen3_reranker": True,
        }
    if plan.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = plan.gpu_memory_utilization
    else:
        arguments["enforce_eager"] = True
    if plan.kv_cache_bytes is not None:  # on a GPU, vLLM takes this instead of filling its share
        arguments["kv_cache_memory_bytes"] = plan.kv_cache_bytes
    return arguments
