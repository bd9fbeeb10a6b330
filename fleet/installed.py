"""What is installed, and what to install where it is not."""

from __future__ import annotations

import importlib.util

from vecfleet.common.errors import ConfigError


def need(extra: str, *modules: str) -> None:
    """Raise a ``ConfigError`` that names the extra to install when one of ``modules`` is missing.

    Nothing is imported: to look for torch must not take seconds.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not installed; get it with: pip install 'vecfleet[{extra}]'"
        )


def need_engine(engine: str) -> None:
    """``need`` for a worker with this engine."""
    if engine in ("fake", "null"):
        need("worker", "numpy", "psutil")
    elif engine == "vllm":
        need("vllm", "numpy", "psutil", "torch", "transformers", "vllm")
    else:
        need("worker", "numpy", "psutil", "torch", "transformers")


def need_all(engine: str) -> None:
    """``need`` for a whole fleet whose workers have this engine."""
    need("local", "numpy", "faiss", "fastapi", "uvicorn")
    if engine in ("auto", "torch"):
        need("local", "torch", "transformers")
    else:
        need_engine(engine)
