"""What a plan chooses for which model on which machine, and what it refuses."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from vecfleet.common.errors import ConfigError
from vecfleet.worker.engine_plan import GPU_STEP_TOKENS, make_plan, wanted_length
from vecfleet.worker.engine_settings import PRESETS, EngineSettings
from vecfleet.worker.machine import Gpu, Machine
from vecfleet.worker.model_files import ModelFiles
from vecfleet.worker.model_shape import ModelShape, read_shape

GIB = 1 << 30
QWEN3_06B = ModelShape(
    parameters=595_776_512,
    hidden=1024,
    intermediate=3072,
    layers=28,
    kv_width=8 * 128,
    vocabulary=151_669,
    causal=True,
)
MINILM = ModelShape(22_713_216, 384, 1536, 6, 384, 30_522, causal=False)


def files(shape: ModelShape = QWEN3_06B, max_tokens: int = 8192) -> ModelFiles:
    return ModelFiles("a/model", Path(), "embedding", "00", shape.hidden, max_tokens, shape, "last")


def gpu(index: int = 0, *, free: float = 79, total: float = 80, capability=(9, 0)) -> Gpu:
    return Gpu(index, f"GPU-{index}", "H", int(total * GIB), int(free * GIB), capability)


def machine(*gpus: Gpu, free: float = 20, bf16: bool = True) -> Machine:
    return Machine(gpus, int(free * GIB), cpu_has_bf16=bf16)


def plan(machine: Machine, shape: ModelShape = QWEN3_06B, *, has_vllm: bool = True, **given):
    settings = EngineSettings("a/model", **given)
    return make_plan(settings, files(shape), machine, has_vllm=has_vllm)


def test_a_gpu_runs_vllm_where_it_is_installed_and_torch_where_not():
    found = plan(machine(gpu()))
    assert (found.engine, found.device, found.dtype) == ("vllm", "cuda:0", "bfloat16")
    assert found.max_num_batched_tokens == GPU_STEP_TOKENS
    assert found.gpu_memory_utilization == 0.9
    assert plan(machine(gpu()), has_vllm=False).engine == "torch"


def test_a_cpu_runs_torch_and_measures_its_steps():
    found = plan(machine())
    assert (found.engine, found.device, found.dtype) == ("torch", "cpu", "bfloat16")
    assert found.max_num_batched_tokens is None
    assert found.gpu_memory_utilization is None
    assert plan(machine(bf16=False)).dtype == "float32"


def test_every_choice_has_a_reason():
    found = plan(machine(gpu()), preset="balanced")
    told = "\n".join(found.lines())
    for name in ("engine", "device", "dtype", "quantization", "max_model_len", "max_num_seqs"):
        assert f"{name} " in told
    assert "max_num_seqs 16: preset balanced" in told
    assert "settings" not in found.for_card()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_lengths_and_batches_and_each_can_be_overridden(name):
    settings = EngineSettings("a/model", preset=name)
    assert wanted_length(settings) == PRESETS[name].max_model_len
    assert wanted_length(replace(settings, max_model_len=100)) == 100
    assert plan(machine(gpu()), preset=name).max_num_seqs == PRESETS[name].max_num_seqs
    assert plan(machine(gpu()), preset=name, max_num_seqs=5).max_num_seqs == 5


def test_memory_that_others_hold_is_left_to_them():
    found = plan(machine(gpu(free=40)))
    assert 0.47 < found.gpu_memory_utilization < 0.5
    assert plan(machine(gpu(free=40)), gpu_memory_utilization=0.3).gpu_memory_utilization == 0.3


def test_a_model_that_does_not_fit_one_gpu_is_spread_over_several():
    large = replace(QWEN3_06B, parameters=60_000_000_000)
    assert plan(machine(*(gpu(n) for n in range(4))), large).tensor_parallel_size == 2
    with pytest.raises(ConfigError, match=r"134\.1 GiB"):
        plan(machine(gpu()), large)
    with pytest.raises(ConfigError, match="only the vllm engine"):
        plan(machine(gpu(), gpu(1)), large, engine="torch", tensor_parallel_size=2)
    fp8 = plan(machine(gpu()), large, quantization="fp8")
    assert (fp8.tensor_parallel_size, fp8.quantization) == (1, "fp8")


def test_a_model_must_fit_its_share():
    large = replace(QWEN3_06B, parameters=30_000_000_000)
    assert plan(machine(gpu()), large).tensor_parallel_size == 1
    with pytest.raises(ConfigError, match=r"16\.0 GiB free"):
        plan(machine(gpu()), large, gpu_memory_utilization=0.2)


def test_a_model_that_does_not_fit_the_host_is_refused():
    with pytest.raises(ConfigError, match="take a smaller model"):
        plan(machine(free=1), dtype="float32")


def test_keys_and_values_of_vllm_on_a_cpu_count_as_memory():
    found = plan(machine(), engine="vllm", dtype="bfloat16")
    assert found.kv_cache_bytes == QWEN3_06B.kv_bytes(8192)
    with pytest.raises(ConfigError, match="take a smaller model"):
        plan(machine(free=1.5), engine="vllm", dtype="bfloat16")
    assert plan(machine(gpu())).kv_cache_bytes is None
    assert plan(machine(gpu()), least_kv_cache=True).kv_cache_bytes == found.kv_cache_bytes * 2


def test_a_text_that_cannot_be_computed_in_parts_fits_a_step():
    found = plan(machine(), MINILM, engine="vllm")
    assert found.max_num_batched_tokens == 8192
    with pytest.raises(ConfigError, match="must fit one step"):
        plan(machine(), MINILM, engine="vllm", max_num_batched_tokens=512)
    assert plan(machine(), engine="vllm").max_num_batched_tokens == 2048  # causal: in parts


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"quantization": "int8", "engine": "vllm"}, "torch engine on a CPU"),
        ({"quantization": "fp8"}, "Ada"),
        ({"quantization": "fp16", "dtype": "float32"}, "contradict"),
        ({"device": "cuda"}, "no GPU 0"),
        ({"device": "tpu"}, "no device"),
        ({"engine": "vllm", "tensor_parallel_size": 2}, "2 GPUs are asked for"),
    ],
)
def test_what_does_not_go_together_is_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        plan(machine(), **given)


def test_vllm_that_is_not_installed_is_refused():
    with pytest.raises(ConfigError, match="vecfleet\\[vllm"):
        plan(machine(), engine="vllm", has_vllm=False)


def test_old_gpus_have_no_bfloat16_and_no_fp8():
    assert plan(machine(gpu(capability=(7, 5)))).dtype == "float16"
    with pytest.raises(ConfigError, match="Ada"):
        plan(machine(gpu(capability=(8, 0))), quantization="fp8")


def test_what_was_said_is_not_overwritten_by_what_was_measured():
    settings = EngineSettings("a/model", max_num_seqs=7)
    filled = settings.filled_from({"max_num_seqs": 64, "max_num_batched_tokens": 512})
    assert (filled.max_num_seqs, filled.max_num_batched_tokens) == (7, 512)


def test_a_shape_is_read_from_headers_alone(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [10, 20], "data_offsets": [0, 400]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [400, 404]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    shape = read_shape(tmp_path, {**config, "architectures": ["Qwen3ForCausalLM"]})
    assert shape.parameters == 201
    assert (shape.kv_width, shape.causal) == (16, True)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(ConfigError, match="damaged"):
        read_shape(tmp_path, config)
