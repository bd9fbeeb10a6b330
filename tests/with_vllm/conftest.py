"""Tests that need vLLM: ``make test-vllm`` runs them in an environment of their own."""

from __future__ import annotations

import pytest
from engines.conftest import fragile_embedding, qwen3_embedding, qwen3_reranker
from servers import module_or_skip


@pytest.fixture(autouse=True, scope="session")
def _vllm_is_here() -> None:
    module_or_skip("vllm")


__all__ = ["fragile_embedding", "qwen3_embedding", "qwen3_reranker"]
