"""How a producer submits."""

from __future__ import annotations

from dataclasses import dataclass

from vecfleet.common.errors import ConfigError

DEFAULT_PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Limits of one submission; what is in flight is also what it holds in memory."""

    truncate: bool = True  # cut texts that are longer than the model reads, instead of refusing
    only_changed: bool = True  # leave out documents that stand in the collection already
    patience_s: float = DEFAULT_PATIENCE_S  # with a full queue, or a Redis that is away
    max_blocks: int = 512  # sent and not settled
    max_bytes: int = 96 << 20

    def __post_init__(self) -> None:
        if self.patience_s < 0 or self.max_blocks < 1 or self.max_bytes < 1:
            raise ConfigError("patience, blocks and bytes in flight must be positive")
