"""Nothing that comes in is run, followed or fetched: canaries in every place that takes data."""

from __future__ import annotations

import base64
import json
import os
import pickle
import socket
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from rq import Queue
from rq.job import Callback
from servers import RQ, Process, wait_until

from vecfleet.common import codec, keys, payloads
from vecfleet.common.redis_client import connect
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import free_port

MODULE = "canary_module"


class Evil:
    """A pickle of it makes the canary file where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


class Fleet:
    """All roles as processes that could import the canary's module, if anything made them."""

    def __init__(self, run_role: Callable[..., Process], redis_url: str, folder: Path) -> None:
        self.redis_url, self.data = redis_url, folder / "data"
        self.canary = folder / "canary"
        modules = folder / "modules"
        modules.mkdir()
        touch = f"import pathlib; pathlib.Path({str(self.canary)!r}).touch()\n"
        (modules / f"{MODULE}.py").write_text(touch + "def sing(*a, **k): pass\n" + touch)
        self.environment = {
            "VECFLEET_REDIS_URL": redis_url,
            "VECFLEET_ENGINE": "fake",
            "VECFLEET_DATA": str(self.data),
            "PYTHONPATH": str(modules),
        }
        port = free_port()
        self.roles = [
            run_role(*arguments, env=self.environment)
            for arguments in (
                ("aggregator",),
                ("worker",),
                ("gateway", "--port", str(port), "--no-keys"),
            )
        ]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self.redis = connect(redis_url)
        wait_until(lambda: self.status("GET", "/health") == 200, 60, "a healthy gateway")
        wait_until(lambda: self.status("PUT", "/collections/books") == 201, 30, "a collection")
        self.uid = self.http.get("/collections/books").json()["uid"]
        (self.space,) = {c["space"] for c in self.http.get("/collections").json()["collections"]}

    def status(self, method: str, path: str, **options: Any) -> int:
        try:
            return self.http.request(method, path, **options).status_code
        except httpx.TransportError:
            return 0

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            role_command(*arguments),
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def queues(self) -> list[keys.QueueName]:
        return [
            keys.embed_queue(self.space, "bulk"),
            keys.embed_queue(self.space, "interactive"),
            keys.rerank_queue(self.space, "interactive"),
            keys.merge_queue(self.uid),
            keys.search_queue(),
            keys.catalog_queue(),
        ]

    def is_idle(self) -> bool:
        return not any(
            self.redis.llen(keys.queue_list(queue)) or self.redis.zcard(keys.lease(queue))
            for queue in self.queues()
        )

    def still_works(self) -> None:
        sent = self.http.post("/collections/books/documents", json={"id": "a", "text": "a text"})
        assert sent.status_code == 202, sent.text
        path = f"/submissions/{sent.json()['submission_id']}"
        wait_until(lambda: self.http.get(path).json().get("state") == "done", what="a submission")
        found = self.http.post("/collections/books/search", json={"query": "a text"})
        assert [hit["id"] for hit in found.json()["results"]][:1] == ["a"]
        assert all(role.running() for role in self.roles)


