"""The compose file: valid, unprivileged, and made of commands that run here as processes."""

from __future__ import annotations

import re
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import Process, process_exists, wait_until

from vecfleet.common.errors import ConfigError
from vecfleet.common.redis_client import connect
from vecfleet.fleet.machine import claimed_gpu
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import RedisBinary, RedisServer, free_port
from vecfleet.worker.machine import Gpu

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
RunRole = Callable[..., Process]
_VARIABLE = re.compile(r"\$\{[A-Z_]+:-([^}]*)\}")


def expanded(argument: str) -> str:
    return _VARIABLE.sub(lambda found: found[1], argument)


def dockerfile(service: dict[str, Any]) -> str:
    return (ROOT / service["build"]["dockerfile"]).read_text()


def test_it_has_every_role() -> None:
    assert set(SERVICES) == {"redis", "gateway", "aggregator", "worker"}


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    if name in OURS:
        last_stage = dockerfile(service).rpartition("\nFROM ")[2]
        user = re.findall(r"^USER (\S+)$", last_stage, re.MULTILINE)[-1]
    else:
        user = service["user"]
    assert user not in ("root", "0")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_watched_restarted_and_drained(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]
    for volume in service.get("volumes", []):
        assert volume.split(":")[0] in COMPOSE["volumes"]


def test_redis_can_be_reached_from_inside_alone_and_keeps_its_data() -> None:
    assert "ports" not in SERVICES["redis"]
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


@pytest.mark.parametrize("name", OURS)
def test_roles_wait_for_redis_and_build_from_what_is_here(name: str) -> None:
    service = SERVICES[name]
    assert service["depends_on"]["redis"]["condition"] == "service_healthy"
    text = dockerfile(service)
    assert text.count("\nFROM ") == 2, "two stages"
    assert "constraints" in text
    for profile in re.findall(r"PROFILE=(\S+)|constraints/([a-z-]+)\.txt", text):
        assert (ROOT / "constraints" / f"{''.join(profile)}.txt").exists()
    let_in = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / entry).exists() for entry in let_in)


@pytest.mark.parametrize("name", OURS)
def test_its_command_runs_here(name: str) -> None:
    command, *arguments = SERVICES[name]["command"]
    assert command == "vecfleet"
    assert role_command(*arguments)[-len(arguments) :] == arguments
    done = subprocess.run(
        role_command(*map(expanded, arguments), "--check"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "settings and installation are good" in done.stdout


def test_redis_starts_with_the_services_command(
    tmp_path: Path, each_redis_binary: RedisBinary
) -> None:
    command, *arguments = SERVICES["redis"]["command"]
    assert command == "redis-server"
    extra = [expanded(argument) for argument in arguments]
    server = RedisServer(tmp_path, binary=each_redis_binary, extra=extra)
    with server, server.client() as client:
        assert client.config_get("maxmemory")["maxmemory"] == str(4 << 30)
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def health(url: str, *arguments: str) -> int:
    return subprocess.run(role_command(*arguments, "--redis", url), capture_output=True).returncode


def test_the_aggregators_command_and_health_check(
    run_role: RunRole, redis_url: str, tmp_path: Path
) -> None:
    service = SERVICES["aggregator"]
    arguments = [str(tmp_path) if a == "/data" else a for a in service["command"][1:]]
    check = service["healthcheck"]["test"][2:]
    assert health(redis_url, *check) == 1
    aggregator = run_role(*arguments, env={"VECFLEET_REDIS_URL": redis_url})
    wait_until(lambda: health(redis_url, *check) == 0, 60, "a good health check")
    with connect(redis_url) as client:
        pids = [int(client.hget(key, "pid")) for key in client.smembers("rq:workers")]  # type: ignore[arg-type,union-attr]
    assert aggregator.stop(60) == 0
    assert not [pid for pid in pids if process_exists(pid)]
    assert health(redis_url, *check) == 1


def test_the_gateways_and_the_workers_health_checks(run_role: RunRole, redis_url: str) -> None:
    port = free_port()
    environment = {"VECFLEET_REDIS_URL": redis_url, "VECFLEET_ENGINE": "null"}
    worker = run_role("worker", "--gpus", "all", env=environment)
    gateway = run_role("gateway", "--port", str(port), env=environment)
    check = SERVICES["worker"]["healthcheck"]["test"][2:]
    wait_until(lambda: health(redis_url, *check) == 0, 60, "a worker")
    *_, python, flag, code = SERVICES["gateway"]["healthcheck"]["test"]
    assert (python, flag) == ("python", "-c")

    def is_healthy() -> bool:
        try:
            exec(code.replace(":8000", f":{port}"), {"r": urllib.request})
        except OSError:
            return False
        return True

    wait_until(is_healthy, 60, "a healthy gateway")
    assert gateway.stop(60) == 0
    assert worker.stop(60) == 0


def test_replicas_on_one_host_take_a_gpu_each(tmp_path: Path) -> None:
    gpus = [Gpu(n, f"GPU-{n}", "H", 1 << 34, 1 << 33, (9, 0)) for n in range(2)]
    with claimed_gpu(tmp_path, gpus) as first, claimed_gpu(tmp_path, gpus) as second:
        assert {first.index, second.index} == {0, 1}
        with pytest.raises(ConfigError, match="2 found"), claimed_gpu(tmp_path, gpus):
            pass
    with claimed_gpu(tmp_path, gpus) as again:
        assert again.index == 0
