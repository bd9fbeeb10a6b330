"""A transformers model that turns a step's tokens into vectors or scores.

Two ways through the model: packed (``torch_packing``) and padded, transformers' own.  Padded is
right for every model; packed is taken after it gave the same result when the model was loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from vecfleet.worker.batching import Batcher, packed_cost, padded_cost, rounded
from vecfleet.worker.tokenizer import Tokens
from vecfleet.worker.torch_linear import Replaced, use_onednn
from vecfleet.worker.torch_packing import ATTENTION_NAME, Kernel, UnsupportedModel, pack

TRIAL_LENGTHS = (5, 16, 17, 48, 61, 61, 100, 199)
TIMED_TRIALS = 10
TIMED_TOKENS, TIMED_LENGTH = 512, 61  # passages are about so long; an odd length needs padding
GPU_TIMED_TOKENS = 8192  # a smaller step would tell how fast kernels are launched
# A lone query's products are too small to share: a second thread gains little, and costs much when
# its core is busy with another process.
ONE_THREAD_TOKENS = 32
_NO_HOST_MEMORY = "can't allocate memory"  # torch has no class of its own for it
SAME_COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.999, torch.float16: 0.999}
SAME_SCORE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# Where a product's last digits differ, its rows are rounded to other 8-bit numbers.
SAME_QUANTIZED_COSINE, SAME_QUANTIZED_SCORE = 0.99, 0.05

log = logging.getLogger(__name__)


class States:
    """The model's last hidden states of n texts."""

    def __init__(
        self, states: Tensor, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        """``states`` is (tokens, hidden); text i has rows starts[i] to starts[i] + lengths[i]."""
        self._states = states
        self._starts = starts
        self._lengths = lengths

    def first(self) -> Tensor:
        """(n, hidden) of each text's first token."""
        return self._at(self._starts)

    def last(self) -> Tensor:
        """(n, hidden) of each text's last token."""
        return self._at(self._starts + self._lengths - 1)

    def mean(self) -> Tensor:
        """(n, hidden) float32 means over each text's tokens."""
        owner = np.repeat(np.arange(len(self._lengths)), self._lengths)
        gaps = self._starts - (np.cumsum(self._lengths) - self._lengths)
        rows = np.arange(len(owner)) + gaps[owner]
        weights = np.zeros((len(self._lengths), self._states.shape[0]), np.float32)
        weights[owner, rows] = (1.0 / self._lengths)[owner]
        return torch.from_numpy(weights).to(self._states.device) @ self._states.float()

    def _at(self, rows: NDArray[np.int64]) -> Tensor:
        return self._states[torch.from_numpy(rows).to(self._states.device)]


Head = Callable[[States], Tensor]


def pooled(pooling: str) -> Head:
    """Unit vectors (n, hidden) by "mean", "cls" or "last" token."""

    def head(states: States) -> Tensor:
        if pooling == "mean":
            found = states.mean()
        else:
            found = (states.first() if pooling == "cls" else states.last()).float()
        return normalize(found, dim=-1)

    return head


def yes_or_no(weights: Tensor) -> Head:
    """P(yes) / (P(yes) + P(no)) as (n, 1), by the output weights (2, hidden) of no and yes."""
    difference = (weights[1].float() - weights[0].float()).unsqueeze(1)

    def head(states: States) -> Tensor:
        return torch.sigmoid(states.last().float() @ difference)

    return head


def classified(pooler: nn.Module | None, classifier: nn.Module) -> Head:
    """Relevance (n, 1) by a classification head that reads the first token."""

    def head(states: States) -> Tensor:
        first = states.first().unsqueeze(1)
        return relevance(classifier(first if pooler is None else pooler(first)))

    return head


def relevance(logits: Tensor) -> Tensor:
    """(n, 1) in [0, 1] from (n, 1) or (n, 2) logits."""
    if logits.shape[-1] == 1:
        return torch.sigmoid(logits.float())
    return torch.softmax(logits.float(), -1)[:, -1:]


class TorchModel:
    """Runs steps on one device; used by one thread."""

    def __init__(
        self,
        base: Any,  # a transformers model
        head: Head,
        *,
        width: int,
        max_tokens: int,
        pad_id: int,
        reads_types: bool,
        whole: Any = None,
    ) -> None:
        """``whole``, a classifier with ``base`` in it, is what the padded way runs."""
        self.width = width
        self.packed = False
        self.kernel: Kernel = "fused"
        self.onednn = False
        self.fused: list[str] = []  # see ``torch_fusion``
        self.quantized_cosine: float | None = None  # to the model before its weights were 8-bit
        self.step_tokens = 0
        self.step_texts: int | None = None
        self._base = base
        self._whole = whole
        self._head = head
        self._max_tokens = max_tokens
        self._pad_id = pad_id
        self._reads_types = reads_types
        parameter = next(base.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._threads = torch.get_num_threads()
        self._position_offset = _position_offset(base)

    @property
    def base(self) -> Any:
        """The transformers model that gives the last hidden states."""
        return self._base

    @property
    def outer(self) -> Any:
        """All of the model: ``base``, or the classifier around it."""
        return self._whole if self._whole is not None else self._base

    @property
    def quantized(self) -> bool:
        """Whether its linear layers have 8-bit weights."""
        return self.quantized_cosine is not None

    def make_batcher(self) -> Batcher[Any, Tokens]:
        """See ``Runner``."""
        cost = packed_cost if self.packed else padded_cost
        return Batcher(self.step_tokens, cost, step_texts=self.step_texts)

    def run(self, payloads: Sequence[Tokens]) -> NDArray[np.float32]:
        """(n, width) for texts of rising length."""
        self._use_threads(sum(len(payload.ids) for payload in payloads))
        with torch.inference_mode():
            found = self._run_packed(payloads) if self.packed else self._run_padded(payloads)
            result: NDArray[np.float32] = found.float().cpu().numpy()
        return result

    def free_memory(self, error: Exception) -> bool:
        """See ``Runner``. On a GPU, what torch keeps for later passes is given back."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return True
        return isinstance(error, RuntimeError) and _NO_HOST_MEMORY in str(error)

    def close(self) -> None:
        """Free the model."""
        del self._base, self._whole, self._head

    def _use_threads(self, tokens: int) -> None:
        threads = 1 if tokens <= ONE_THREAD_TOKENS else self._threads
        if self.device.type == "cpu" and threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    # -- two ways through the model -----------------------------------------------------------

    def _run_packed(self, payloads: Sequence[Tokens]) -> Tensor:
        packed = pack([len(p.ids) for p in payloads], self.kernel, self.device, self.dtype)
        row = np.full((3, packed.row_tokens), 0, np.int64)
        row[0, packed.tokens :] = self._pad_id
        np.concatenate([p.ids for p in payloads], out=row[0, : packed.tokens])
        row[1, : packed.tokens] = packed.positions
        row[1] += self._position_offset
        if self._reads_types:
            _write_types(row[2], payloads, packed.starts)
        ids, positions, types = torch.from_numpy(row).to(self.device).unsqueeze(1)
        extra = {"token_type_ids": types} if self._reads_types else {}
        found = self._base(
            input_ids=ids, position_ids=positions, packed=packed, use_cache=False, **extra
        )
        return self._head(States(found.last_hidden_state[0], packed.starts, packed.lengths))

    def _run_padded(self, payloads: Sequence[Tokens]) -> Tensor:
        lengths = np.array([len(p.ids) for p in payloads], np.int64)
        width = min(rounded(int(lengths.max())), self._max_tokens)
        rows = np.zeros((3, len(payloads), width), np.int64)
        rows[0] = self._pad_id
        for place, payload in enumerate(payloads):
            rows[0, place, : len(payload.ids)] = payload.ids
            rows[1, place, : len(payload.ids)] = 1
            if payload.types is not None:
                rows[2, place, : len(payload.ids)] = payload.types
        ids, mask, types = torch.from_numpy(rows).to(self.device)
        extra = {"token_type_ids": types} if self._reads_types else {}
        if self._whole is not None:
            return relevance(self._whole(input_ids=ids, attention_mask=mask, **extra).logits)
        found = self._base(input_ids=ids, attention_mask=mask, **extra).last_hidden_state
        starts = np.arange(len(payloads)) * width
        return self._head(States(found.flatten(0, 1), starts, lengths))

    # -- choosing between them when the model is loaded ---------------------------------------

    def choose_way(self) -> None:
        """Take the fastest way that agrees with the padded one."""
        trial = self._trial()
        expected = self.run(trial)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16 and not self.quantized:
            replaced = Replaced()
            if use_onednn(self.outer, replaced) and self._choose_kernel(trial, expected):
                self.onednn = True
                return
            replaced.undo()
        if not self._choose_kernel(trial, expected):
            log.info("the model runs padded: packed, it does not give the same results")
        elif self.device.type == "cuda":
            self.fuse(trial, expected)

    def fuse(self, trial: list[Tokens], expected: NDArray[np.float32]) -> None:
        """Make kernels fewer and larger where ``trial`` still gives what is expected."""
        from vecfleet.worker.torch_fusion import fuse  # it loads torch's compiler: seconds

        typical = self.trial_step(self._timed_tokens, TIMED_LENGTH)
        self.fused = fuse(
            self._base,
            lambda: self._agrees(self.run(trial), expected),
            lambda: self.time_step(typical, TIMED_TRIALS),
        )

    def _choose_kernel(self, trial: list[Tokens], expected: NDArray[np.float32]) -> bool:
        """Turn packing on with the fastest kernel that agrees; False where none does."""
        before = self._base.config._attn_implementation
        on_cpu = self.device.type == "cpu"
        kernels: list[Kernel] = ["fused", "plain"] if on_cpu else ["fused", "varlen"]
        self.packed = True
        try:
            self._base.set_attn_implementation(ATTENTION_NAME)
            right = [k for k in kernels if self._is_right(k, trial, expected)]
            if right:
                self.kernel = right[0] if len(right) == 1 else self._faster(right)
                return True
        except (UnsupportedModel, ValueError, TypeError, KeyError, RuntimeError) as error:
            log.info("the model does not run packed: %s", error)
        self.packed = False
        self._base.set_attn_implementation(before)
        return False

    def _is_right(self, kernel: Kernel, trial: list[Tokens], expected: NDArray[np.float32]) -> bool:
        try:
            return self._agrees(self._with(kernel, trial), expected)
        except RuntimeError as error:
            if kernel != "varlen":  # only this one is not there for every dtype and device
                raise
            log.info("attention does not run in one kernel: %s", str(error)[:200])
            return False

    def _agrees(self, found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
        if self.width == 1:
            allowed = SAME_QUANTIZED_SCORE if self.quantized else SAME_SCORE[self.dtype]
            return bool(np.abs(found - expected).max() <= allowed)
        least = SAME_QUANTIZED_COSINE if self.quantized else SAME_COSINE[self.dtype]
        return bool((found * expected).sum(1).min() >= least)

    def _with(self, kernel: Kernel, payloads: list[Tokens]) -> NDArray[np.float32]:
        self.kernel = kernel
        return self.run(payloads)

    def _faster(self, kernels: list[Kernel]) -> Kernel:
        """The faster kernel. They take turns, as other processes may disturb any of them."""
        typical = self.trial_step(self._timed_tokens, TIMED_LENGTH)
        took: dict[Kernel, list[float]] = {kernel: [] for kernel in kernels}
        for _ in range(TIMED_TRIALS):
            for kernel in kernels:
                began = self._clock()
                self._with(kernel, typical)
                took[kernel].append(self._clock() - began)
        return min(kernels, key=lambda kernel: sum(sorted(took[kernel])[: TIMED_TRIALS // 2]))

    def time_step(self, payloads: list[Tokens], times: int) -> float:
        """Seconds of the fastest of ``times`` runs, after one that warms up."""
        self.run(payloads)
        took = []
        for _ in range(times):
            began = self._clock()
            self.run(payloads)
            took.append(self._clock() - began)
        return min(took)

    @property
    def _timed_tokens(self) -> int:
        return TIMED_TOKENS if self.device.type == "cpu" else GPU_TIMED_TOKENS

    def _clock(self) -> float:
        """Seconds of work, also on a machine whose cores are busy with other processes."""
        if self.device.type == "cpu":
            return time.process_time() / self._threads
        return time.perf_counter()

    def trial_step(self, tokens: int, length: int) -> list[Tokens]:
        """Texts of ``length`` random tokens that come to about ``tokens``."""
        length = min(length, self._max_tokens)
        return [self._random_text(length, seed) for seed in range(max(1, tokens // length))]

    def _trial(self) -> list[Tokens]:
        lengths = sorted(min(length, self._max_tokens) for length in TRIAL_LENGTHS)
        return [self._random_text(length, seed) for seed, length in enumerate(lengths)]

    def _random_text(self, length: int, seed: int) -> Tokens:
        vocabulary = int(self._base.config.vocab_size)
        ids = np.random.default_rng(seed).integers(vocabulary // 8, vocabulary, length, np.int32)
        ids[ids == self._pad_id] += 1
        return Tokens(np.minimum(ids, vocabulary - 1))


def _write_types(
    row: NDArray[np.int64], payloads: Sequence[Tokens], starts: NDArray[np.int64]
) -> None:
    for payload, start in zip(payloads, starts.tolist(), strict=True):
        if payload.types is not None:
            row[start : start + len(payload.types)] = payload.types


def _position_offset(base: nn.Module) -> int:
    """The position of a text's first token: RoBERTa and its kin count from the padding's id on."""
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
