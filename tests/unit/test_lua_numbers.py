"""Numbers that several scripts have, each for itself, are the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vecfleet.common import keys
from vecfleet.common.admission import JOB_BYTES

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    path.stem: path.read_text() for f in ("common", "worker") for path in (ROOT / f).glob("*.lua")
}


def number(script: str, name: str) -> int:
    names, values = re.findall(
        rf"^local ([\w, ]*\b{name}\b[\w, ]*) = ([\d, ]+)", SCRIPTS[script], re.M
    )[0]
    return int(dict(zip(names.split(", "), values.split(", "), strict=True))[name])


@pytest.mark.parametrize("script", ["enqueue", "cancel", "dead_letter", "ledger"])
def test_a_job_costs_the_same_wherever_it_is_counted(script: str) -> None:
    assert number(script, "JOB_BYTES") == JOB_BYTES


@pytest.mark.parametrize("name", ["DAY_S", "HOUR_S", "MINUTES_S", "MANY", "VERY_MANY"])
def test_a_submission_lives_as_long_whoever_ends_it(name: str) -> None:
    assert number("submission", name) == number("ledger", name)


def test_a_box_lives_as_long_whoever_shows_it() -> None:
    assert number("enqueue", "ALIVE_S") == keys.ALIVE_TTL_S
