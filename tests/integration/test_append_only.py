"""Redis's file after a power cut: half a transaction is never carried out, at no later start."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from servers import wait_until

from vecfleet.fleet.append_only import make_whole
from vecfleet.fleet.redis_server import RedisBinary, RedisServer

START = Path(__file__).parents[2] / "deploy" / "redis" / "start.sh"
CLAIM = """
redis.call('LPOP', 'queue')
redis.call('HSET', 'job', 'status', 'started')
redis.call('ZADD', 'lease', 1, 'job')
"""


def growing_file(data: Path) -> Path:
    """The file that Redis appends to: of 6.2, or the increment of 7."""
    return next(iter(data.glob("appendonlydir/*.incr.aof")), data / "appendonly.aof")


@pytest.fixture
def server(tmp_path: Path, each_redis_binary: RedisBinary) -> RedisServer:
    return RedisServer(tmp_path, binary=each_redis_binary, extra=["--appendfsync", "always"])


def written(server: RedisServer) -> tuple[bytes, int]:
    """A file with a job in a queue and its claim, and where the claim begins."""
    with server, server.client() as client:
        client.rpush("queue", "a job")
        begin = growing_file(server.data_dir).stat().st_size
        client.eval(CLAIM, 0)
        server.kill()
    return growing_file(server.data_dir).read_bytes(), begin


def state(server: RedisServer) -> tuple[list[bytes], int, bytes | None]:
    with server, server.client() as client:
        found = client.lrange("queue", 0, -1), client.exists("job", "lease"), client.get("later")
        client.set("later", "kept")
        server.kill()
    return found


@pytest.mark.parametrize("offset", [1, 3, 8, 11, 14, 15, 16, 20, 23, 40, 59, 100, -1])
def test_a_claim_that_was_cut_off_never_happened(server: RedisServer, offset: int) -> None:
    raw, begin = written(server)
    file = growing_file(server.data_dir)
    file.write_bytes(raw[: begin + offset] if offset > 0 else raw[:offset])
    assert state(server) == ([b"a job"], 0, None)
    assert state(server) == ([b"a job"], 0, b"kept"), "and what was written since is kept"


def test_a_whole_file_stays_as_it_is(server: RedisServer) -> None:
    raw, _ = written(server)
    assert make_whole(server.binary.path, server.data_dir) == 0
    assert growing_file(server.data_dir).read_bytes() == raw
    assert make_whole(server.binary.path, server.data_dir / "nowhere") == 0


@pytest.mark.parametrize("junk", [b"junk that is no command", b"\x00" * 40, b"*2\r\n$3\r\nGETxx"])
def test_a_damaged_file_is_left_for_redis_to_refuse(server: RedisServer, junk: bytes) -> None:
    raw, begin = written(server)
    file = growing_file(server.data_dir)
    file.write_bytes(raw[:begin] + junk + raw[begin:])
    assert make_whole(server.binary.path, server.data_dir) == 0
    assert file.read_bytes() == raw[:begin] + junk + raw[begin:]


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_what_is_wrong_with_the_base_is_left_for_redis_to_refuse(
    server: RedisServer, damage: str
) -> None:
    with server, server.client() as client:
        client.mset({f"key-{n}": "v" * 50 for n in range(200)})
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        wait_until(lambda: not client.info("persistence")["aof_rewrite_scheduled"])
        client.set("later", "x")
    bases = sorted(server.data_dir.glob("appendonlydir/*.base.*"))
    base = bases[-1] if bases else server.data_dir / "appendonly.aof"
    raw = base.read_bytes()
    if damage == "gone":
        base.unlink()
    elif damage == "cut":
        base.write_bytes(raw[: len(raw) // 3])
    else:
        base.write_bytes(raw[: len(raw) // 3] + b"\x55" + raw[len(raw) // 3 + 1 :])
    before = {path: path.read_bytes() for path in server.data_dir.rglob("*.aof")}
    assert make_whole(server.binary.path, server.data_dir) == 0
    assert {path: path.read_bytes() for path in server.data_dir.rglob("*.aof")} == before


@pytest.mark.parametrize(
    ("offset", "told"), [(3, "conf"), (11, "conf"), (16, "conf"), (16, "option"), (40, "option")]
)
def test_the_deployments_start_does_the_same(
    server: RedisServer, tmp_path: Path, offset: int, told: str
) -> None:
    """Whether its folder is told in redis.conf or by an option."""
    raw, begin = written(server)
    file = growing_file(server.data_dir)
    deploy = tmp_path / "deploy"
    shutil.copytree(START.parent, deploy)
    options = []
    if told == "conf":
        conf = deploy / "redis.conf"
        conf.write_text(conf.read_text().replace("dir /data", f"dir {server.data_dir}"))
    else:
        options = ["--dir", str(tmp_path), "--port", "1", "--DIR", str(server.data_dir)]
    (tmp_path / "passwords").mkdir()
    tool = tmp_path / "redis-check-aof"  # the server's program under its other name
    tool.symlink_to(server.binary.path)

    def start() -> str:
        done = subprocess.run(
            [deploy / "start.sh", tmp_path / "passwords", *options],
            env={
                "PATH": "/usr/bin:/bin",
                "REDIS_SERVER": "true",
                "REDIS_CHECK_AOF": str(tool),
                "ACL_FILE": str(tmp_path / "users.acl"),
            },
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    file.write_bytes(raw[: begin + offset])
    assert "half a transaction" in start()
    assert file.read_bytes() == raw[:begin]
    assert start() == ""
    file.write_bytes(raw[:begin] + b"junk that is no command" + raw[begin:])
    assert start() == ""
    assert file.stat().st_size > len(raw)
