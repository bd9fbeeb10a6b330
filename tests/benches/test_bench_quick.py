"""The bench measures with real processes: small sizes, the items that need no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vecfleet.bench.targets import BY_KEY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the bench reads /proc")

NULL_KEYS = ("null_engine_docs_per_s", "search_p99_ratio", "anon_memory_growth", "ingest_flatness")
ROLES = {"redis", "search", "writer", "worker", "gateway"}


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vecfleet.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.timeout(300)
def test_a_quick_run_measures_and_claims_nothing(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    kept = {"value": 1.0, "target": 0.95, "ok": True, "detail": {}}
    out.write_text(json.dumps({"fleet_efficiency": kept}))
    done = run_bench("--quick", "--only", ",".join(NULL_KEYS), "--out", str(out))
    assert done.returncode == 0, done.stderr
    entries = json.loads(out.read_text())
    assert entries.pop("fleet_efficiency") == kept
    assert set(entries) == set(NULL_KEYS)
    for key, entry in entries.items():
        assert key in done.stdout
        assert entry["target"] == BY_KEY[key].target
        assert entry["ok"] is None  # too small to judge by
    rate = entries["null_engine_docs_per_s"]
    assert rate["value"] > 0
    costs = rate["detail"]["cpu_us_per_document"]
    assert costs.keys() >= ROLES | {"producer", "builders", "all"}
    assert costs["worker"] > 0
    assert entries["search_p99_ratio"]["detail"]["searches_while_busy"][0] > 0
    memory = entries["anon_memory_growth"]["detail"]
    assert memory["documents"] == 20_000
    assert memory["growth"].keys() >= ROLES - {"writer"}
    assert all(rate > 0 for rate in entries["ingest_flatness"]["detail"]["docs_per_s_by_tenth"])
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # nothing else is left


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    done = run_bench("--only", "speed", "--out", str(tmp_path / "bench.json"))
    assert done.returncode == 2
    assert "no key speed" in done.stderr
