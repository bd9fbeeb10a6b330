"""What runs of the harness came to, and whether that is what was promised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from chaos.verdict import Verdict

RECOVERY_S = 15.0  # the target, for 99 of 100 deaths
LEAST_RECOVERIES = 50  # isolated kills; of fewer nothing is concluded


@dataclass(slots=True)
class Outcome:
    """Figures of one run, or of several that were summed."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)  # how calls that wait ended
    acknowledged: int = 0
    documents: int = 0
    dead: int = 0
    worn: int = 0
    forgotten: int = 0
    lost: int = 0
    doubled: int = 0
    stuck: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    full_windows: list[tuple[int, float]] = field(default_factory=list)  # claims, seconds
    failures: list[str] = field(default_factory=list)  # what is wrong, in words
    seconds: float = 0.0
    disk_kind: str = ""  # how a full disk was brought about

    @property
    def is_kept(self) -> bool:
        """Whether the promise was kept, in time where there are enough deaths to say so."""
        return not (self.lost or self.doubled or self.stuck or self.failures or self.is_late)

    @property
    def is_late(self) -> bool:
        """Whether the recovery's target is missed."""
        p99 = quantile(self.recoveries_s, 0.99)
        return p99 is not None and len(self.recoveries_s) >= LEAST_RECOVERIES and p99 > RECOVERY_S

    def add(self, other: Outcome) -> None:
        """Add another run's."""
        for name in ("kills", "faults", "fired", "asked"):
            getattr(self, name).update(getattr(other, name))
        for name in (
            *("acknowledged", "documents", "dead", "worn", "forgotten"),
            *("lost", "doubled", "stuck", "seconds"),
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.recoveries_s += other.recoveries_s
        self.full_windows += other.full_windows
        self.failures += other.failures

    def take(self, verdict: Verdict) -> None:
        """Add a verdict. Where nothing was acknowledged, nothing was shown: that is a failure."""
        self.acknowledged += verdict.acknowledged
        self.documents += verdict.documents
        self.dead += verdict.dead
        self.worn += verdict.worn
        self.forgotten += verdict.forgotten
        self.lost += len(verdict.lost)
        self.doubled += len(verdict.doubled)
        self.stuck += len(verdict.stuck)
        if not verdict.is_kept:
            self.failures.append(str(verdict))
        if not verdict.acknowledged:
            self.failures.append("nothing was acknowledged")

    def to_json(self) -> dict[str, Any]:
        """The line at the end of ``make chaos``."""
        return {
            "kills": sum(self.kills.values()),
            "faults": sum(self.faults.values()),
            "acknowledged": self.acknowledged,
            "lost": self.lost,
            "doubled": self.doubled,
            "stuck": self.stuck,
            "recovery_p50_s": quantile(self.recoveries_s, 0.50),
            "recovery_p99_s": quantile(self.recoveries_s, 0.99),
        }

    def __str__(self) -> str:
        said = (
            f"{sum(self.kills.values())} kills, {sum(self.faults.values())} faults, "
            f"{self.acknowledged} acknowledged, {self.documents} documents, "
            f"{self.dead} in the dead letter, lost {self.lost}, doubled {self.doubled}, "
            f"stuck {self.stuck}, {self.seconds:.0f} s"
        )
        if self.worn:
            said += f"; {self.worn} buried because three of their workers died, as promised"
        if self.forgotten:
            said += f", {self.forgotten} of them in the index too, which Redis had forgotten"
        return said + (f"; full disk: {self.disk_kind}" if self.disk_kind else "")


def quantile(values: list[float], share: float) -> float | None:
    """The value that ``share`` of all do not exceed; None where there is none."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
