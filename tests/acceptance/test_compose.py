"""The compose file: valid, unprivileged, and made of commands that run here as processes."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from acl_redis import AclRedis, users
from servers import Process, process_exists, wait_until

from vecfleet.common.errors import ConfigError
from vecfleet.common.redis_client import connect
from vecfleet.fleet.machine import claimed_gpu
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import RedisBinary, free_port
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
    assert set(SERVICES) == {"redis", "gateway", "aggregator", "worker", "keys"}


TOOLS = [name for name, service in SERVICES.items() if "profiles" in service]
LASTING = [name for name in SERVICES if name not in TOOLS]


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    if name in OURS:
        last_stage = dockerfile(service).rpartition("\nFROM ")[2]
        user = re.findall(r"^USER (\S+)$", last_stage, re.MULTILINE)[-1]
    elif name in TOOLS:
        user = "the gateway's"
        assert service["image"] == SERVICES["gateway"]["image"]
    else:
        user = service["user"]
    assert user not in ("root", "0")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", LASTING)
def test_every_service_is_watched_restarted_and_drained(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]
    for volume in service.get("volumes", []):
        source, _, how = volume.partition(":")
        assert source in COMPOSE["volumes"] or ((ROOT / source).is_dir() and how.endswith(":ro"))


def test_redis_can_be_reached_from_inside_alone_and_keeps_its_data() -> None:
    assert "ports" not in SERVICES["redis"]
    assert "redis:/data" in SERVICES["redis"]["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_a_role_has_its_own_password_and_no_other(name: str) -> None:
    service = SERVICES[name]
    environment = service["environment"]
    assert service["secrets"] == [f"redis_{name}"]
    assert environment["VECFLEET_REDIS_URL"] == f"redis://{name}@redis:6379/0"
    assert environment["VECFLEET_REDIS_PASSWORD_FILE"] == f"/run/secrets/redis_{name}"


def test_redis_has_the_passwords_of_its_users_and_git_has_none() -> None:
    names = {f"redis_{user}" for user in users() if user != "default"}
    assert set(SERVICES["redis"]["secrets"]) == set(COMPOSE["secrets"]) == names
    for name, secret in COMPOSE["secrets"].items():
        assert secret["file"] == f"./secrets/redis/{name.removeprefix('redis_')}"
    assert "secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    assert let_in[0] == "*"
    assert "!secrets" not in let_in


def test_the_gateway_may_read_the_keys_and_the_tool_alone_may_write_them() -> None:
    gateway, tool = SERVICES["gateway"], SERVICES["keys"]
    assert "keys:/keys:ro" in gateway["volumes"]
    assert tool["volumes"] == ["keys:/keys"]
    assert gateway["environment"]["VECFLEET_KEYS_FILE"] == tool["environment"]["VECFLEET_KEYS_FILE"]
    assert "--no-keys" not in gateway["command"]


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
def test_its_command_runs_here(name: str, tmp_path: Path) -> None:
    command, *arguments = SERVICES[name]["command"]
    assert command == "vecfleet"
    assert role_command(*arguments)[-len(arguments) :] == arguments
    environment = {**os.environ, "VECFLEET_KEYS_FILE": str(tmp_path / "keys.json")}

    def check() -> subprocess.CompletedProcess[str]:
        run = role_command(*map(expanded, arguments), "--check")
        return subprocess.run(run, capture_output=True, text=True, env=environment)

    if name == "gateway":
        assert check().returncode == 2, "without keys it does not start"
        made = role_command(*SERVICES["keys"]["entrypoint"][1:], "create", "--scopes", "embed")
        subprocess.run(made, env=environment, check=True, capture_output=True)
    done = check()
    assert done.returncode == 0, done.stderr
    assert "settings and installation are good" in done.stdout


def test_redis_starts_with_the_services_command(
    tmp_path: Path, each_redis_binary: RedisBinary
) -> None:
    command, folder, *options = SERVICES["redis"]["command"]
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["redis"]["volumes"])
    assert command == f"{mounted['./deploy/redis']}/start.sh"
    assert folder == "/run/secrets"
    server = AclRedis(tmp_path, each_redis_binary, *map(expanded, options))
    try:
        with server.client("admin") as client:
            config = client.config_get("*")
    finally:
        server.stop()
    assert config["maxmemory"] == str(4 << 30)
    assert config["maxmemory-policy"] == "noeviction"
    assert config["appendonly"] == "yes"
    assert config["protected-mode"] == "yes"
    assert config["stream-node-max-bytes"] == "256"


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
    gateway = run_role("gateway", "--port", str(port), "--no-keys", env=environment)
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
