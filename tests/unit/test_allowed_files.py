"""How many files a process asks for where the system has a bound that it does not tell."""

from __future__ import annotations

import resource

import pytest

from vecfleet.common.open_files import allow_files

ANY = resource.RLIM_INFINITY
FEW = 256


class System:
    """Allows so many files, whatever its hard limit says."""

    def __init__(self, hard: int, most: int, soft: int = FEW) -> None:
        self.limits = (soft, hard)
        self._most = most

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.limits

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        soft, hard = limits
        assert hard == self.limits[1], "the hard limit stays"
        if soft == ANY or soft > self._most:
            raise ValueError("current limit exceeds maximum limit")
        self.limits = limits


@pytest.mark.parametrize(
    ("wanted", "hard", "most", "allowed"),
    [
        (None, ANY, 10_240, 10_240),  # macOS
        (16_000, ANY, 10_240, 10_240),
        (5_000, ANY, 10_240, 5_000),
        (None, ANY, 70_000, 65_536),
        (None, ANY, 300, FEW),
        (None, 4096, 4096, 4096),
        (None, 4096, 1500, 1024),
        (20_000, 4096, 4096, 4096),
        (100, ANY, 10_240, FEW),
    ],
)
def test_as_many_as_the_system_will(
    monkeypatch: pytest.MonkeyPatch, wanted: int | None, hard: int, most: int, allowed: int
) -> None:
    system = System(hard, most)
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    assert allow_files(wanted) == allowed
    assert system.limits == (allowed, hard)


def test_any_number_is_told_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", System(ANY, ANY, soft=ANY).getrlimit)
    assert allow_files() is None
