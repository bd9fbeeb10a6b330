"""TLS on both sides: HTTP at the gateway, and every role's connection to Redis."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from acl_redis import AclRedis
from certificates import Authority, Certificate
from servers import Process, require_or_skip, wait_until

from vecfleet.common.errors import ConfigError, RedisUnavailable
from vecfleet.common.redis_client import connect, connect_async, translated
from vecfleet.common.settings import Settings, complete_redis_url
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import RedisBinary, free_port

LOCAL = "DNS:localhost,IP:127.0.0.1"
RunRole = Callable[..., Process]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    require_or_skip(shutil.which("openssl"), "openssl")
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server_certificate(authority: Authority) -> Certificate:
    return authority.issue("server", LOCAL)


@pytest.fixture(scope="module")
def client_certificate(authority: Authority) -> Certificate:
    return authority.issue("client")


class TlsRedis(AclRedis):
    """One that speaks nothing but TLS, and asks for a client's certificate."""

    def __init__(
        self, folder: Path, binary: RedisBinary, authority: Authority, own: Certificate
    ) -> None:
        self.tls_port = free_port()
        super().__init__(
            folder,
            binary,
            "--tls-port", str(self.tls_port),
            "--tls-cert-file", str(own.cert),
            "--tls-key-file", str(own.key),
            "--tls-ca-cert-file", str(authority.cert),
        )  # fmt: skip
        with self.client("admin") as admin:
            admin.config_set("port", 0)


@pytest.fixture
def tls_redis(
    tmp_path: Path,
    redis_binary: RedisBinary,
    authority: Authority,
    server_certificate: Certificate,
) -> Iterator[TlsRedis]:
    probe = [str(redis_binary.path), "--tls-port", "0", "--port", "wrong"]
    said = subprocess.run(probe, capture_output=True, text=True, timeout=20)
    has_tls = "tls-port" not in said.stdout + said.stderr  # else that is the first fault
    require_or_skip(has_tls, "a redis-server with TLS")
    server = TlsRedis(tmp_path, redis_binary, authority, server_certificate)
    yield server
    server.stop()


def environment(
    server: TlsRedis, user: str, authority: Authority, own: Certificate
) -> dict[str, str]:
    return {
        "VECFLEET_REDIS_URL": f"rediss://{user}@localhost:{server.tls_port}/0",
        "VECFLEET_REDIS_PASSWORD_FILE": str(server.passwords / user),
        "VECFLEET_REDIS_CA": str(authority.cert),
        "VECFLEET_REDIS_CERT": str(own.cert),
        "VECFLEET_REDIS_KEY": str(own.key),
    }