@pytest.fixture
def fleet(run_role: Callable[..., Process], redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(run_role, redis_url, tmp_path)
    yield fleet
    fleet.http.close()
    fleet.redis.close()


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """A harness that could not fail would prove nothing."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_no_function_of_a_job_is_found_by_name(fleet: Fleet) -> None:
    touch = f"touch {fleet.canary}"
    calls: list[tuple[str, tuple[Any, ...]]] = [
        (f"{MODULE}.sing", ({},)),
        (f"{MODULE}.sing", ()),
        ("os.system", (touch,)),
        ("subprocess.getoutput", (touch,)),
        ("builtins.exec", (f"__import__('os').system({touch!r})",)),
        ("builtins.eval", (f"__import__('os').system({touch!r})",)),
        ("vecfleet.common.codec.loads", (b"\x90",)),
        (f"vecfleet.embed;{MODULE}.sing", ({},)),
        ("", ({},)),
        ("__reduce__", ({},)),
    ]
    jobs = [
        Queue(str(queue), connection=fleet.redis, serializer=codec.Serializer).enqueue_call(
            function, arguments
        )
        for queue in fleet.queues()
        for function, arguments in calls
    ]
    method = codec.dumps(["sing", MODULE, [{}], {}])  # of an instance, in RQ's form
    for job in jobs[-3:]:
        fleet.redis.hset(f"rq:job:{job.id}", "data", method)
    wait_until(fleet.is_idle, 60, "all jobs to be settled")
    for queue in fleet.queues():
        assert fleet.redis.zcard(f"rq:failed:{queue}") == len(calls), queue
    assert not fleet.canary.exists()
    fleet.still_works()


def test_callbacks_and_pickles_of_jobs_are_never_looked_at(fleet: Fleet) -> None:
    evil = pickle.dumps(Evil(fleet.canary))
    song = Callback(f"{MODULE}.sing")
    good = {"texts": ["a"]}
    for queue in fleet.queues():
        stock = Queue(str(queue), connection=fleet.redis, serializer=codec.Serializer)
        for payload in (good, {"wrong": True}):
            stock.enqueue(
                payloads.EMBED, payload, on_success=song, on_failure=song, on_stopped=song
            )
        for number, data in enumerate(
            (evil, zlib.compress(evil), base64.b64encode(evil), codec.dumps(evil))
        ):
            job_id = f"evil-{number}-{queue.task}-{queue.lane}"
            fields: dict[str, bytes | str] = {
                "data": data,
                "meta": zlib.compress(evil),
                "result": evil,
                "exc_info": evil,
                "origin": str(queue),
                "status": "queued",
                "success_callback_name": f"{MODULE}.sing",
                "failure_callback_name": f"{MODULE}.sing",
                "stopped_callback_name": f"{MODULE}.sing",
                "dependency_ids": evil,
                "serializer": f"{MODULE}.sing",
                "worker_name": evil,
                "timeout": evil,
                "result_ttl": evil,
            }
            fleet.redis.hset(f"rq:job:{job_id}", mapping=fields)  # type: ignore[arg-type]
            fleet.redis.rpush(keys.queue_list(queue), job_id)
        fleet.redis.rpush(keys.bell(queue), "1")
    wait_until(fleet.is_idle, 60, "all jobs to be settled")
    assert fleet.command("status").returncode == 0
    assert not fleet.canary.exists()
    fleet.still_works()


def test_pickles_in_what_roles_tell_each_other_are_not_loaded(fleet: Fleet) -> None:
    """Whatever comes of it: an error that is no server's fault, or nothing; never the canary."""
    client, evil = fleet.redis, pickle.dumps(Evil(fleet.canary))
    packed = zlib.compress(evil)
    client.hset(keys.collections(), "evil", evil)
    client.set(keys.model("evil"), evil, ex=60)
    client.zadd(keys.MODELS, {"evil": 9e15})
    client.hset(
        keys.submission("e" * 32), mapping={"state": "open", "created_ms": 1, "tenant": "-"}
    )
    client.rpush(f"{keys.submission('e' * 32)}:errors", evil, packed)
    client.hset("rq:worker:evil", mapping={"current_job": evil, "queues": evil})
    client.hset(keys.worker("evil"), mapping={"paused": evil, "model": packed})
    client.sadd("rq:workers", "rq:worker:evil")
    for alive in client.scan_iter("vf:alive:*"):
        box = alive.decode().removeprefix("vf:alive:")
        for reply in (evil, packed, codec.dumps(["x", "ok", evil]), codec.dumps([evil])):
            client.rpush(keys.reply(box), reply)
    for method, path, body in (
        ("GET", "/health", None),
        ("GET", "/metrics", None),
        ("GET", "/v1/models", None),
        ("GET", "/collections", None),
        ("GET", "/collections/evil", None),
        ("POST", "/collections/evil/search", {"query": "a"}),
        ("POST", "/collections/evil/documents", {"id": "a", "text": "b"}),
        ("GET", f"/submissions/{'e' * 32}", None),
        ("DELETE", f"/submissions/{'e' * 32}", None),
        ("POST", "/embed", {"inputs": "a"}),
    ):
        assert 0 < fleet.status(method, path, json=body) < 500, (method, path)
    for command in (("status",), ("collections", "list"), ("search", "a", "-c", "evil")):
        fleet.command(*command)
    subprocess.run([str(RQ), "info", "--url", fleet.redis_url], capture_output=True, timeout=60)
    assert not fleet.canary.exists()
    client.hdel(keys.collections(), "evil")
    client.delete(keys.model("evil"), "rq:worker:evil", keys.worker("evil"))
    client.zrem(keys.MODELS, "evil")
    client.srem("rq:workers", "rq:worker:evil")
    wait_until(lambda: fleet.status("GET", "/health") == 200, 60, "a healthy gateway")
    fleet.still_works()


BAD_NAMES = [
    "..",
    ".",
    "...",
    ".hidden",
    "../escape",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a b",
    "",
    "x" * 65,
    "．．／escape",  # full-width full stops and slash
    "bооks",  # Cyrillic o
    "bo\u200boks",
    "\u202eskoob",
    "books\u0301",
    "~",
    "$HOME",
    "%2e%2e",
    "CON:",
]


def test_collections_are_named_strictly_and_kept_under_opaque_names(
    fleet: Fleet, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    index = fleet.data / "index"
    for name in ("linked", "books2"):
        (index / name).symlink_to(outside)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in BAD_NAMES:
        quoted = "".join(f"%{byte:02x}" for byte in name.encode())
        for method, tail in (("PUT", ""), ("GET", ""), ("DELETE", ""), ("POST", "/documents")):
            status = fleet.status(method, f"/collections/{quoted}{tail}", json={})
            assert status in (400, 404, 405), (name, method, status)
        for function in (payloads.CREATE, payloads.DELETE):
            spec = {"model": "fake", "space": fleet.space, "dimension": 32}
            Queue(
                str(keys.catalog_queue()), connection=fleet.redis, serializer=codec.Serializer
            ).enqueue(function, {"name": name, "tenant": "-", "spec": spec})
    stock = Queue(str(keys.search_queue()), connection=fleet.redis, serializer=codec.Serializer)
    for uid in ("..", "../..", str(outside), "linked", "a/../b", "a\0", "e" * 31 + "/", None, 7):
        for function in (payloads.SEARCH, payloads.STATS, payloads.GET):
            stock.enqueue(function, {"uid": uid, "vectors": b"", "ids": ["a"], "top_k": 1})
    wait_until(fleet.is_idle, 60, "all jobs to be settled")
    assert fleet.status("PUT", "/collections/linked") == 201
    fleet.still_works()
    folders = {path.name for path in index.iterdir() if path.is_dir() and not path.is_symlink()}
    assert fleet.uid in folders
    assert len(folders) == 2
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in folders), folders
    assert list(outside.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    listed = fleet.http.get("/collections").json()["collections"]
    assert {entry["name"] for entry in listed} == {"books", "linked"}


class Listener:
    """A server that only counts who comes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.visits = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:
                return
            self.visits += 1
            visitor.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def test_no_url_in_data_is_fetched(fleet: Fleet, listener: Listener, tmp_path: Path) -> None:
    place = f"127.0.0.1:{listener.port}"
    urls = [f"{scheme}://{place}/x" for scheme in ("http", "https", "redis", "ftp", "ldap")]
    urls += [f"//{place}/x", f"<img src='http://{place}/x'>", f"${{jndi:ldap://{place}/x}}"]
    headers = {
        "referer": urls[0],
        "x-forwarded-host": place,
        "x-forwarded-for": place,
        "forwarded": f"host={place}",
        "x-callback": urls[0],
    }
    page = {"origin": urls[0]}  # of another site, which a gateway without keys does not answer
    assert fleet.status("POST", "/embed", json={"inputs": "a"}, headers=page) == 403
    for number, url in enumerate(urls):
        nested = {"url": url, "$ref": url, "callback": [url], "nested": {"href": url}}
        row = {"id": url, "text": url, "metadata": nested}
        key = {"idempotency-key": url}
        sent = fleet.http.post("/collections/books/documents", json=row, headers={**headers, **key})
        assert sent.status_code == 202, sent.text
        path = f"/submissions/{sent.json()['submission_id']}"
        wait_until(lambda at=path: fleet.http.get(at).json()["state"] == "done")  # type: ignore[misc]
        found = fleet.http.post("/collections/books/search", json={"query": url, "rerank": True})
        assert url in {hit["id"] for hit in found.json()["results"]}
        read = fleet.http.get(f"/collections/books/documents/{number}")
        assert read.status_code == 404
        for path, body in (
            ("/v1/embeddings", {"input": url, "model": url}),
            ("/v1/embeddings", {"input": url, "user": url}),
            ("/embed", {"inputs": [url], "prompt_name": url}),
            ("/rerank", {"query": url, "texts": [url]}),
            ("/v1/rerank", {"query": url, "documents": [{"text": url}], "model": url}),
            ("/collections/books/search", {"query": url, "rerank": {"model": url}}),
        ):
            assert fleet.status("POST", path, json=body, headers=headers) in (200, 400, 404, 422)
        quoted = "".join(f"%{byte:02x}" for byte in url.encode())
        assert fleet.status("PUT", f"/collections/{quoted}") in (400, 404, 405)
        assert fleet.status("GET", f"/v1/models/{quoted}") == 404
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"id": u, "text": u, "url": u}) for u in urls))
    assert fleet.command("ingest", str(rows), "-c", "books").returncode in (0, 1)
    assert fleet.command("search", urls[0], "-c", "books").returncode == 0
    assert fleet.command("embed", urls[0]).returncode == 0
    assert listener.visits == 0
    with redis.Redis(port=listener.port, retry=None) as visitor, pytest.raises(Exception):  # noqa: B017
        visitor.ping()
    assert listener.visits > 0, "it does count"
