"""The roles behind the queue as processes of their own, with a fake engine that tests can slow.

Run as ``python roles.py worker|aggregator|search REDIS_URL DATA_DIR STEP_S [MAX_STEP_S]``; the
environment says how much may wait to be merged.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vecfleet.common.logs import setup_logging
from vecfleet.common.settings import Settings
from vecfleet.worker.aggregator_main import AggregatorConfig, run_aggregator
from vecfleet.worker.engine import Engine
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings
from vecfleet.worker.main import WorkerConfig, run_worker
from vecfleet.worker.search_main import SearchConfig, run_search
from vecfleet.worker.window import ResourceLimits


def main(role: str, redis_url: str, data_dir: str, step_s: str, max_step_s: str = "120") -> int:
    async def load(settings: EngineSettings) -> Engine:
        return await FakeEngine.load(FakeSettings(step_s=float(step_s), step_tokens=512))

    bounds = Settings.read().admission()
    match role:
        case "worker":
            limits = ResourceLimits(memory_percent=100, cpu_percent=100)
            worker = WorkerConfig(
                redis_url,
                EngineSettings("fake"),
                limits=limits,
                max_step_s=float(max_step_s),
                max_merge_bytes=bounds.max_merge_bytes,
                max_unmerged_bytes=bounds.max_unmerged_bytes,
            )
            return run_worker(worker, load=load)
        case "aggregator":
            return run_aggregator(
                AggregatorConfig(redis_url, Path(data_dir), max_merge_bytes=bounds.max_merge_bytes)
            )
        case _:
            return run_search(SearchConfig(redis_url, Path(data_dir)))


if __name__ == "__main__":
    setup_logging()
    sys.exit(main(*sys.argv[1:]))
