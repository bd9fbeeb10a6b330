"""Which workers a machine gets: a model, the GPUs it runs on, and its share of their memory.

Pure: GPUs and the sizes of weights come in as data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vecfleet.common.errors import ConfigError
from vecfleet.worker.machine import Gpu

MAX_SHARE = 0.9  # of a GPU's memory, for all of its workers together
FIT_MARGIN = 1.2  # of weights: what an engine needs beside them at least
SPARE_BYTES = 512 << 20  # a worker's driver context, which no engine counts as its own

Group = tuple[Gpu, ...]  # the GPUs that hold one model together; none: the CPU


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model, and how large its weights are."""

    name: str
    weight_bytes: int | None = None  # None: unknown


@dataclass(frozen=True, slots=True)
class PlannedWorker:
    """One process."""

    name: str
    model: str
    gpus: Group = ()
    memory_share: float | None = None  # of each GPU; None: the engine's own choice

    @property
    def place(self) -> str:
        """Where it runs, in words."""
        return "GPU " + "+".join(str(gpu.index) for gpu in self.gpus) if self.gpus else "CPU"


def choose_gpus(asked: str, present: Sequence[Gpu]) -> Group:
    """The GPUs that ``asked`` means: "all", or their numbers or UUIDs with commas between.

    Raises ``ConfigError`` that names what is not here.
    """
    if asked.strip() == "all":
        return tuple(present)
    chosen: list[Gpu] = []
    for name in (part.strip() for part in asked.split(",")):
        gpu = next((g for g in present if name and name in (str(g.index), g.uuid)), None)
        if gpu is None:
            here = ", ".join(str(g.index) for g in present) or "none"
            raise ConfigError(f"there is no GPU {name!r} here; GPUs that can be used: {here}")
        if gpu in chosen:
            raise ConfigError(f"GPU {name} is named twice")
        chosen.append(gpu)
    return tuple(chosen)


def group_gpus(gpus: Sequence[Gpu], size: int) -> list[Group]:
    """The GPUs ``size`` at a time, in their order; without any, one group that is the CPU.

    Raises ``ConfigError`` where they do not come out even.
    """
    if not gpus:
        if size > 1:
            raise ConfigError(f"a model over {size} GPUs needs GPUs, and none is here")
        return [()]
    if len(gpus) % size:
        raise ConfigError(
            f"{len(gpus)} GPUs cannot be shared out {size} at a time; choose a multiple of "
            f"{size} with --gpus, or another --tensor-parallel-size"
        )
    return [tuple(gpus[at : at + size]) for at in range(0, len(gpus), size)]


def gpus_a_model(models: Sequence[PlannedModel], gpus: Sequence[Gpu]) -> int:
    """The fewest GPUs, of a number that comes out even, that hold all ``models`` together."""
    needed = FIT_MARGIN * sum(model.weight_bytes or 0 for model in models)
    sizes = [size for size in (1, 2, 4, 8) if size <= len(gpus) and len(gpus) % size == 0]
    for size in sizes:
        if needed <= size * MAX_SHARE * min(gpu.total_bytes for gpu in gpus):
            return size
    return sizes[-1] if sizes else 1


def plan_pool(
    models: Sequence[PlannedModel],
    groups: Sequence[Group],
    replicas: int = 1,
    share: float | None = None,
) -> list[PlannedWorker]:
    """Each model ``replicas`` times on each group; ``share`` is what the user said of memory."""
    placed = [(model, group) for group in groups for _ in range(replicas) for model in models]
    names = ["worker"] if len(placed) == 1 else [f"worker-{n}" for n in range(len(placed))]
    return plan_workers([(n, *p) for n, p in zip(names, placed, strict=True)], share)


def plan_workers(
    placed: Sequence[tuple[str, PlannedModel, Group]], share: float | None = None
) -> list[PlannedWorker]:
    """Workers by name, model and group, with their shares of memory."""
    plans = []
    for name, model, group in placed:
        beside = [other for _, other, where in placed if where == group]
        own = share if share is not None or not group else share_of(model, beside, group)
        plans.append(PlannedWorker(name, model.name, group, own))
    return plans


def share_of(model: PlannedModel, beside: Sequence[PlannedModel], group: Group) -> float | None:
    """The share of each GPU's memory for one of the models ``beside`` each other on ``group``.

    Each gets room for its weights, and what is left is shared out equally: what a step needs
    depends on its tokens more than on the weights. A model whose size is unknown counts as large as
    the others are on average. The sum is at most ``MAX_SHARE``, and what is free now. None for a
    worker that is alone: its engine takes what is free. Raises ``ConfigError`` where the weights do
    not fit.
    """
    if len(beside) == 1:
        return None
    room = min(
        min(MAX_SHARE, (gpu.free_bytes - len(beside) * SPARE_BYTES) / gpu.total_bytes)
        for gpu in group
    )
    if room <= 0:
        raise ConfigError(
            f"{len(beside)} workers have no memory on GPU {group[0].index}: "
            f"{min(gpu.free_bytes for gpu in group) / 2**30:.1f} GiB are free"
        )
    known = [m.weight_bytes for m in beside if m.weight_bytes is not None]
    average = sum(known) / len(known) if known else 0.0
    whole = len(group) * min(gpu.total_bytes for gpu in group)

    def need(one: PlannedModel) -> float:
        weights = average if one.weight_bytes is None else one.weight_bytes
        return FIT_MARGIN * weights / whole

    total = sum(need(one) for one in beside)
    if total > room:
        raise ConfigError(
            f"{', '.join(one.name for one in beside)} need {total * whole / 2**30:.1f} GiB "
            f"together, and {room * whole / 2**30:.1f} GiB of GPU "
            f"{'+'.join(str(gpu.index) for gpu in group)} can be had; take fewer of them on a GPU, "
            "more GPUs, or smaller models"
        )
    own = need(model) + (room - total) / len(beside)
    return max(1, math.floor(own * 1000)) / 1000
