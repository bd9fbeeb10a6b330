"""What a GPU runs instead of many small kernels gives the same results, tried on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from engines.checkpoints import bert_cross_encoder, qwen3_embedding
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from vecfleet.worker import torch_packing
from vecfleet.worker.model_files import find_model
from vecfleet.worker.tokenizer import Tokens, load_tokenizer
from vecfleet.worker.torch_fusion import FusedRmsNorm, fuse
from vecfleet.worker.torch_loading import TorchSettings, load_model
from vecfleet.worker.torch_model import TorchModel

LENGTHS = ((7,), (1, 2, 3), (16, 16), (3, 16, 17, 33, 64), tuple(range(1, 60)))


@pytest.fixture(params=[qwen3_embedding, bert_cross_encoder])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TorchModel]:
    files = find_model(str(request.param(tmp_path / "model")))
    settings = TorchSettings(device="cpu", dtype="float32", step_tokens=512)
    loaded = load_model(files, load_tokenizer(files), settings)
    assert loaded.packed
    yield loaded
    AttentionInterface.register(torch_packing.ATTENTION_NAME, torch_packing.attend)


def steps(model: TorchModel) -> list[list[Tokens]]:
    chance = np.random.default_rng(3)
    most = int(model.base.config.vocab_size)
    return [
        [Tokens(chance.integers(1, most, length, np.int32)) for length in lengths]
        for lengths in LENGTHS
    ]


def results(model: TorchModel) -> list[NDArray[np.float32]]:
    return [model.run(step) for step in steps(model)]


def assert_same(found: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, causal: bool
) -> Tensor:
    """What the operator is said to compute."""
    assert ends.dtype == torch.int32
    assert ends[0] == 0
    assert ends[-1] == q.shape[0]
    assert longest == int(ends.diff().max())
    out = torch.full_like(q, float("nan"))
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        text = [rows[start:stop].transpose(0, 1).unsqueeze(0) for rows in (q, k, v)]
        attended = scaled_dot_product_attention(
            *text, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[start:stop] = attended[0].transpose(0, 1)
    return out


def test_one_kernel_that_is_told_where_texts_end(
    model: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(model)
    monkeypatch.setattr(torch_packing, "varlen_attention", one_by_one)
    model.kernel = "varlen"
    assert_same(results(model), expected)


def test_where_that_kernel_is_missing_another_is_taken(
    model: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = steps(model)[3]
    expected = model.run(trial)
    assert not model._is_right("varlen", trial, expected)  # torch has none for a CPU
    assert model._is_right("fused", trial, expected)
    monkeypatch.setattr(torch_packing, "varlen_attention", one_by_one)
    assert model._is_right("varlen", trial, expected)
    wrong = partial(_turned, one_by_one)
    monkeypatch.setattr(torch_packing, "varlen_attention", wrong)
    assert not model._is_right("varlen", trial, expected)


def _turned(attention: Callable[..., Tensor], *given: object) -> Tensor:
    return attention(*given).flip(0)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are traced and taken apart as for a GPU; code for this CPU would take a minute."""
    traced = partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", traced)


@pytest.mark.usefixtures("traced_only")
def test_fused_layers_give_the_same(model: TorchModel) -> None:
    expected = results(model)
    times = iter((3.0, 2.0, 1.0))
    trial = steps(model)[3]
    kept = fuse(model.base, lambda: model.run(trial) is not None, lambda: next(times))
    norms = any(isinstance(module, FusedRmsNorm) for module in model.base.modules())
    assert kept == (["norms", "layers"] if norms else ["layers"])
    assert norms == (model.base.config.model_type == "qwen3")
    assert_same(results(model), expected)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("fault", ["slower", "other results", "fails"])
def test_what_does_not_help_is_undone(model: TorchModel, fault: str) -> None:
    expected = results(model)
    before = {name: type(module) for name, module in model.base.named_modules()}

    def agrees() -> bool:
        if fault == "fails":
            raise OSError("there is no compiler")
        return fault != "other results"

    assert fuse(model.base, agrees, lambda: 1.0) == []
    assert {name: type(module) for name, module in model.base.named_modules()} == before
    assert all(module._compiled_call_impl is None for module in model.base.modules())
    assert_same(results(model), expected)


def test_a_model_measures_before_it_fuses(
    model: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((3.0, 2.0, 4.0))
    monkeypatch.setattr(TorchModel, "time_step", lambda *_: next(times))
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    trial = steps(model)[3]
    model.fuse(trial, model.run(trial))
    is_qwen = model.base.config.model_type == "qwen3"
    assert model.fused == (["norms"] if is_qwen else ["layers"])
