"""``vecfleet keys``, and doors that stay shut until there are keys: as a person meets them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from servers import Process, wait_until

from vecfleet.common.errors import ConfigError
from vecfleet.fleet.keys_command import seconds_of
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import free_port

RunRole = Callable[..., Process]


def vecfleet(*arguments: str, data: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        role_command(*arguments),
        env={**os.environ, "VECFLEET_DATA": str(data), **extra},
        capture_output=True,
        text=True,
        timeout=60,
    )


def create(data: Path, *arguments: str) -> str:
    done = vecfleet("keys", "create", *arguments, data=data)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_key_is_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    done = vecfleet(
        "keys", "create", "--tenant", "acme", "--scopes", "embed,search", "--expires", "90d",
        "--note", "the web shop", data=tmp_path,
    )  # fmt: skip
    key = done.stdout.strip()
    assert done.returncode == 0
    assert "\n" not in key, "alone on standard output, for $(…)"
    secret = key.split("_")[2]
    assert secret not in done.stderr
    listed = vecfleet("keys", "list", "--json", data=tmp_path)
    (entry,) = json.loads(listed.stdout)["keys"]
    assert (entry["tenant"], entry["scopes"]) == ("acme", ["embed", "search"])
    assert entry["expires_at"] - entry["created_at"] in range(90 * 86400 - 1, 90 * 86400 + 2)
    table = vecfleet("keys", "list", data=tmp_path, COLUMNS="200").stdout
    assert "the web shop" in table
    for shown in (listed.stdout, table, (tmp_path / "keys.json").read_text()):
        assert secret not in shown
    refused = vecfleet("keys", "revoke", key, data=tmp_path)
    assert refused.returncode == 2
    assert secret not in refused.stderr
    assert vecfleet("keys", "revoke", entry["id"], data=tmp_path).returncode == 0
    assert vecfleet("keys", "revoke", entry["id"], data=tmp_path).returncode == 4
    assert "no keys" in vecfleet("keys", "list", data=tmp_path).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--scopes", ""),
        ("--scopes", "embed,root"),
        ("--scopes", "embed", "--tenant", "../x"),
        ("--scopes", "embed", "--expires", "soon"),
        ("--scopes", "embed", "--expires", "0d"),
        ("--scopes", "embed", "--note", "two\nlines"),
    ],
)
def test_a_wrong_wish_makes_no_key(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = vecfleet("keys", "create", *arguments, data=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert not (tmp_path / "keys.json").exists()


def test_two_commands_at_once_lose_no_key(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            role_command("keys", "create", "--scopes", "embed"),
            env={**os.environ, "VECFLEET_DATA": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(6)
    ]
    shown = {process.communicate(timeout=60)[0] for process in running}
    listed = json.loads(vecfleet("keys", "list", "--json", data=tmp_path).stdout)["keys"]
    assert len(shown) == len(listed) == 6


def test_durations() -> None:
    assert [seconds_of(d) for d in ("45s", "30m", "12h", "90d")] == [45, 1800, 43200, 7776000]
    for wrong in ("", "90", "d", "-1d", "1w", "1.5h", "01d"):
        with pytest.raises(ConfigError):
            seconds_of(wrong)


@pytest.mark.parametrize(
    ("command", "host"),
    [
        ("gateway", "0.0.0.0"),
        ("gateway", "::"),
        ("gateway", "127.0.0.1"),  # a proxy may stand before it
        ("gateway", "localhost"),
        ("up", "0.0.0.0"),
        ("up", "::"),
    ],
)
def test_an_open_door_refuses_to_open_and_says_why_in_a_line(
    command: str, host: str, tmp_path: Path
) -> None:
    done = vecfleet(command, "--host", host, "--port", str(free_port()), data=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "vecfleet keys create" in line
    assert "--no-keys" in line


def test_a_gateway_for_others_asks_for_keys_and_follows_the_file(
    tmp_path: Path, redis_url: str, run_role: RunRole
) -> None:
    first = create(tmp_path, "--scopes", "search")
    port = free_port()
    environment = {"VECFLEET_REDIS_URL": redis_url, "VECFLEET_DATA": str(tmp_path)}
    gateway = run_role("gateway", "--host", "0.0.0.0", "--port", str(port), env=environment)
    gateway.wait_for_line("listens on")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

        def status(key: str) -> int:
            return http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

        assert http.get("/v1/models").status_code == 401
        assert http.get("/live").status_code == 200
        assert status(first) == 200
        second = create(tmp_path, "--scopes", "search")
        wait_until(lambda: status(second) == 200, what="the new key")
        vecfleet("keys", "revoke", first.split("_")[1], data=tmp_path)
        wait_until(lambda: status(first) == 401, what="the old key's end")
        (tmp_path / "keys.json").write_text("{")
        told = "the API keys stay as they were"
        wait_until(lambda: status(second) == 200 and told in gateway.output, what="the line")
        assert status(second) == 200
        assert status(first) == 401
    assert gateway.stop() == 0
    for key in (first, second):
        assert key.split("_")[2] not in gateway.output


def test_a_key_file_that_is_missing_or_wrong_stops_the_start(
    tmp_path: Path, redis_url: str
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]")
    for file in (tmp_path / "none.json", wrong):
        done = vecfleet(
            "gateway", "--keys-file", str(file), "--redis", redis_url, data=tmp_path
        )  # fmt: skip
        assert done.returncode == 2
        assert str(file) in done.stderr


def test_behind_a_proxy_it_may_be_open_and_says_so(
    tmp_path: Path, redis_url: str, run_role: RunRole
) -> None:
    port = free_port()
    gateway = run_role(
        "gateway", "--host", "0.0.0.0", "--port", str(port), "--no-keys",
        env={"VECFLEET_REDIS_URL": redis_url, "VECFLEET_DATA": str(tmp_path)},
    )  # fmt: skip
    gateway.wait_for_line("no API keys are asked for")
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=30).status_code == 200
    assert gateway.stop() == 0


def test_up_asks_for_the_keys_in_its_folder(tmp_path: Path, run_role: RunRole) -> None:
    key = create(tmp_path, "--scopes", "embed", "--tenant", "-")
    port = free_port()
    up = run_role(
        "--log-format", "json", "up", "--data", str(tmp_path), "--port", str(port),
        "--engine", "null", "--host", "0.0.0.0",
    )  # fmt: skip
    up.wait_for_line("ready at ", 90)
    url = f"http://127.0.0.1:{port}/embed"
    body = {"inputs": "a"}
    assert httpx.post(url, json=body, timeout=30).status_code == 401
    key_header = {"x-api-key": key}
    assert httpx.post(url, json=body, headers=key_header, timeout=60).status_code == 200
    search = httpx.get(f"http://127.0.0.1:{port}/collections", headers=key_header, timeout=30)
    assert search.status_code == 403
    assert up.stop(60) == 0
    assert key.split("_")[2] not in up.output
