"""What the one-machine fleet asks of the machine: a folder of its own, a free port."""

from __future__ import annotations

import fcntl
import os
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vecfleet.common.errors import ConfigError
from vecfleet.worker.machine import Gpu

_LOCK_FILE = "up.lock"
_HTTP_TIMEOUT_S = 2.0


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


@contextmanager
def claimed_gpu(folder: Path, gpus: Sequence[Gpu]) -> Iterator[Gpu]:
    """Hold the first of ``gpus`` that nobody else holds by a lock in ``folder``.

    Containers that share the folder share the locks; the kernel lets go of one when its process
    ends, however it ends. Raises ``ConfigError`` when none is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        with (folder / f"{gpu.uuid}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield gpu
            return
    raise ConfigError(
        f"no GPU is free: {len(gpus)} found, each held by another worker (see {folder})"
    )


def answers(url: str) -> bool:
    """Whether ``url`` answers with status 200; goes through no proxy.

    Any certificate will do: nothing is sent, and one for the public name does not fit loopback.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(url, timeout=_HTTP_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False
