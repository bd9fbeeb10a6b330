"""``vecfleet compare``: two models, or two ways to run one, over the same texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings
from vecfleet.fleet.agreement import (
    ScoreAgreement,
    VectorAgreement,
    compare_scores,
    compare_vectors,
)
from vecfleet.fleet.client_options import json_option, print_json
from vecfleet.fleet.compare_view import show_comparison
from vecfleet.fleet.engine_options import ENGINE_FIELDS, engine_settings
from vecfleet.fleet.engine_probe import Figures, ProbeTask, probe
from vecfleet.fleet.sample import pairs_of, queries_of, sample_texts

FIELDS = ("model", *ENGINE_FIELDS)
Task = Literal["embed", "rerank"]
# Documents and queries where no number is given; a reranker computes every pair of them.
DOCUMENTS: dict[Task, int] = {"embed": 512, "rerank": 64}
QUERIES: dict[Task, int] = {"embed": 64, "rerank": 8}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two engines and how far they agree."""

    task: Task
    documents: int
    queries: int
    a: Figures
    b: Figures
    agreement: VectorAgreement | ScoreAgreement

    def to_wire(self) -> dict[str, Any]:
        """All of it as plain data."""
        sides = {
            name: {
                **asdict(figures),
                "items_per_s": figures.items_per_s,
                "tokens_per_s": figures.tokens_per_s,
            }
            for name, figures in (("a", self.a), ("b", self.b))
        }
        return {
            "task": self.task,
            "documents": self.documents,
            "queries": self.queries,
            **sides,
            "agreement": asdict(self.agreement),
            "verdict": self.agreement.verdict,
        }


def parse_side(text: str, usual: Settings) -> Settings:
    """``usual`` with what ``key=value,key=value`` says; raises ``ConfigError`` for a bad one."""
    given: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        key = name.strip().replace("-", "_")
        if not equals or key not in FIELDS:
            raise ConfigError(f"{part!r} is no setting to compare; those are {', '.join(FIELDS)}")
        given[key] = value.strip()
    return Settings.checked({**usual.model_dump(), **given})


@click.command(
    epilog="Example: vecfleet compare --a quantization=none --b quantization=int8",
)
@click.option("--a", "side_a", required=True, metavar="K=V,...", help="One side's settings.")
@click.option("--b", "side_b", required=True, metavar="K=V,...", help="The other's.")
@click.option(
    "--task",
    type=click.Choice(["embed", "rerank"]),
    default="embed",
    show_default=True,
    help="What is compared.",
)
@click.option(
    "--sample",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file of documents, as ingest reads it; by default the docstrings installed here.",
)
@click.option("--documents", type=click.IntRange(2), help="Of the sample; 512, to rerank 64.")
@click.option("--queries", type=click.IntRange(1), help="Asked of it; 64, to rerank 8.")
@json_option
@click.pass_obj
def compare(
    settings: Settings,
    side_a: str,
    side_b: str,
    task: Task,
    sample: Path | None,
    documents: int | None,
    queries: int | None,
    as_json: bool,
) -> int:
    """Run two settings or models over the same texts; show memory, speed and agreement.

    Each side is what the worker's settings say with some of them changed: model=..., engine=...,
    dtype=..., quantization=..., preset=..., max_model_len=... and so on. They run one after the
    other, each in a process of its own.
    """
    sides = [parse_side(text, settings) for text in (side_a, side_b)]
    texts = sample_texts(sample, documents or DOCUMENTS[task])
    found = run_comparison(sides[0], sides[1], task, texts, queries or QUERIES[task])
    if as_json:
        print_json(found.to_wire())
    else:
        show_comparison(found.to_wire(), side_a, side_b)
    return 0


def run_comparison(
    a: Settings, b: Settings, task: Task, texts: list[str], queries: int
) -> Comparison:
    """Run both sides and compare; raises ``ConfigError`` and ``EngineFailed``."""
    asked = queries_of(texts, queries)
    pairs = pairs_of(asked, texts) if task == "rerank" else []
    (figures_a, rows_a), (figures_b, rows_b) = (
        probe(
            ProbeTask(
                settings=asdict(engine_settings(side)),
                texts=[] if pairs else texts,
                pairs=pairs,
                queries=asked,
            )
        )
        for side in (a, b)
    )
    agreement: VectorAgreement | ScoreAgreement
    if task == "rerank":
        agreement = compare_scores(rows_a, rows_b, queries=len(asked))
    else:
        same_space = figures_a.card["space"] == figures_b.card["space"]
        agreement = compare_vectors(rows_a, rows_b, queries=queries, same_space=same_space)
    return Comparison(task, len(texts), len(asked), figures_a, figures_b, agreement)
