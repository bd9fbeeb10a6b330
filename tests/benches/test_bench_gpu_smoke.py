"""The bench on a GPU runs to its end on a CPU, and says everything that it promises to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vecfleet.bench.gpu_report import FIGURES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the bench reads /proc")


@pytest.mark.timeout(400)
def test_a_smoke_run_tells_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "vecfleet.bench.gpu", "--smoke", "--engine", "torch"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())
    assert told["finished"] is True
    assert told["machine"]["versions"].keys() >= {"python", "torch", "transformers"}
    assert told["models"]["embedding"]["engine"] == told["models"]["reranker"]["engine"] == "torch"
    figures = told["figures"]
    assert list(figures) and set(figures) == {figure.key for figure in FIGURES}
    for figure in FIGURES:
        assert figure.key in done.stdout
        entry = figures[figure.key]
        assert entry["value"] > 0
        assert entry["target"] == figure.target
        assert entry["ok"] is None  # too small to judge by
    value = {key: entry["value"] for key, entry in figures.items()}

    embed = figures["embed_docs_per_s"]["detail"]
    assert embed["tokens"] == embed["computed_tokens"] == 128 * embed["rows"]
    assert value["embed_tokens_per_s"] == pytest.approx(128 * value["embed_docs_per_s"], rel=0.01)
    # The share is what was computed a second, by the matrix rate.
    matrices = told["models"]["matrix_parameters"]["embedding"]
    layers, queries = 2, 4 * 32
    flops = 128 * 2 * matrices + layers * 4 * queries * (128 * 129 // 2)
    share = value["embed_docs_per_s"] * flops / (value["matmul_tflops"] * 1e12)
    assert value["embed_rate_share"] == pytest.approx(share, rel=0.01)

    rerank = figures["rerank_pairs_per_s"]["detail"]
    whole = rerank["query_tokens"] + rerank["document_tokens"]
    assert whole < rerank["tokens_a_row"] < whole + 150  # with the prompt around them
    assert all(0 < value[key] <= 1.1 for key in value if key.endswith("_gpu_busy"))
    assert value["query_p50_ms"] <= value["query_p99_ms"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]  # nothing else is left
