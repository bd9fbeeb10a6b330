"""The users of deploy/redis on real Redis servers: enough for every role, and no more."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis
from acl_redis import DEPLOY, AclRedis, users
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue
from servers import RQ, Process, wait_until

from vecfleet.common import codec, keys, payloads
from vecfleet.common.errors import Unavailable
from vecfleet.common.queue_client import NewJob, QueueClient, client_scripts
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import RedisBinary, free_port
from vecfleet.worker.ledger import Announcement, Ask, Ledger

ROOT = Path(__file__).parents[2]
NO_RETRY = Retry(NoBackoff(), 0)
ROLES = ("gateway", "producer", "worker", "aggregator", "search", "operator")
SCRIPT_USERS = {
    "common": ("gateway", "producer", "operator"),
    "worker": ("worker", "aggregator", "search"),
}
MAY_LOAD = ("worker", "aggregator", "search", "operator")

FORBIDDEN: list[tuple[str, ...]] = [
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "dir", "/tmp"),
    ("CONFIG", "REWRITE"),
    ("KEYS", "*"),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("SWAPDB", "0", "1"),
    ("MODULE", "LIST"),
    ("MODULE", "LOAD", "/tmp/x.so"),
    ("DEBUG", "SLEEP", "0"),
    ("DEBUG", "JMAP"),
    ("EVAL", "return 1", "0"),
    ("SCRIPT", "FLUSH"),
    ("SCRIPT", "KILL"),
    ("SHUTDOWN", "NOSAVE"),
    ("REPLICAOF", "127.0.0.1", "1"),
    ("SLAVEOF", "NO", "ONE"),
    ("FAILOVER",),
    ("SAVE",),
    ("BGSAVE",),
    ("BGREWRITEAOF",),
    ("MONITOR",),
    ("SYNC",),
    ("PSYNC", "?", "-1"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "default", "on", "nopass", "+@all", "~*"),
    ("ACL", "WHOAMI"),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("CLIENT", "PAUSE", "1"),
    ("SLOWLOG", "GET"),
    ("LATENCY", "RESET"),
    ("MEMORY", "DOCTOR"),
    ("CLUSTER", "INFO"),
    ("MIGRATE", "127.0.0.1", "1", "rq:queues", "0", "1"),
    ("RESTORE", "rq:x", "0", "x"),
    ("DUMP", "rq:queues"),
    ("OBJECT", "ENCODING", "rq:queues"),
    ("SORT", "rq:queues"),
    ("RENAME", "rq:a", "rq:b"),
    ("MOVE", "rq:a", "1"),
    ("COPY", "rq:a", "rq:b"),
    ("RANDOMKEY",),
    ("DBSIZE",),
    ("LASTSAVE",),
    ("ROLE",),
    ("WAIT", "0", "0"),
    ("SUBSCRIBE", "c"),
    ("PSUBSCRIBE", "*"),
    ("PUBLISH", "c", "x"),
]
FORBIDDEN_BUT_TO_OPERATORS = [("SCAN", "0"), ("INFO",)]
FORBIDDEN_SINCE_7 = [
    ("EVAL_RO", "return 1", "0"),
    ("FUNCTION", "LIST"),
    ("FUNCTION", "FLUSH"),
    ("FCALL", "f", "0"),
]
FOREIGN_KEYS = [("GET", "other"), ("SET", "session:1", "x"), ("DEL", "rq"), ("HGETALL", "vg:x")]


@pytest.fixture
def server(each_redis_binary: RedisBinary, tmp_path: Path) -> Iterator[AclRedis]:
    server = AclRedis(tmp_path, each_redis_binary)
    yield server
    server.stop()


def is_denied(client: redis.Redis, command: tuple[str, ...]) -> bool:
    try:
        client.execute_command(*command)
    except redis.exceptions.NoPermissionError:
        return True
    except redis.exceptions.ResponseError as error:
        # Redis 7 refuses DEBUG and MODULE to everybody, before it looks at the user.
        return any(word in str(error) for word in ("NOPERM", "no permissions", "not allowed"))
    return False


@pytest.mark.parametrize("role", ROLES)
def test_no_role_may_run_a_forbidden_command(
    server: AclRedis, role: str, each_redis_binary: RedisBinary
) -> None:
    forbidden = FORBIDDEN + ([] if role == "operator" else FORBIDDEN_BUT_TO_OPERATORS)
    if role not in MAY_LOAD:
        forbidden = [*forbidden, ("SCRIPT", "LOAD", "return 1")]
    if each_redis_binary.version >= (7,):
        forbidden = [*forbidden, *FORBIDDEN_SINCE_7]
    with server.client(role) as client:
        allowed = [c for c in forbidden + FOREIGN_KEYS if not is_denied(client, c)]
        assert allowed == []
        assert client.ping()


@pytest.mark.parametrize("role", ROLES)
def test_a_script_reaches_no_further_than_its_caller(server: AclRedis, role: str) -> None:
    with server.client("worker") as worker:
        reads = worker.script_load("return redis.call('GET', 'other')")
        flushes = worker.script_load("return redis.call('FLUSHALL')")
        configures = worker.script_load("return redis.call('CONFIG', 'GET', '*')")
    with server.client("admin") as admin:
        admin.set("other", "secret")
    with server.client(role) as client:
        for sha in (reads, flushes, configures):
            with pytest.raises(redis.exceptions.ResponseError):
                client.evalsha(sha, 0)
    with server.client("admin") as admin:
        assert admin.get("other") == b"secret"


def test_nobody_gets_in_without_a_password(server: AclRedis) -> None:
    for login in (
        {},
        {"password": ""},
        {"password": "x"},
        {"username": "default", "password": ""},
        {"username": "gateway", "password": ""},
        {"username": "gateway", "password": server.password("worker")},
        {"username": "nobody", "password": server.password("worker")},
    ):
        with (
            redis.Redis(port=server.port, retry=NO_RETRY, **login) as client,
            pytest.raises((redis.exceptions.AuthenticationError, redis.exceptions.ResponseError)),
        ):
            client.get("rq:queues")


def test_a_user_without_a_password_file_cannot_log_in(
    tmp_path: Path, redis_binary: RedisBinary
) -> None:
    text = (DEPLOY / "users.acl").read_text()
    assert "nopass" not in text
    assert not re.search(r"(^|\s)[>#<!][^\s]*", text.replace("# ", "")), "no password in the file"


@pytest.mark.parametrize("is_named", [True, False])
def test_the_file_of_the_users_is_nobody_elses(tmp_path: Path, is_named: bool) -> None:
    """Somebody has put a link where the file was always, or where it shall be."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "users.acl").symlink_to(victim)
    (tmp_path / "data").mkdir()
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    conf = tmp_path / "deploy" / "redis.conf"
    conf.write_text(conf.read_text().replace("dir /data", f"dir {tmp_path / 'data'}"))
    subprocess.run([str(DEPLOY / "passwords.sh"), str(tmp_path / "passwords")], check=True)
    environment = {**os.environ, "REDIS_SERVER": "/bin/echo", "TMPDIR": str(tmp_path)}
    if is_named:
        environment["ACL_FILE"] = str(tmp_path / "users.acl")
    done = subprocess.run(
        [str(tmp_path / "deploy" / "start.sh"), str(tmp_path / "passwords")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    file = Path(done.stdout.split("--aclfile ")[1].split()[0])
    assert victim.read_text() == "precious"
    assert "user worker on #" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    if not is_named:
        assert file.parent.parent == tmp_path
        assert file.parent.stat().st_mode & 0o777 == 0o700


def commands_of(path: Path) -> set[str]:
    return {name.lower() for name in re.findall(r"'([A-Z]{3,})'", path.read_text())}


@pytest.mark.parametrize("folder", SCRIPT_USERS)
def test_users_may_run_what_their_scripts_run(folder: str) -> None:
    known = {"nx", "xx", "limit", "withscores", "maxlen", "byscore", "rev"}
    known |= {"incrby", "set", "get", "overflow"}
    for path in (ROOT / folder).glob("*.lua"):
        for role in SCRIPT_USERS[folder]:
            lacking = commands_of(path) - users()[role] - known
            assert not lacking, f"{role} lacks {lacking} for {path.name}"


CALLED_BY = {
    "gateway": ("common", "gateway"),
    "producer": ("common", "producer"),
    "worker": ("worker",),
    "aggregator": ("worker",),
    "search": ("worker",),
    "operator": ("common",),
}
OF_OTHERS = {"common": {"scan", "info"}, "worker": {"hkeys"}, "gateway": set(), "producer": set()}
# The first is for `vecfleet status`, the second for the writer.


@pytest.mark.parametrize("role", CALLED_BY)
def test_users_may_run_what_their_code_calls(server: AclRedis, role: str) -> None:
    with server.client("admin") as admin:
        commands = {str(name).lower() for name in admin.command()}
    called = set()
    for folder in CALLED_BY[role]:
        for path in (ROOT / folder).glob("*.py"):
            named = set(
                re.findall(r"\b(?:redis|pipe|client)\.([a-z]+)(?:_iter)?\(", path.read_text())
            )
            named = {"del" if name == "delete" else name for name in named}
            called |= (named & commands) - (OF_OTHERS[folder] if role != "operator" else set())
    assert len(called) > 3
    assert called <= users()[role], called - users()[role]


def test_what_the_users_may_is_written_in_the_open() -> None:
    assert set(users()) == {"default", *ROLES}
    assert users()["default"] == set()
    for role in ROLES:
        assert not [c for c in users()[role] if c.startswith("@")], "commands, not categories"
        assert ("script|load" in users()[role]) == (role in MAY_LOAD)


async def test_a_client_that_may_not_load_scripts_waits_for_a_worker(server: AclRedis) -> None:
    queue = keys.embed_queue("0" * 16, "bulk")
    job = NewJob("j1", codec.pack_call(payloads.EMBED, {"texts": ["a"]}), 1)
    async with connect_async(server.url("producer")) as client:
        queues = QueueClient(client)
        with pytest.raises(Unavailable, match="no worker"):
            await queues.enqueue(queue, [job])
        with server.client("worker") as worker:
            for script in client_scripts():
                worker.script_load(script)
        assert await queues.enqueue(queue, [job])


def vecfleet(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        role_command(*arguments),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_whole_path_with_each_process_under_its_own_user(
    server: AclRedis, run_role: Callable[..., Process], tmp_path: Path
) -> None:
    data = str(tmp_path / "index")
    port = free_port()
    quick = {"VECFLEET_ENGINE": "fake"}
    run = {
        "search": ("aggregator", "--data", data, "--only", "search"),
        "aggregator": ("aggregator", "--data", data, "--only", "writer"),
        "worker": ("worker", "--engine", "fake"),
        "gateway": ("gateway", "--port", str(port), "--no-keys"),
    }
    started = {
        user: run_role(*arguments, env={**quick, **server.environment(user)})
        for user, arguments in run.items()
    }
    producer, operator = server.environment("producer"), server.environment("operator")
    cwd = {"VECFLEET_DATA": str(tmp_path / "client")}
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def healthy() -> bool:
        try:
            return http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(healthy, 60, "a healthy gateway")

    def created() -> bool:
        return http.put("/collections/books").status_code == 201

    wait_until(created, 30, "a collection")
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"id": f"d{n}", "text": f"text {n}"}) for n in range(600)]
    rows.write_text("\n".join(lines))
    ingested = vecfleet("ingest", str(rows), "-c", "books", environment={**producer, **cwd})
    assert ingested.returncode == 0, ingested.stderr + ingested.stdout
    found = vecfleet("search", "text 7", "-c", "books", environment={**producer, **cwd})
    assert found.returncode == 0, found.stderr
    sent = http.post("/collections/books/documents", json={"id": "x", "text": "one more"}).json()
    submission = f"/submissions/{sent['submission_id']}"
    wait_until(lambda: http.get(submission).json()["state"] == "done", what="a submission")
    assert http.post("/collections/books/search", json={"query": "one more"}).status_code == 200
    assert http.post("/v1/rerank", json={"query": "a", "documents": ["a", "b"]}).status_code == 200
    assert http.delete("/collections/books/documents/x").status_code == 202
    assert http.get("/metrics").status_code == 200

    # What comes while it is stopped waits, and is cancelled while it does.
    started["worker"].signal(signal.SIGSTOP)
    try:
        row = {"id": "y", "text": "never"}
        waiting = http.post("/collections/books/documents", json=row).json()
        cancelled = http.delete(f"/submissions/{waiting['submission_id']}").json()
        assert cancelled["state"] == "cancelled"
        with pytest.raises(httpx.ReadTimeout):  # gone before it is answered: its job is cancelled
            http.post("/embed", json={"inputs": "a"}, timeout=0.5)
    finally:
        started["worker"].signal(signal.SIGCONT)

    poison = {"id": "p", "text": "[[poison]]"}
    for _ in range(2):
        assert http.post("/collections/books/documents", json=poison).status_code == 202
    dead = wait_until(
        lambda: len(d := http.get("/dead").json()["entries"]) == 2 and d, what="two dead"
    )
    first, second = (entry["id"] for entry in dead)
    assert http.get(f"/dead/{first}").status_code == 200
    retried = http.post(f"/dead/{first}/retry", json={"text": "as good as new"})
    assert retried.status_code == 202, retried.text
    wait_until(lambda: http.get("/collections/books/documents/p").status_code == 200)
    for command in (
        ("status",),
        ("status", "--json"),
        ("collections", "list"),
        ("dead", "list"),
        ("dead", "show", second),
        ("dead", "retry", second),
    ):
        told = vecfleet(*command, environment={**operator, **cwd})
        assert told.returncode == 0, told.stderr
    info = subprocess.run(
        [str(RQ), "info", "--url", server.url("operator")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert info.returncode == 0, info.stderr
    assert "vf.-.embed" in info.stdout
    assert vecfleet("health", environment=server.environment("worker")).returncode == 0
    assert http.delete("/collections/books").status_code == 200

    for user, process in started.items():
        assert process.stop(60) == 0, user
        assert "may not do that" not in process.output, process.output
    # RQ's own client says who it is; who may not load scripts asks once before a worker has.
    expected = {"operator: client"} | {
        f"{user}: {loading}"
        for user in ("gateway", "producer")
        for loading in ("script", "script|load")
    }
    assert set(server.denied()) <= expected
    with server.client("admin") as admin:
        left = [name.decode() for name in admin.scan_iter("rq:job:*")]
    assert [name for name in left if "-refused-" not in name] == [], "the dead letter alone is left"


@pytest.mark.parametrize("role", ["worker", "aggregator", "search"])
def test_each_script_of_a_worker_runs_under_its_user(server: AclRedis, role: str) -> None:
    """Claim, heartbeat, release, rescue and burial, as after deaths."""
    queue = keys.embed_queue("0" * 16, "bulk")
    with server.client("admin") as admin, connect(server.url(role)) as client:
        jobs = Queue(str(queue), connection=admin, serializer=codec.Serializer)
        job = jobs.enqueue(payloads.EMBED, {"texts": ["a"]})
        ledger = Ledger(client, "w1", lease_s=0.05)
        ledger.roster.register([queue])
        claimed = ledger.claim([Ask(queue, 10, 10_000)])
        ledger.heartbeat(claimed, Announcement(pools=(queue.pool,)))
        assert ledger.release(claimed) == 1
        for _ in range(20):
            ledger.claim([Ask(queue, 10, 10_000)])
            _, buried = wait_until(lambda: any(r := ledger.rescue([queue])) and r)
            if buried:
                break
        assert jobs.failed_job_registry.get_job_ids() == [job.id]
        ledger.roster.sweep([queue])
        ledger.roster.report(busy=False, succeeded=0, failed=1, busy_s=0.0)
        ledger.roster.unregister([queue], [queue.pool])
        assert server.denied() == []
