"""What the bench on a GPU counts as work, against a hand count and torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from vecfleet.bench.gpu_flops import Cost, Work
from vecfleet.bench.gpu_models import SHAPES, TINY, build
from vecfleet.bench.gpu_texts import END_OF_TEXT, ends_with, texts_of_length, train_tokenizer
from vecfleet.bench.texts import read_passages
from vecfleet.worker.model_files import find_model
from vecfleet.worker.tokenizer import load_tokenizer

PASSAGES = 300
LENGTH = 96


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return read_passages(PASSAGES)


@pytest.fixture(scope="module")
def checkpoint(passages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = ends_with(train_tokenizer(passages, 2_000), END_OF_TEXT)
    return build(tmp_path_factory.mktemp("gpu"), "embedding", tokenizer, TINY, "cpu")


def test_the_published_shape_by_hand() -> None:
    cost = Cost.of(SHAPES["embedding"].config())
    attention = 1024 * 2048 + 2 * 1024 * 1024 + 2048 * 1024  # queries, keys and values, output
    feed_forward = 3 * 1024 * 3072
    assert cost.matrix_parameters == 28 * (attention + feed_forward) == 440_401_920
    one = cost.flops(Work.of([128]))
    looks = 128 * 129 // 2
    assert one == 2 * 440_401_920 * 128 + 28 * 16 * (2 * 128 + 2 * 128) * looks


def test_what_is_in_a_cache_is_not_counted() -> None:
    whole = Work.of([100, 100])
    assert (whole.tokens, whole.attended) == (200, 2 * 5050)
    half = Work.of([100, 100], computed=100)
    assert half.tokens == 100
    assert half.attended == 2 * (5050 - 50 * 51 / 2)  # the later halves look at all before them
    assert Work.of([]).tokens == 0


def test_torch_counts_the_same(checkpoint: Path) -> None:
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    cost = Cost.of(TINY.config())
    ids = torch.arange(1, LENGTH + 1).unsqueeze(0)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    # Eager attention computes the whole square and masks half of it; the rest is exact.
    square = cost.attended_flops * LENGTH**2
    assert counter.get_total_flops() == 2 * cost.matrix_parameters * LENGTH + square


def test_the_weights_are_those_that_transformers_expects(checkpoint: Path) -> None:
    model, told = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert model.config.rope_parameters["rope_theta"] == 1_000_000
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and "embed" not in name
    ]
    counted = sum(weight.numel() for weight in matrices)
    assert counted == Cost.of(TINY.config()).matrix_parameters
    assert all(weight.float().std() > 0.01 for weight in matrices)


def test_texts_have_the_length_that_the_engine_sees(checkpoint: Path, passages: list[str]) -> None:
    files = find_model(str(checkpoint))
    assert (files.kind, files.pooling, files.dimension) == ("embedding", "last", TINY.hidden)
    plain = train_tokenizer(passages, 2_000)
    texts = texts_of_length(plain, passages, LENGTH - 1, 200)
    assert len(set(texts)) == 200
    encoded = load_tokenizer(files).texts(texts, truncate=False)
    assert {one.length for one in encoded} == {LENGTH}
    assert max(int(one.payload.ids.max()) for one in encoded) < TINY.vocabulary
    assert plain.token_to_id("yes") is not None
    assert len(plain.encode("yes").ids) == len(plain.encode("no").ids) == 1
