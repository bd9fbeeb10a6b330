"""What the project promises to show, and whether a measured value keeps the promise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the table."""

    key: str
    what: str
    target: float
    better: Literal["more", "less"]

    def is_met_by(self, value: float) -> bool:
        """Whether ``value`` is on the right side of the target."""
        return value >= self.target if self.better == "more" else value <= self.target


@dataclass(frozen=True, slots=True)
class Measured:
    """A value and how it came about."""

    value: float
    detail: dict[str, Any] = field(default_factory=dict)
    also: bool = True  # a second condition of the promise, told in ``detail``


TARGETS = (
    Target("fleet_efficiency", "producer to committed index ÷ bare engine", 0.95, "more"),
    Target("http_efficiency", "POST /v1/embeddings ÷ bare engine", 0.90, "more"),
    Target("null_engine_docs_per_s", "pipeline with an engine that costs nothing", 50_000, "more"),
    Target("http_overhead_p50_ms", "one query at a time: wall - inference time", 4, "less"),
    Target("engine_vs_plain", "engine ÷ plain transformers, bf16, sorted", 1.15, "more"),
    Target("single_requests_per_s", "single queries, 32 at once", 500, "more"),
    Target("interactive_p99_steps", "(query p99 under bulk - 10 ms) ÷ bulk step p50", 2, "less"),
    Target("bulk_share_under_interactive", "bulk's tokens while queries saturate", 0.1, "more"),
    Target("vllm_fleet_efficiency", "the same with vLLM's CPU build ÷ that alone", 0.95, "more"),
    Target("vllm_interactive_ratio", "query p50 under bulk ÷ bulk step p50, vLLM", 2, "less"),
    Target("engine_agreement", "least cosine, vLLM against transformers fp32", 0.999, "more"),
    Target("ivf_recall_at_10", "against exact search, 200k documents", 0.98, "more"),
    Target("search_p99_ratio", "search p99 while ingesting and compacting ÷ idle", 3, "less"),
    Target("anon_memory_growth", "anonymous memory, 100k to 1M documents", 0.05, "less"),
    Target("ingest_flatness", "docs/s, last ÷ first tenth of 1M documents", 0.8, "more"),
)

BY_KEY = {target.key: target for target in TARGETS}
