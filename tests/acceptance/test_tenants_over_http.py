"""Two tenants and their keys over a real fleet: neither sees what is the other's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Process, wait_until

from vecfleet.common.api_keys import add_key, new_key
from vecfleet.fleet.redis_server import free_port


class Tenant:
    """One tenant's client."""

    def __init__(self, name: str, url: str, keys_file: Path) -> None:
        key, entry = new_key(name)
        add_key(keys_file, entry)
        self.name = name
        self.http = httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=30)

    def __call__(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return self.http.request(method, path, json=body)

    def submit(self, document_id: str, text: str) -> str:
        row = {"id": document_id, "text": text}
        sent = self("POST", "/collections/books/documents", row)
        assert sent.status_code == 202, sent.text
        path = f"/submissions/{sent.json()['submission_id']}"
        wait_until(lambda: self("GET", path).json().get("state") == "done", 60, path)
        return path

    def search(self, text: str) -> list[str]:
        found = self("POST", "/collections/books/search", {"query": text})
        assert found.status_code == 200, found.text
        return [hit["id"] for hit in found.json()["results"]]


@pytest.mark.parametrize("pair", [("acme", "rival"), ("acme", "-")])
def test_each_tenant_has_its_own(
    pair: tuple[str, str], run_role: Callable[..., Process], redis_url: str, tmp_path: Path
) -> None:
    keys_file, port = tmp_path / "keys.json", free_port()
    add_key(keys_file, new_key()[1])
    environment = {
        "VECFLEET_REDIS_URL": redis_url,
        "VECFLEET_DATA": str(tmp_path),
        "VECFLEET_ENGINE": "fake",
    }
    for arguments in (("aggregator",), ("worker",), ("gateway", "--port", str(port))):
        run_role(*arguments, env=environment)
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(is_up, 60, "a healthy gateway")
    ours, theirs = (Tenant(name, url, keys_file) for name in pair)
    for tenant in (ours, theirs):
        wait_until(
            lambda at=tenant: at("PUT", "/collections/books").status_code == 201,  # type: ignore[misc]
            30,
            "a collection",
        )
    assert (
        ours("GET", "/collections/books").json()["uid"]
        != theirs("GET", "/collections/books").json()["uid"]
    )
    submission = ours.submit("mine", "a text of ours")
    theirs.submit("yours", "a text of theirs")
    poisoned = ours.submit("bad", "[[poison]] of ours")

    assert ours.search("a text of ours") == ["mine"]
    assert theirs.search("a text of ours") == ["yours"]
    assert theirs("GET", "/collections/books/documents/mine").status_code == 404
    assert ours("POST", "/embed", {"inputs": "a"}).status_code == 200
    assert theirs("POST", "/v1/rerank", {"query": "a", "documents": ["a"]}).status_code == 200

    (entry,) = ours("GET", "/dead").json()["entries"]
    assert theirs("GET", "/dead").json()["entries"] == []
    unknown = "0" * 32
    for own in (submission, poisoned):
        for method, tail in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
            told = theirs(method, f"{own}{tail}")
            never = theirs(method, f"/submissions/{unknown}{tail}")
            assert told.status_code == never.status_code == 404
            assert told.json()["error"]["code"] == never.json()["error"]["code"]
    for method, tail in (("GET", ""), ("POST", "/retry"), ("DELETE", "")):
        told = theirs(method, f"/dead/{entry['id']}{tail}")
        never = theirs(method, f"/dead/{unknown}{tail}")
        assert told.status_code == never.status_code == 404, (method, tail, told.text)
        assert told.json()["error"]["code"] == never.json()["error"]["code"]
    assert ours("GET", f"/dead/{entry['id']}").status_code == 200

    assert theirs("DELETE", "/collections/books").status_code == 200
    assert ours.search("a text of ours") == ["mine"]
    assert ours("GET", submission).json()["state"] == "done"