async def test_roles_and_clients_talk_to_redis_over_tls_alone(
    tls_redis: TlsRedis,
    authority: Authority,
    client_certificate: Certificate,
    server_certificate: Certificate,
    run_role: RunRole,
    tmp_path: Path,
) -> None:
    def as_user(user: str) -> dict[str, str]:
        told = environment(tls_redis, user, authority, client_certificate)
        return {"VECFLEET_ENGINE": "fake", **told}

    port = free_port()
    data = str(tmp_path / "index")
    roles = [
        run_role("aggregator", "--data", data, env=as_user("aggregator")),
        run_role("worker", env=as_user("worker")),
        run_role(
            "gateway", "--port", str(port), "--no-keys",
            "--tls-cert", str(server_certificate.cert), "--tls-key", str(server_certificate.key),
            env=as_user("gateway"),
        ),
    ]  # fmt: skip
    context = ssl.create_default_context(cafile=str(authority.cert))
    with httpx.Client(base_url=f"https://localhost:{port}", verify=context, timeout=30) as http:

        def healthy() -> bool:
            try:
                return http.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(healthy, 60, "a healthy gateway")
        wait_until(lambda: http.put("/collections/books").status_code == 201, 30, "a collection")
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"id": "d1", "text": "a text over TLS"}))
        ingested = subprocess.run(
            role_command("ingest", str(rows), "-c", "books"),
            env={**os.environ, **as_user("producer"), "VECFLEET_DATA": str(tmp_path / "client")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ingested.returncode == 0, ingested.stderr
        found = http.post("/collections/books/search", json={"query": "a text over TLS"})
        assert [hit["id"] for hit in found.json()["results"]] == ["d1"]
    for role in roles:
        assert role.stop(60) == 0


async def test_a_redis_that_cannot_prove_itself_gets_no_password(
    tls_redis: TlsRedis, authority: Authority, client_certificate: Certificate, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    own, other = client_certificate, stranger.issue("client2")
    url = f"rediss://gateway:{tls_redis.password('gateway')}@localhost:{tls_redis.tls_port}/0"
    good = complete_redis_url(url, ca=authority.cert, cert=own.cert, key=own.key)
    with connect(good) as client:
        assert client.ping()
    async with connect_async(good) as asynchronous:
        assert await asynchronous.ping()
    elsewhere = url.replace("localhost", "127.1.2.3")  # not what the certificate is for
    for bad in (
        complete_redis_url(url, ca=stranger.cert, cert=own.cert, key=own.key),
        complete_redis_url(url, cert=own.cert, key=own.key),
        complete_redis_url(elsewhere, ca=authority.cert, cert=own.cert, key=own.key),
        complete_redis_url(url, ca=authority.cert, cert=other.cert, key=other.key),
        complete_redis_url(url, ca=authority.cert),
    ):
        with pytest.raises(RedisUnavailable) as refused, connect(bad) as client, translated():
            client.ping()
        assert tls_redis.password("gateway") not in str(refused.value)
        with pytest.raises(RedisUnavailable), translated():
            async with connect_async(bad) as asynchronous:
                await asynchronous.ping()


def test_what_is_in_files_is_put_into_the_url(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("p@ss/w:rd?#\n")
    given = {"redis_url": "rediss://worker@host:1/0", "redis_password_file": password}
    url = Settings.checked({**given, "redis_ca": tmp_path / "ca"}).find_redis_url()
    assert url.startswith("rediss://worker:p%40ss%2Fw%3Ard%3F%23@host:1/0?ssl_ca_certs=")
    with connect(url) as client:
        told = client.connection_pool.connection_kwargs
    assert (told["username"], told["password"]) == ("worker", "p@ss/w:rd?#")
    assert complete_redis_url(url, password_file=password) == url, "twice is as good as once"
    own = "redis://:other@host/0"
    assert complete_redis_url(own, password_file=password) == own, "the URL's own goes first"
    assert complete_redis_url("unix:///x", password_file=password) == "unix:///x"
    assert "p@ss" not in repr(Settings.checked(given))


@pytest.mark.parametrize(
    "given",
    [
        {"redis_url": "redis://host/0", "redis_ca": "/ca.crt"},
        {"redis_url": "rediss://host/0", "redis_cert": "/c.crt"},
        {"redis_url": "redis://host/0", "redis_password_file": "/nowhere"},
    ],
)
def test_wrong_settings_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        Settings.checked(given).find_redis_url()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_gateway_speaks_no_http_where_it_speaks_https(
    server_certificate: Certificate, authority: Authority, redis_url: str, run_role: RunRole
) -> None:
    port = free_port()
    files = ("--tls-cert", str(server_certificate.cert), "--tls-key", str(server_certificate.key))
    gateway = run_role(
        "gateway", "--port", str(port), "--no-keys", *files, env={"VECFLEET_REDIS_URL": redis_url}
    )
    gateway.wait_for_line("listens on https://")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{port}/live")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"https://localhost:{port}/live")  # the system's authorities do not know it
    context = ssl.create_default_context(cafile=str(authority.cert))
    good = httpx.get(f"https://localhost:{port}/live", verify=context, timeout=30)
    assert good.status_code == 200
    old = ssl.create_default_context(cafile=str(authority.cert))
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with (
        socket.create_connection(("localhost", port)) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(plain, server_hostname="localhost")
    assert gateway.stop() == 0


def test_a_renewed_certificate_is_taken_up_without_a_restart(
    tmp_path: Path, authority: Authority, redis_url: str, run_role: RunRole
) -> None:
    first, second = authority.issue("first", LOCAL), authority.issue("second", LOCAL)
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    shutil.copy(first.cert, cert)
    shutil.copy(first.key, key)
    port = free_port()
    gateway = run_role(
        "gateway", "--port", str(port), "--no-keys",
        "--tls-cert", str(cert), "--tls-key", str(key),
        env={"VECFLEET_REDIS_URL": redis_url},
    )  # fmt: skip
    gateway.wait_for_line("listens on https://")
    context = ssl.create_default_context(cafile=str(authority.cert))

    def shown() -> bytes:
        with (
            socket.create_connection(("localhost", port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wrapped,
        ):
            return wrapped.getpeercert(binary_form=True) or b""

    def der(of: Certificate) -> bytes:
        return ssl.PEM_cert_to_DER_cert(of.cert.read_text())

    assert shown() == der(first)
    shutil.copy(second.cert, cert)  # its key is still the old one's
    gateway.wait_for_line("the TLS certificate stays as it was")
    assert shown() == der(first)
    shutil.copy(second.key, key)
    gateway.wait_for_line("the TLS certificate was read again")
    assert shown() == der(second)
    assert gateway.stop() == 0


def test_a_certificate_that_cannot_be_used_stops_the_start(
    tmp_path: Path, redis_url: str, server_certificate: Certificate, client_certificate: Certificate
) -> None:
    def start(*files: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            role_command(
                "gateway", "--port", "0", "--no-keys", *map(str, files), "--redis", redis_url
            ),
            capture_output=True,
            text=True,
            timeout=60,
        )

    own, other = server_certificate, client_certificate
    for files in (
        ("--tls-cert", own.cert),
        ("--tls-cert", tmp_path / "none", "--tls-key", own.key),
        ("--tls-cert", own.cert, "--tls-key", other.key),
    ):
        done = start(*files)
        assert done.returncode in (1, 2), done.stderr
        assert "Traceback" not in done.stderr
        assert "tls" in done.stderr.lower()
