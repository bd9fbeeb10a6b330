"""No process says a secret: canaries go down every path that fails, and all output is read."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from acl_redis import AclRedis
from quoting_role import ERRORS
from servers import Process, wait_until

from vecfleet.common.api_keys import add_key, new_key
from vecfleet.common.codec import Serializer
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import RedisBinary, free_port

QUOTING = Path(__file__).parents[1] / "quoting_role.py"


class Watched:
    """A fleet at log level debug, and everything that any process of it has printed."""

    def __init__(self, redis: AclRedis, run_role: Callable[..., Process], folder: Path) -> None:
        self.redis, self.folder = redis, folder
        self.text = f"canary{secrets.token_hex(8)}"
        self.key, entry = new_key()
        add_key(folder / "keys.json", entry)
        self.said: list[str] = []
        port = free_port()
        self.processes = [
            run_role("--debug", "aggregator", env=self.environment("aggregator")),
            run_role(
                "--debug", "gateway", "--port", str(port), env=self.environment("gateway")
            ),
            Process([sys.executable, str(QUOTING)], env=self.environment("worker")),
        ]  # fmt: skip
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {self.key}"},
            timeout=30,
        )
        wait_until(lambda: self.status("GET", "/health") == 200, 60, "a healthy gateway")
        wait_until(lambda: self.status("PUT", "/collections/books") == 201, 30, "a collection")

    def environment(self, user: str) -> dict[str, str]:
        return {
            "VECFLEET_DATA": str(self.folder),
            "VECFLEET_LOG_LEVEL": "debug",
            "VECFLEET_API_KEY": self.key,
            **self.redis.environment(user),
        }

    def status(self, method: str, path: str, **options: object) -> int:
        try:
            return self.http.request(method, path, **options).status_code  # type: ignore[arg-type]
        except httpx.TransportError:
            return 0

    def command(self, *arguments: str, stdin: str = "", **extra: str) -> int:
        done = subprocess.run(
            role_command(*arguments),
            env={**os.environ, **self.environment("producer"), **extra},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.said.append(done.stdout + done.stderr)
        return done.returncode

    def everything(self) -> str:
        return "\n".join([*self.said, *(process.output for process in self.processes)])

    def secrets(self) -> list[str]:
        users = ("gateway", "producer", "worker", "aggregator", "search", "operator")
        return [
            self.text,
            self.key,
            self.key.split("_")[2],
            *(self.redis.password(user) for user in users),
        ]

    def check(self) -> None:
        said = self.everything()
        assert len(said) > 1000, "there is something to look at"
        for secret in self.secrets():
            place = said.find(secret)
            assert place < 0, said[max(0, place - 600) : place + 200]


@pytest.fixture
def watched(
    run_role: Callable[..., Process], redis_binary: RedisBinary, tmp_path: Path
) -> Iterator[Watched]:
    (tmp_path / "redis").mkdir()
    redis = AclRedis(tmp_path / "redis", redis_binary)
    watched = Watched(redis, run_role, tmp_path)
    yield watched
    watched.http.close()
    for process in watched.processes:
        process.close()
    redis.stop()


def test_texts_and_keys_are_in_no_output(watched: Watched) -> None:
    text, key = watched.text, watched.key
    documents = "/collections/books/documents"
    plain: list[tuple[str, str, object]] = [
        ("POST", "/v1/embeddings", {"input": text}),
        ("POST", "/v1/embeddings", {"input": text, "model": text}),
        ("POST", "/v1/embeddings", {text: text}),
        ("POST", "/v1/embeddings", {"input": [text, ""], "encoding_format": text}),
        ("POST", "/v1/embeddings", {"input": text, "instruction": text}),
        ("POST", "/v1/embeddings", {"input": text, "prompt_name": text}),
        ("POST", "/embed", {"inputs": f"{text} " * 500, "truncate": False}),
        ("POST", "/rerank", {"query": text, "texts": [text], text: 1}),
        ("POST", "/v1/rerank", {"query": text, "documents": [{text: text}]}),
        ("POST", documents, {"id": text, "text": text, "metadata": {text: text}}),
        ("POST", documents, {"id": text * 100, "text": text}),
        ("POST", documents, {"id": 1, text: text}),
        ("POST", documents, {"id": "a", "text": text, "version": text}),
        ("POST", "/collections/books/search", {"query": text, "rerank": {text: 1}}),
        ("POST", "/collections/books/search", {"vector": [text]}),
        ("PUT", f"/collections/{text}!", {}),
        ("PUT", "/collections/other", {"model": text, "policy": text}),
        ("GET", f"/collections/{text}", None),
        ("GET", f"{documents}/{text}", None),
        ("GET", f"/submissions/{text}", None),
        ("GET", f"/v1/models/{text}", None),
        ("GET", f"/{text}?{text}={text}", None),
        ("DELETE", f"{documents}/{text}?version={text}", None),
    ]
    for method, path, body in plain:
        assert watched.status(method, path, json=body) > 0
    for raw in (f'{{"input": "{text}', f"{text}", f'["{text}"]', f'{{"input": {text}}}'):
        assert watched.status("POST", "/v1/embeddings", content=raw) == 400
    lines = [{"id": "n1", "text": text}, {"id": text}, {text: text}]
    ndjson = "\n".join(map(json.dumps, lines)) + f"\n{text}\n{{{text}"
    kind = {"content-type": "application/x-ndjson", "idempotency-key": text, "x-request-id": "r"}
    assert watched.status("POST", documents, content=ndjson, headers=kind) > 0
    for wrong in (key[:-1] + "x", f"{key}{text}", text, "-"):
        for headers in (
            {"authorization": f"Bearer {wrong}"},
            {"authorization": wrong},
            {"authorization": f"Bearer {key}", "x-api-key": wrong},
            {"cookie": f"key={key}", "authorization": "Basic x"},
        ):
            assert watched.status("GET", f"/v1/models?key={key}", headers=headers) == 401
    watched.said.append(watched.http.get("/metrics").text)
    watched.said.append(watched.http.get("/health").text)
    watched.check()


def test_an_engine_that_quotes_is_not_quoted(watched: Watched) -> None:
    documents = "/collections/books/documents"
    for name in ERRORS:
        for marker in (f"[[{name}]]", f"[[call {name}]]"):
            text = f"{watched.text} {marker}"
            assert watched.status("POST", "/embed", json={"inputs": [text, "good"]}) >= 400
            body = {"query": watched.text, "documents": [text, "good"]}
            assert watched.status("POST", "/v1/rerank", json=body) >= 400
            rows = {"documents": [{"id": marker, "text": text}, {"id": "good", "text": "good"}]}
            sent = watched.http.post(documents, json=rows)
            assert sent.status_code == 202
            path = f"/submissions/{sent.json()['submission_id']}"
            wait_until(
                lambda at=path: watched.http.get(at).json()["state"] == "done",  # type: ignore[misc]
                60,
                f"the submission with {marker}",
            )
    from rq import Queue

    with watched.redis.client("admin") as admin:  # arguments that no handler takes, functions too
        for queue in Queue.all(connection=admin, serializer=Serializer):
            for function in ("vecfleet.embed", f"vecfleet.{watched.text}"):
                queue.enqueue(function, {watched.text: watched.text})
                queue.enqueue(function, watched.text, watched.text)
        wait_until(
            lambda: not any(len(q) for q in Queue.all(connection=admin, serializer=Serializer)),
            60,
            "all jobs to be claimed",
        )
    assert watched.command("status", **watched.redis.environment("operator")) == 0
    for process in watched.processes:
        process.signal(signal.SIGTERM)
    for process in watched.processes:
        process.wait(60)
    for error in ("RuntimeError", "KeyError", "EngineFailed"):
        assert f"the model failed on one text: {error}" in watched.everything()
    watched.check()


def test_commands_and_starts_that_fail_show_no_password(watched: Watched) -> None:
    port, password = watched.redis.port, watched.redis.password("worker")
    nobody = {"VECFLEET_REDIS_PASSWORD_FILE": ""}
    urls = [
        f"redis://nobody:{password}@127.0.0.1:{port}/0",
        f"redis://worker:{password}@127.0.0.1:1/0",
        f"redis://worker:{password}@127.0.0.1:{port}/99",
        f"redis://worker:{password}@[::1/0",
        f"rediss://worker:{password}@127.0.0.1:{port}/0",
        f"http://worker:{password}@127.0.0.1:{port}/0",
        f"redis://127.0.0.1:{port}/0?password={password}&username=nobody",
        f"redis://worker:{password}@127.0.0.1:{port}/0?wrong=1",
    ]
    for url in urls:
        for command in (("--debug", "status"), ("collections", "list"), ("worker", "--check")):
            watched.command(*command, VECFLEET_REDIS_URL=url, **nobody)
        watched.command("--debug", "gateway", "--port", "70000", VECFLEET_REDIS_URL=url, **nobody)
    watched.command("status", VECFLEET_PORT="x", VECFLEET_API_KEY=watched.key)
    watched.command("status", VECFLEET_NO_SUCH=watched.key)
    watched.command(
        "ingest", "-", "-c", "books", stdin=f'{{"text": "{watched.text}\n{{{watched.text}'
    )
    watched.command("ingest", "-", "-c", "books", stdin=f'{{"id": 1, "{watched.text}": 2}}\n')
    watched.check()
