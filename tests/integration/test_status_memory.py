"""What ``vecfleet status`` says of Redis's memory, and of limits that do not fit into it."""

from __future__ import annotations

import json
import subprocess

import pytest
from servers import DEADLINE_S

from vecfleet.common.admission import Admission
from vecfleet.common.redis_client import connect
from vecfleet.common.settings import Settings, process_environment
from vecfleet.fleet.process import role_command
from vecfleet.fleet.up import redis_memory_bytes

LEAST = Admission().most_bytes(0)  # without any model


def status(url: str, *options: str) -> str:
    done = subprocess.run(
        role_command("status", *options),
        env=process_environment(VECFLEET_REDIS_URL=url),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S * 2,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("most", "says"),
    [(0, "without maxmemory"), (LEAST - 1, "more wait than maxmemory"), (LEAST + 1, "")],
)
def test_limits_that_do_not_fit_are_told(redis_server_factory, most, says):
    url = redis_server_factory(append_only=False).url
    with connect(url) as client:
        client.config_set("maxmemory", most)
    told = status(url)
    assert "limits let wait" in told
    for line in ("without maxmemory", "more wait than maxmemory"):
        assert (line in told) == (line == says)
    memory = json.loads(status(url, "--json"))["redis"]
    assert (memory["max_bytes"], memory["limits_bytes"]) == (most, LEAST)
    assert memory["used_bytes"] > 0


def test_who_may_not_ask_sees_the_rest(redis_server_factory):
    url = redis_server_factory(append_only=False).url
    with connect(url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-info")
    told = status(url)
    assert "Queues" in told
    assert "limits let wait" not in told
    assert json.loads(status(url, "--json"))["redis"] is None


@pytest.mark.parametrize(("settings", "lines"), [({}, 4), ({"reranker": "another"}, 6)])
def test_the_redis_of_up_has_room_for_what_its_limits_let_wait(settings, lines):
    most = redis_memory_bytes(Settings.checked(settings), 1 << 40)
    assert most == Admission().most_bytes(lines) * 3 // 2
    assert redis_memory_bytes(Settings.checked(settings), 1 << 30) == 1 << 29
