"""What the one-machine fleet asks of the machine: a folder of its own, a free port, its GPUs."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vecfleet.common.errors import ConfigError

_LOCK_FILE = "up.lock"
_HTTP_TIMEOUT_S = 2.0
_GPU_TIMEOUT_S = 60.0
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


@contextmanager
def locked(data: Path) -> Iterator[None]:
    """Hold a data folder; raises ``ConfigError`` when another fleet holds it.

    The kernel lets go of the lock when the process ends, however it ends.
    """
    with (data / _LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise ConfigError(
                f"a fleet runs in {data} already (process {pid}); "
                "stop it, or choose another folder with --data"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_port(host: str, port: int) -> None:
    """Raise ``ConfigError`` unless ``host`` and ``port`` can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; "
            "choose another with --port"
        ) from None


def count_gpus() -> int:
    """The GPUs that torch can use here; 0 without asking torch where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        said = subprocess.run(
            [sys.executable, "-c", _COUNT_GPUS],
            capture_output=True,
            text=True,
            timeout=_GPU_TIMEOUT_S,
            check=True,
        ).stdout
        return int(said)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


@contextmanager
def claimed_gpu(folder: Path, gpus: int) -> Iterator[int]:
    """Hold the first of this host's ``gpus`` that nobody else holds by a lock in ``folder``.

    Containers that share the folder share the locks. Raises ``ConfigError`` when none is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in range(gpus):
        with (folder / f"gpu-{gpu}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield gpu
            return
    raise ConfigError(f"no GPU is free: {gpus} found, each held by another worker (see {folder})")


def answers(url: str) -> bool:
    """Whether ``url`` answers with status 200; goes through no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_HTTP_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False
