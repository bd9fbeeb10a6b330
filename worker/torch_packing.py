"""Attention over texts that lie one after the other without padding.

Nine tenths of a forward pass are matrix products in which every token stands for itself.  There
padding is pure loss, so a step's texts form one row of tokens.  Only attention needs to know where
each text begins: it runs over groups of texts of about one length, gathered from that row, or on a
GPU in one kernel that is told where texts end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from vecfleet.worker.batching import rounded

ATTENTION_NAME = "vecfleet_packed"
MERGE_SLOTS = 48  # padding that costs less than one more group
MAX_PLAIN_LENGTH = 1024  # longer texts would need too much memory for their scores

Kernel = Literal["plain", "fused", "varlen"]


class UnsupportedModel(Exception):
    """The model asks of attention what is not done here; it runs padded instead."""


@dataclass(slots=True)
class Group:
    """Consecutive texts of one rounded length."""

    start: int  # their tokens in the row
    stop: int
    texts: int
    width: int  # tokens of each, padding included
    gather: Tensor | None = None  # (texts * width,) tokens of the row; None: none is padding
    scatter: Tensor | None = None  # (stop - start,) places of the row's tokens in what was gathered
    bias: Tensor | None = None  # (texts, 1, 1, width), -inf for padding


@dataclass(slots=True)
class Packed:
    """The texts of one step as one row of tokens."""

    kernel: Kernel
    starts: NDArray[np.int64]  # (n,)
    lengths: NDArray[np.int64]  # (n,) rising
    positions: NDArray[np.int64]  # (tokens,) of each token in its text
    tokens: int  # of texts; what follows fills the row up
    row_tokens: int
    groups: list[Group]  # of the kernels "plain" and "fused"
    ends: Tensor | None = None  # of "varlen": int32, 0 and where each text ends, the filling too
    longest: int = 0  # tokens


def row_length(tokens: int) -> int:
    """Tokens of a step's row: few distinct lengths, as oneDNN builds a kernel for each."""
    multiple = 16 if tokens <= 256 else 32
    return -(-tokens // multiple) * multiple


def pack(
    lengths: Sequence[int], kernel: Kernel, device: torch.device, dtype: torch.dtype
) -> Packed:
    """Lay out texts of these rising lengths."""
    sizes = np.array(lengths, np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    tokens = int(ends[-1])
    packed = Packed(
        kernel=kernel,
        starts=starts,
        lengths=sizes,
        positions=np.arange(tokens) - np.repeat(starts, sizes),
        tokens=tokens,
        row_tokens=row_length(tokens),
        groups=[],
    )
    if kernel == "varlen":
        filling = [packed.row_tokens] if packed.row_tokens > tokens else []
        marks = np.concatenate([[0], ends, filling]).astype(np.int32)
        packed.ends = torch.from_numpy(marks).to(device)
        packed.longest = int(np.diff(marks).max())
        return packed
    first = 0
    for last in _group_ends(lengths):
        packed.groups.append(_make_group(starts[first:last], sizes[first:last], device, dtype))
        first = last
    return packed


def _group_ends(lengths: Sequence[int]) -> list[int]:
    """Where each group ends. A group joins the next one where that costs little padding."""
    ends: list[int] = []
    begin = 0
    for place in range(1, len(lengths) + 1):
        width = rounded(lengths[place - 1])
        if place < len(lengths):
            if rounded(lengths[place]) == width:
                continue
            if (place - begin) * (rounded(lengths[place]) - rounded(lengths[begin])) <= MERGE_SLOTS:
                continue
        ends.append(place)
        begin = place
    return ends


def _make_group(
    starts: NDArray[np.int64], sizes: NDArray[np.int64], device: torch.device, dtype: torch.dtype
) -> Group:
    start, stop = int(starts[0]), int(starts[-1] + sizes[-1])
    texts, longest = len(sizes), int(sizes[-1])
    width = longest if texts == 1 else rounded(longest)
    group = Group(start, stop, texts, width)
    if texts * width == stop - start:
        return group
    columns = np.arange(width)
    real = columns < sizes[:, None]
    gather = starts[:, None] + np.minimum(columns, sizes[:, None] - 1)
    bias = np.where(real, np.float32(0), np.float32("-inf"))
    group.gather = torch.from_numpy(gather.reshape(-1)).to(device)
    group.scatter = torch.from_numpy(np.flatnonzero(real)).to(device)
    group.bias = torch.from_numpy(bias).to(device, dtype)[:, None, None, :]
    return group


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: Packed | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention of transformers' interface: (1, heads, tokens, d) to (1, tokens, heads, d)."""
    if packed is None or attention_mask is not None or sliding_window or softcap:
        raise UnsupportedModel("attention with a mask, a window or a cap")
    if others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise UnsupportedModel("attention with sinks or a bias")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = bool(getattr(module, "is_causal", False))
    # (tokens, heads, d): for most models a view of memory in this order.
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if packed.ends is not None:
        found = varlen_attention(q, k, v, packed.ends, packed.longest, scale, causal)
        return found.unsqueeze(0), None
    out = q.new_empty((packed.row_tokens, q.shape[1], v.shape[2]))
    for group in packed.groups:
        rows, keys, values = (_rows(x, group, q.shape[1]) for x in (q, k, v))
        run = _plain if packed.kernel == "plain" and group.width <= MAX_PLAIN_LENGTH else _fused
        found = run(rows, keys, values, group.bias, scale, causal)
        flat = found.transpose(1, 2).reshape(group.texts * group.width, *out.shape[1:])
        if group.scatter is None:
            out[group.start : group.stop] = flat
        else:
            torch.index_select(flat, 0, group.scatter, out=out[group.start : group.stop])
    out[packed.tokens :].zero_()
    return out.unsqueeze(0), None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, causal: bool
) -> Tensor:
    """(tokens, heads, d) of texts that end at ``ends[1:]``; heads may share keys.

    The operator is private to torch, so a model takes it only where it agrees when it is loaded.
    """
    found: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, 0.0, causal, False, scale=scale
    )[0]
    return found


def _rows(states: Tensor, group: Group, heads: int) -> Tensor:
    """(texts, heads, width, d) of a group; keys that several heads share are repeated."""
    if group.gather is None:
        rows = states[group.start : group.stop]
    else:
        rows = states.index_select(0, group.gather)
    rows = rows.view(group.texts, group.width, *rows.shape[1:]).transpose(1, 2)
    shared = heads // rows.shape[1]
    return rows if shared == 1 else rows.repeat_interleave(shared, dim=1)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> Tensor:
    # Padding follows a text, where a causal query does not look: it needs no bias.
    if causal:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    mask = None if bias is None else bias.expand(-1, 1, q.shape[2], -1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Three steps instead of one kernel: faster on CPUs without AMX, whose kernel is slow."""
    texts, heads, width, _ = q.shape
    q, k, v = (x.reshape(texts * heads, width, -1) for x in (q, k, v))
    if causal:
        bias = q.new_full((width, width), float("-inf")).triu(1).unsqueeze(0)
    elif bias is not None:
        bias = bias.expand(texts, heads, 1, width).reshape(texts * heads, 1, width)
    if bias is None:
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    else:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, -1), v).view(texts, heads, width, -1)


AttentionInterface.register(ATTENTION_NAME, attend)
