"""A model is numbers: no code that lies in its folder is run, whichever engine loads it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from vecfleet.common.engine_names import EngineName
from vecfleet.common.errors import ConfigError
from vecfleet.worker.engine import Priority
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine

ENGINES: tuple[EngineName, ...] = ("torch", "vllm")
HAS_VLLM = importlib.util.find_spec("vllm") is not None


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def model(qwen3_embedding: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen3_embedding, tmp_path / "model"))


def need(engine: EngineName) -> None:
    if engine == "vllm" and not HAS_VLLM:
        pytest.skip("vLLM is not installed; make test-vllm runs this")


def settings(model: Path, engine: EngineName) -> EngineSettings:
    return EngineSettings(str(model), engine=engine, device="cpu", threads=1)


def change(file: Path, **values: object) -> None:
    told = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**told, **values}))


def plant_code(model: Path, canary: Path) -> None:
    """Code under every name that transformers or vLLM look for with trust_remote_code."""
    touch = f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "custom_st", "setup"):
        (model / f"{name}.py").write_text(
            touch + "class EvilModel: pass\nclass EvilConfig: pass\nclass EvilTokenizer: pass\n"
        )
    (model / "__init__.py").write_text(touch)
    auto = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModel": "modeling_evil.EvilModel",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
        "AutoModelForSequenceClassification": "modeling_evil.EvilModel",
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
    }
    change(model / "config.json", auto_map=auto)
    change(model / "tokenizer_config.json", auto_map=auto)


async def embed_once(model: Path, engine: EngineName) -> None:
    loaded = await load_engine(settings(model, engine))
    try:
        made = await loaded.embed(["a text"], priority=Priority.BULK)
        assert len(made.vectors) == 1
    finally:
        await loaded.close()


@pytest.mark.parametrize("engine", ENGINES)
async def test_code_in_the_models_folder_is_not_run(
    engine: EngineName, model: Path, canary: Path
) -> None:
    need(engine)
    plant_code(model, canary)
    with contextlib.suppress(ConfigError):  # refusing it is as good
        await embed_once(model, engine)
    assert not canary.exists()


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_model_that_is_code_is_refused(
    engine: EngineName, model: Path, canary: Path
) -> None:
    need(engine)
    plant_code(model, canary)
    change(model / "config.json", model_type="evil", architectures=["EvilModel"])
    with pytest.raises(ConfigError):
        await embed_once(model, engine)
    assert not canary.exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "last.ckpt"]
)
async def test_weights_in_a_pickle_are_refused(
    engine: EngineName, name: str, model: Path, canary: Path
) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / name).write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(ConfigError, match=f"{name}, a pickle.*safetensors"):
        await load_engine(settings(model, engine))
    assert not canary.exists()


@pytest.mark.parametrize("engine", ENGINES)
async def test_pickles_beside_the_weights_are_not_read(
    engine: EngineName, model: Path, canary: Path
) -> None:
    need(engine)
    evil = pickle.dumps(Evil(canary))
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "model.pt"):
        (model / name).write_bytes(evil)
    (model / "1_Pooling" / "pytorch_model.bin").write_bytes(evil)
    await embed_once(model, engine)
    assert not canary.exists()


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_pickle_that_is_called_safetensors_is_refused(
    engine: EngineName, model: Path, canary: Path
) -> None:
    need(engine)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "model.safetensors").write_bytes(pickle.dumps(Evil(canary)) * 3)
    with pytest.raises(Exception):  # noqa: B017 - by whichever library reads it first
        await load_engine(settings(model, engine))
    assert not canary.exists()
