"""Who runs where, and with how much of a GPU's memory: planned from data alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings
from vecfleet.fleet.pool import PoolOptions, plan, worker_specs
from vecfleet.fleet.worker_plan import (
    FIT_MARGIN,
    MAX_SHARE,
    SPARE_BYTES,
    PlannedModel,
    PlannedWorker,
    choose_gpus,
    gpus_a_model,
    group_gpus,
    plan_pool,
    plan_workers,
)
from vecfleet.worker.machine import Gpu

GIB = 1 << 30
SMALL, LARGE = PlannedModel("small", 1 * GIB), PlannedModel("large", 15 * GIB)


def gpu(index: int, total: int = 80, free: float = 79.5) -> Gpu:
    return Gpu(index, f"GPU-{index:04}", "a card", total * GIB, int(free * GIB), (9, 0))


def gpus(count: int, **options: Any) -> list[Gpu]:
    return [gpu(index, **options) for index in range(count)]


def options(*models: str, device: str = "auto", engine: str = "fake", **given: Any) -> PoolOptions:
    names = ("gpus", "replicas", "served_name")
    pool = {name: given.pop(name) for name in names if name in given}
    return PoolOptions(Settings.checked({"device": device, "engine": engine, **given}), models,
                       **pool)  # fmt: skip


# Which GPUs


def test_all_or_some_by_number_or_uuid() -> None:
    here = gpus(4)
    assert choose_gpus("all", here) == tuple(here)
    assert choose_gpus("2, 0", here) == (here[2], here[0])
    assert choose_gpus("GPU-0003,1", here) == (here[3], here[1])
    assert choose_gpus("all", []) == ()


@pytest.mark.parametrize("asked", ["0,1", "7", "", "0,", "x", "-1"])
def test_what_is_not_here_is_named(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"GPUs that can be used: 0$"):
        choose_gpus(asked, gpus(1))


def test_a_gpu_that_is_asked_for_where_there_is_none_is_no_reason_to_take_the_cpu() -> None:
    with pytest.raises(ConfigError, match="can be used: none"):
        plan(options("m", gpus="0,1"), present=[])


def test_a_gpu_is_named_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        choose_gpus("1,GPU-0001", gpus(2))


def test_groups_of_several_gpus() -> None:
    here = gpus(4)
    assert group_gpus(here, 1) == [(one,) for one in here]
    assert group_gpus(here, 2) == [(here[0], here[1]), (here[2], here[3])]
    assert group_gpus([], 1) == [()]
    for count, size in ((4, 3), (1, 2), (2, 4)):
        with pytest.raises(ConfigError, match=f"{count} GPUs cannot be shared out {size} at"):
            group_gpus(gpus(count), size)
    with pytest.raises(ConfigError, match="none is here"):
        group_gpus([], 2)


# Which workers


def test_one_process_for_each_gpu_model_and_replica() -> None:
    workers = plan_pool([SMALL, LARGE], group_gpus(gpus(3), 1), replicas=2)
    assert len(workers) == 12
    assert len({worker.name for worker in workers}) == 12
    for index in range(3):
        on_it = [w.model for w in workers if w.place == f"GPU {index}"]
        assert sorted(on_it) == ["large", "large", "small", "small"]


def test_without_a_gpu_a_process_for_each_model_and_replica_on_the_cpu() -> None:
    assert plan(options("a"), present=[]) == [PlannedWorker("worker", "a")]
    workers = plan(options("a", "b", replicas=2), present=[])
    assert [worker.model for worker in workers] == ["a", "b", "a", "b"]
    assert {(worker.place, worker.memory_share) for worker in workers} == {("CPU", None)}


def test_a_model_over_several_gpus_is_one_process() -> None:
    workers = plan(options("m", tensor_parallel_size=2), present=gpus(4))
    assert [worker.place for worker in workers] == ["GPU 0+1", "GPU 2+3"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"device": "cuda:1"}, "leave --device out"),
        ({"served_name": "n", "models": ("a", "b")}, "--served-name"),
        ({"models": ("a", "a")}, "--replicas-per-gpu"),
    ],
)
def test_what_contradicts_itself_is_refused(asked: dict[str, Any], why: str) -> None:
    models = asked.pop("models", ("a",))
    with pytest.raises(ConfigError, match=why):
        plan(options(*models, **asked), present=gpus(2))


def test_a_model_that_is_not_there_is_named_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="no-such"):
        plan(options("package:no-such", engine="torch"), present=gpus(1))


# Shares of memory


def test_a_worker_that_is_alone_takes_what_its_engine_finds() -> None:
    assert [w.memory_share for w in plan_pool([LARGE], group_gpus(gpus(2), 1))] == [None, None]


def test_each_has_room_for_its_weights_and_an_equal_part_of_the_rest() -> None:
    small, large = plan_pool([SMALL, LARGE], group_gpus(gpus(1), 1))
    assert small.memory_share is not None
    assert large.memory_share is not None
    rest = (MAX_SHARE * 80 - 16 * FIT_MARGIN) / 2
    assert small.memory_share * 80 == pytest.approx(1 * FIT_MARGIN + rest, abs=0.1)
    assert large.memory_share * 80 == pytest.approx(15 * FIT_MARGIN + rest, abs=0.1)


def test_where_it_is_tight_it_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"small, large need 19\.2 GiB together.* GPU 0 can"):
        plan_pool([SMALL, LARGE], [(gpu(0, total=16, free=14),)])


def test_sizes_that_are_unknown_count_as_the_others() -> None:
    unknown = PlannedModel("unknown")
    one, other = plan_pool([unknown, LARGE], group_gpus(gpus(1), 1))
    assert one.memory_share == other.memory_share
    one, other = plan_pool([unknown, PlannedModel("too")], group_gpus(gpus(1), 1))
    assert one.memory_share == other.memory_share == pytest.approx(0.45, abs=0.001)


def test_what_others_hold_is_left_to_them() -> None:
    workers = plan_pool([LARGE], [(gpu(0, free=41),)], replicas=2)
    assert 40 - 0.2 <= sum(w.memory_share or 0 for w in workers) * 80 <= 41 - 2 * SPARE_BYTES / GIB
    with pytest.raises(ConfigError, match=r"0\.5 GiB are free"):
        plan_pool([LARGE], [(gpu(0, free=0.5),)], replicas=2)


def test_the_fullest_gpu_of_a_group_sets_the_share() -> None:
    group = (gpu(0, free=79), gpu(1, free=20))
    workers = plan_pool([SMALL], [group], replicas=2)
    assert sum(w.memory_share or 0 for w in workers) <= 20 / 80


def test_what_the_user_says_is_done() -> None:
    workers = plan_pool([SMALL, LARGE], group_gpus(gpus(1), 1), share=0.7)
    assert [worker.memory_share for worker in workers] == [0.7, 0.7]


def test_a_reranker_on_one_gpu_leaves_the_others_alone() -> None:
    groups = group_gpus(gpus(2), 1)
    workers = plan_workers(
        [("worker-0", LARGE, groups[0]), ("worker-1", LARGE, groups[1]), ("r", SMALL, groups[0])]
    )
    shares = {worker.name: worker.memory_share for worker in workers}
    assert shares["worker-1"] is None
    assert shares["worker-0"] is not None
    assert shares["worker-0"] + (shares["r"] or 0) <= MAX_SHARE


@tries(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.none() | st.integers(1, 40 * GIB), min_size=2, max_size=6),
    total=st.integers(8, 192),
    used=st.floats(0, 0.8),
    size=st.sampled_from([1, 2, 4]),
    replicas=st.integers(1, 3),
)
def test_shares_never_come_to_more_than_there_is(
    sizes: list[int | None], total: int, used: float, size: int, replicas: int
) -> None:
    models = [PlannedModel(str(n), bytes_) for n, bytes_ in enumerate(sizes)]
    here = [gpu(n, total, total * (1 - used)) for n in range(size)]
    try:
        workers = plan_pool(models, group_gpus(here, size), replicas)
    except ConfigError as error:
        known = [bytes_ for bytes_ in sizes if bytes_ is not None]
        average = sum(known) / len(known) if known else 0
        needed = replicas * FIT_MARGIN * sum(average if b is None else b for b in sizes)
        spare = len(sizes) * replicas * SPARE_BYTES
        room = min(MAX_SHARE * here[0].total_bytes, here[0].free_bytes - spare)
        assert needed > room * size * 0.999 or room <= 0, error
        return
    shares = [worker.memory_share or 0.0 for worker in workers]
    assert all(0 < share <= MAX_SHARE for share in shares)
    for share, bytes_ in zip(shares, sizes * replicas, strict=True):
        assert share * size * here[0].total_bytes >= (bytes_ or 0)  # the weights fit
    least = 0.001 * len(shares)  # what a model that is tiny beside the others gets anyway
    assert sum(shares) <= min(MAX_SHARE, here[0].free_bytes / here[0].total_bytes) + least


# How they are run


def command(spec: Any) -> str:
    return " ".join(spec.command)


def specs(pool: PoolOptions, present: list[Gpu], **names: str) -> list[Any]:
    return worker_specs(
        plan(pool, present), pool.settings, "redis://r", niceness=7, served_names=names
    )


def test_a_child_sees_its_own_gpus_and_is_told_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    one, _, three, _ = specs(options("a", "b"), gpus(2), a="known")
    assert one.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0000"
    assert three.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0001"
    assert one.environment["VECFLEET_REDIS_URL"] == "redis://r"
    assert "redis://r" not in command(one)
    for part in ("worker --model a --niceness 7 --served-name known", "--engine fake",
                 "--device cuda", "--gpu-memory-utilization 0.45"):  # fmt: skip
        assert part in command(one)
    assert "--served-name" not in command(specs(options("a"), gpus(1))[0])


def test_when_it_pauses_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECFLEET_MAX_MEMORY_PERCENT", "70")
    (one,) = specs(options("a", max_cpu_percent=100), [])
    assert one.environment["VECFLEET_MAX_CPU_PERCENT"] == "100.0"
    assert one.environment["VECFLEET_MAX_MEMORY_PERCENT"] == "70"


def test_a_group_is_seen_together() -> None:
    (one,) = specs(options("m", tensor_parallel_size=2), gpus(2))
    assert one.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0000,GPU-0001"
    assert "--tensor-parallel-size 2" in command(one)


def test_those_of_one_gpu_take_turns_and_others_do_not_wait() -> None:
    made = specs(options("a", "b"), gpus(2))
    assert isinstance(made[0].turn, asyncio.Lock)
    assert made[0].turn is made[1].turn
    assert made[2].turn is made[3].turn
    assert made[0].turn is not made[2].turn
    assert [spec.turn for spec in specs(options("a", "b"), [])] == [None, None]


def test_on_the_cpu_the_engine_looks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (one,) = specs(options("a"), [])
    assert "CUDA_VISIBLE_DEVICES" not in one.environment
    assert "--device" not in command(one)


def test_a_model_takes_as_many_gpus_as_hold_it() -> None:
    eighty = [Gpu(n, f"GPU-{n}", "H", 80 * GIB, 79 * GIB, (9, 0)) for n in range(4)]
    small, large, huge = (PlannedModel(str(size), size * GIB) for size in (2, 100, 900))
    assert gpus_a_model([small], eighty) == 1
    assert gpus_a_model([large], eighty) == 2
    assert gpus_a_model([large, large], eighty) == 4
    assert gpus_a_model([large], eighty[:3]) == 1  # three do not come out even by two
    assert gpus_a_model([huge], eighty) == 4  # its engine says that it does not fit
    assert gpus_a_model([PlannedModel("unknown")], eighty) == 1
