"""A worker whose engine takes a fixed time a step; ``soak`` starts it with a Redis and a time."""

from __future__ import annotations

import sys

from vecfleet.common.logs import setup_logging
from vecfleet.worker.engine import Engine
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings
from vecfleet.worker.main import WorkerConfig, run_worker
from vecfleet.worker.window import ResourceLimits

STEP_TOKENS = 1024


def main(redis_url: str, step_s: str) -> int:
    """Run until SIGTERM; returns the exit code."""

    async def load(settings: EngineSettings) -> Engine:
        return await FakeEngine.load(FakeSettings(step_s=float(step_s), step_tokens=STEP_TOKENS))

    limits = ResourceLimits(memory_percent=100, cpu_percent=100)
    return run_worker(WorkerConfig(redis_url, EngineSettings("fake"), limits=limits), load=load)


if __name__ == "__main__":
    setup_logging()
    sys.exit(main(*sys.argv[1:]))
