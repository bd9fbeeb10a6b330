"""A worker whose fake engine fails on texts, but does not die of any.

Run as ``python steady_worker.py REDIS_URL MODEL``. Hypothesis finds
the words in the source that make the fake engine abort, hang or break, and puts them into texts.
A worker that dies is another test's subject; here it would only cost time.
"""

from __future__ import annotations

import sys

from vecfleet.common.logs import setup_logging
from vecfleet.worker import fake_engine
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.main import WorkerConfig, run_worker
from vecfleet.worker.window import ResourceLimits

_IN_NO_TEXT = "\ud800"  # has no UTF-8

if __name__ == "__main__":
    fake_engine.ABORT = fake_engine.HANG = fake_engine.BREAK = _IN_NO_TEXT
    setup_logging("info")
    url, model = sys.argv[1:]
    limits = ResourceLimits(memory_percent=100, cpu_percent=100)
    sys.exit(run_worker(WorkerConfig(url, EngineSettings(model, engine="fake"), limits=limits)))
