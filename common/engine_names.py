"""The words by which an engine and its settings are chosen."""

from __future__ import annotations

from typing import Literal

EngineName = Literal["auto", "torch", "vllm", "fake", "null"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "fp16", "bf16", "int8", "fp8"]
TaskName = Literal["auto", "embed", "rerank"]
PresetName = Literal["high_accuracy", "balanced", "high_speed"]
