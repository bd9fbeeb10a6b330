"""A worker shows that its model computes before it claims anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from engines import rigs
from safetensors.numpy import load_file, save_file
from servers import start_role

from vecfleet.common.errors import ConfigError
from vecfleet.common.redis_client import connect
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine
from vecfleet.worker.proven_engine import ProvenEngine


@pytest.fixture
def broken_embedding(bert_embedding: Path, tmp_path: Path) -> Path:
    """A model that loads, and makes NaN of every text."""
    folder = Path(shutil.copytree(bert_embedding, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if "layer.1.output.LayerNorm.weight" in name)
    weights[name] = np.full_like(weights[name], np.inf)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "model", ["bert_embedding", "qwen3_embedding", "bert_reranker", "qwen3_reranker"]
)
async def test_models_that_compute_are_proven(model, request):
    engine = ProvenEngine(await rigs.load_real("torch", request.getfixturevalue(model)))
    before = engine.stats.texts
    await engine.prove()
    assert engine.stats.texts == before + 1
    await engine.close()


@pytest.mark.parametrize("tokens", [6, 8])
async def test_a_reranker_that_reads_few_tokens_is_proven(bert_reranker, tokens):
    settings = EngineSettings(str(bert_reranker), "torch", device="cpu", max_model_len=tokens)
    engine = ProvenEngine(await load_engine(settings))
    await engine.prove()
    assert engine.stats.texts == 1
    await engine.close()


async def test_a_reranker_that_has_no_room_for_a_document_says_so(qwen3_reranker):
    engine = ProvenEngine(await rigs.load_torch(qwen3_reranker))
    with pytest.raises(ConfigError, match=r"too few tokens.*no room for a document in 128 tokens"):
        await engine.prove()
    await engine.close()


def test_a_worker_whose_model_computes_nothing_ends_before_it_shows_itself(
    redis_url, broken_embedding
):
    options = ["--redis", redis_url, "--model", str(broken_embedding), "--engine", "torch"]
    worker = start_role("worker", *options, "--device", "cpu")
    try:
        assert worker.wait(120) == 1
        assert "broken loads, but fails on a text of our own" in worker.output
        assert "NaN" in worker.output
    finally:
        worker.close()
    with connect(redis_url) as client:
        assert client.keys("*") == []
