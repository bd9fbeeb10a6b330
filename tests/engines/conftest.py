"""Engines for the tests; those with a real model are loaded once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from vecfleet.worker.memory import prepare_process

prepare_process()

from engines import checkpoints  # noqa: E402


@pytest.fixture(scope="session")
def bert_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert_cross_encoder(tmp_path_factory.mktemp("bert-cross-encoder"))


@pytest.fixture(scope="session")
def bare_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bare_cross_encoder(tmp_path_factory.mktemp("bare-cross-encoder"))


@pytest.fixture(scope="session")
def roberta_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.roberta_cross_encoder(tmp_path_factory.mktemp("roberta-cross-encoder"))


@pytest.fixture(scope="session")
def qwen3_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.qwen3_reranker(tmp_path_factory.mktemp("tiny-qwen3-reranker"))


@pytest.fixture(scope="session")
def fragile_embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.fragile_embedding(tmp_path_factory.mktemp("tiny-fragile-embedding"))


@pytest.fixture(scope="session")
def bert_embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert_embedding(tmp_path_factory.mktemp("bert-embedding"))


@pytest.fixture(scope="session")
def qwen3_embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.qwen3_embedding(tmp_path_factory.mktemp("tiny-qwen3-embedding"))
