"""A worker whose engine fails with errors that quote the text that they could not read.

Run as ``python quoting_role.py``; its settings are those of ``vecfleet worker``. A text that holds
``[[NAME]]`` fails with the error of that name in ``ERRORS``, in the model's step; ``[[call NAME]]``
where the engine is called.
"""

from __future__ import annotations

import sys

from vecfleet.common.errors import EngineFailed, InvalidInput
from vecfleet.common.logs import setup_logging
from vecfleet.common.settings import Settings
from vecfleet.worker import fake_engine
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.main import WorkerConfig, run_worker
from vecfleet.worker.window import ResourceLimits

ERRORS = {
    "runtime": RuntimeError,
    "value": ValueError,
    "key": KeyError,
    "type": TypeError,
    "index": IndexError,
    "assertion": AssertionError,
    "plain": Exception,
    "ours": EngineFailed,
    "input": InvalidInput,
}


def fail_on(texts: list[str], before: str = "") -> None:
    for text in texts:
        for name, error in ERRORS.items():
            if f"[[{before}{name}]]" in text:
                raise error(f"cannot read {text!r}")


class QuotingRunner(fake_engine._FakeRunner):
    def run(self, payloads):
        fail_on([text for payload in payloads for text in payload])
        return super().run(payloads)


class QuotingEngine(fake_engine.FakeEngine):
    async def embed(self, texts, **options):
        fail_on(list(texts), "call ")
        return await super().embed(texts, **options)

    async def rerank(self, pairs, **options):
        fail_on([text for pair in pairs for text in pair], "call ")
        return await super().rerank(pairs, **options)


async def load(settings):
    fake_engine._FakeRunner = QuotingRunner
    return await QuotingEngine.load()


if __name__ == "__main__":
    settings = Settings.read()
    setup_logging("debug", log_format=settings.log_format)
    limits = ResourceLimits(memory_percent=100, cpu_percent=100)
    config = WorkerConfig(settings.find_redis_url(), EngineSettings("fake"), limits=limits)
    sys.exit(run_worker(config, load=load))
