"""A real Redis that is started as deploy/redis starts it, and its users' URLs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import redis
from servers import DEADLINE_S

from vecfleet.fleet.process import dies_with_parent
from vecfleet.fleet.redis_server import RedisBinary, free_port

DEPLOY = Path(__file__).parents[1] / "deploy" / "redis"
ADMIN = "admin"  # of the test alone: to read ACL LOG


def users(text: str | None = None) -> dict[str, set[str]]:
    """The commands that each user of users.acl may run, in lower case."""
    lines = (text if text is not None else (DEPLOY / "users.acl").read_text()).splitlines()
    found = {}
    for line in lines:
        word, *rest = line.split() or [""]
        if word == "user":
            found[rest[0]] = {part[1:] for part in rest[1:] if part.startswith("+")}
    return found


class AclRedis:
    """deploy/redis/start.sh over a copy of its folder, on a free loopback port."""

    def __init__(self, folder: Path, binary: RedisBinary, *options: str) -> None:
        self.deploy = folder / "deploy"
        self.passwords = folder / "passwords"
        self.port = free_port()
        shutil.copytree(DEPLOY, self.deploy)
        with (self.deploy / "users.acl").open("a") as file:
            file.write(f"user {ADMIN} on ~* &* +@all\n")
        subprocess.run([str(self.deploy / "passwords.sh"), str(self.passwords)], check=True)
        (folder / "data").mkdir()
        self._log = folder / "redis.log"
        own = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder / "data"))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(self.deploy / "start.sh"), str(self.passwords), *own, *options],
                env={
                    **os.environ,
                    "REDIS_SERVER": str(binary.path),
                    "ACL_FILE": str(folder / "users.acl"),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while True:
            try:
                with self.client(ADMIN) as client:
                    client.ping()
                return
            except redis.exceptions.RedisError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise AssertionError(self._log.read_text()) from None
                time.sleep(0.02)

    def password(self, user: str) -> str:
        return (self.passwords / user).read_text()

    def client(self, user: str) -> redis.Redis:
        return redis.Redis(port=self.port, username=user, password=self.password(user))

    def url(self, user: str) -> str:
        return f"redis://{user}:{self.password(user)}@127.0.0.1:{self.port}/0"

    def environment(self, user: str) -> dict[str, str]:
        """As docker-compose.yml tells a role: the password in a file, not in the URL."""
        return {
            "VECFLEET_REDIS_URL": f"redis://{user}@127.0.0.1:{self.port}/0",
            "VECFLEET_REDIS_PASSWORD_FILE": str(self.passwords / user),
        }

    def denied(self) -> list[str]:
        """What users were refused since the start, as ``user: command``."""
        with self.client(ADMIN) as client:
            return sorted(f"{row['username']}: {row['object']}" for row in client.acl_log())

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE_S)
