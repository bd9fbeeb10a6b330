"""Requests made by schemathesis from the OpenAPI document, good and bad, reproducible by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import requests
import schemathesis
from fuzz.keys import Key
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

COLLECTIONS = ("books", "given", "spare", "other")
_DROPPED = (
    "user-agent",
    "accept",
    "accept-encoding",
    "connection",
    "content-length",  # told anew for what is sent
    "x-schemathesis-testcaseid",
)
_NEVER_SATISFIED = ("GET /health", "GET /live")  # they take nothing that could be wrong


@dataclass(frozen=True)
class Request:
    """One request, and how it came about."""

    method: str
    target: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    origin: str = ""
    key: Key | None = None  # what it was sent with, where keys are asked for


def labels(document: dict[str, Any]) -> list[str]:
    """The operations of the document, as schemathesis calls them."""
    return [f"{m.upper()} {path}" for path, found in document["paths"].items() for m in found]


def generate(document: dict[str, Any], label: str, count: int, seed: int) -> list[Request]:
    """``count`` requests of one operation, half of them breaking its schema."""
    schema = schemathesis.openapi.from_dict(document)
    operations = {op.ok().label: op.ok() for op in schema.get_all_operations()}
    made: list[Request] = []
    for mode in GenerationMode:
        if mode is GenerationMode.NEGATIVE and label in _NEVER_SATISFIED:
            continue
        made += _of_mode(operations[label], mode, max(1, count // 2), seed)
    return made


def _of_mode(operation: Any, mode: GenerationMode, count: int, seed: int) -> list[Request]:
    made: list[Request] = []
    generator = random.Random(f"{seed}/{operation.label}/{mode.value}")

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        made.append(_prepared(case, mode, generator))

    try:
        collect()
    except Unsatisfiable:
        return made
    return made


def _prepared(case: Any, mode: GenerationMode, generator: random.Random) -> Request:
    # Only a few collections are ever there: with a name of its own each request would miss them.
    if "collection" in case.path_parameters and (
        mode is GenerationMode.POSITIVE or generator.random() < 0.5
    ):
        case.path_parameters["collection"] = generator.choice(COLLECTIONS)
    return as_request(prepare(case), f"schemathesis {mode.value}")


def prepare(case: Any) -> requests.PreparedRequest:
    """A case of schemathesis's as it would be sent."""
    kwargs = case.as_transport_kwargs(base_url="http://fuzz")
    known = ("method", "url", "headers", "params", "data", "json", "cookies")
    return requests.Request(**{name: kwargs[name] for name in known if name in kwargs}).prepare()


def as_request(prepared: requests.PreparedRequest, origin: str) -> Request:
    """The same as ours, which nothing tidies up."""
    body = prepared.body
    if isinstance(body, str):
        body = body.encode("utf-8", "surrogatepass")
    elif body is not None and not isinstance(body, bytes):
        body = b"".join(body)
    headers = {
        str(name): value if isinstance(value, str) else value.decode("latin-1")
        for name, value in prepared.headers.items()
        if name.lower() not in _DROPPED
    }
    return Request(prepared.method or "GET", prepared.path_url, headers, body, origin)


def spread(total: int, document: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """How many of ``total`` requests each operation gets: those with bodies three times as many."""
    names = labels(document)
    weights = {
        name: 3 if name.split()[0] in ("POST", "PUT") and "cancel" not in name else 1
        for name in names
    }
    for name in names:
        yield name, max(2, total * weights[name] // sum(weights.values()))
