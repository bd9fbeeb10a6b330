"""What the OpenAPI document promises of an answer, checked; and which routes were answered well."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

import jsonschema_rs
import orjson
from fuzz.keys import OPEN_PATHS, OPERATORS_PATHS, Key
from fuzz.wire import Answer

FLEET_AWAY = frozenset((503, 504))
_ELSEWHERE = (400, 403, 404, 405, 431)  # the door's answers where no route is meant
_DOCS = ("/docs", "/openapi.json", "/redoc", "/docs/oauth2-redirect")
_SHAPES = ("Error", "OpenAIError", "TeiError")


class Broken(AssertionError):
    """An answer that the document does not promise."""


@dataclass(frozen=True)
class _Operation:
    """What is declared of one method of one path."""

    label: str  # such as "GET /collections/{collection}"
    answers: dict[int, dict[str, Any]]  # validators by status and content type
    scopes: frozenset[str]


@dataclass
class Contract:
    """The routes of one OpenAPI document and the schemas of their answers."""

    document: dict[str, Any]
    served: Counter[str] = field(default_factory=Counter)  # answers of 2xx by operation

    def __post_init__(self) -> None:
        components = {"components": self.document["components"]}
        self._routes: list[tuple[re.Pattern[str], dict[str, _Operation]]] = []
        for template, methods in self.document["paths"].items():
            operations = {
                method.upper(): _Operation(
                    f"{method.upper()} {template}",
                    {
                        int(code): _validators(answer["content"], components)
                        for code, answer in operation["responses"].items()
                    },
                    frozenset(operation.get("x-scopes", ())),
                )
                for method, operation in methods.items()
            }
            self._routes.append((re.compile(_pattern(template)), operations))
        shapes = [{"$ref": f"#/components/schemas/{name}", **components} for name in _SHAPES]
        self._any_error = jsonschema_rs.validator_for({"anyOf": shapes, **components})

    def never_served(self) -> list[str]:
        """The operations that have not been answered with a 2xx."""
        labels = {op.label for _, operations in self._routes for op in operations.values()}
        return sorted(labels - self.served.keys())

    def check(
        self,
        method: str,
        target: str,
        answer: Answer,
        *,
        key: Key | None = None,
        away: bool = False,
    ) -> None:
        """Raise ``Broken`` unless ``answer`` to ``method target`` was declared.

        ``key``: what it was sent with, where keys are asked for. ``away``: the fleet was stopped,
        so that 503 and 504 are the right answers.
        """
        if answer.status == 0:
            raise Broken("the connection was closed without an answer")
        if answer.status >= 500 and not (away and answer.status in FLEET_AWAY):
            raise Broken(f"{answer.status}: {answer.body[:500]!r}")
        path = unquote_to_bytes(target.partition("?")[0].partition("#")[0])
        operation = self._find(method, path.decode("utf-8", "replace"))
        if _is_protocols(answer):
            return None
        if key is not None:
            _check_key(key, path.decode("utf-8", "replace"), operation, answer)
            if answer.status == 401:
                return self._check_error(answer)
        if operation is not None:
            if 200 <= answer.status < 300:
                self.served[operation.label] += 1
            return _check_declared(operation.answers, answer)
        if path.decode("utf-8", "replace") in _DOCS:
            return None
        if answer.status not in _ELSEWHERE:
            raise Broken(f"{method} {path[:80]!r} is no route, and was answered {answer.status}")
        return self._check_error(answer)

    def _find(self, method: str, path: str) -> _Operation | None:
        for pattern, operations in self._routes:
            if method in operations and pattern.fullmatch(path):
                return operations[method]
        return None

    def _check_error(self, answer: Answer) -> None:
        if not self._any_error.is_valid(orjson.loads(answer.body)):
            raise Broken(f"{answer.status} has no error's shape: {answer.body[:300]!r}")


def _is_protocols(answer: Answer) -> bool:
    """Whether it is the protocol's own answer, to what is no HTTP."""
    kind = answer.headers.get("content-type", "")
    return answer.status in _ELSEWHERE and kind.startswith("text/plain")


def _check_key(key: Key, path: str, operation: _Operation | None, answer: Answer) -> None:
    """Only a good key opens a door, and only those of its scopes."""
    if path in OPEN_PATHS:
        return
    if not key.is_good:
        if answer.status != 401:
            raise Broken(f"with {key.kind} it is {answer.status}: {answer.body[:200]!r}")
        return
    if answer.status == 401:
        raise Broken(f"a good key is refused: {answer.body[:200]!r}")
    if operation is None or not operation.scopes:
        return
    fits = bool(operation.scopes & key.scopes)
    if not fits and answer.status != 403:
        raise Broken(f"{key.kind} of {sorted(key.scopes)} is answered {answer.status}")
    if fits and answer.status == 403 and path not in OPERATORS_PATHS:
        raise Broken(f"{key.kind} of {sorted(key.scopes)} is forbidden what it is for")


def _check_declared(declared: dict[int, dict[str, Any]], answer: Answer) -> None:
    if answer.status not in declared:
        raise Broken(f"status {answer.status} is not declared: {answer.body[:300]!r}")
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if kind not in declared[answer.status]:
        raise Broken(f"content type {kind!r} is not declared")
    validator = declared[answer.status][kind]
    if validator is None:
        return
    try:
        value = orjson.loads(answer.body)
    except orjson.JSONDecodeError as error:
        raise Broken(f"the answer is no JSON: {error}") from error
    if not validator.is_valid(value):
        fault = next(iter(validator.iter_errors(value)))
        raise Broken(f"{answer.status} breaks its schema: {fault.message}: {answer.body[:300]!r}")


def _validators(content: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    return {
        kind: jsonschema_rs.validator_for({**entry["schema"], **components})
        if kind == "application/json"
        else None
        for kind, entry in content.items()
    }


def _pattern(template: str) -> str:
    """A route's pattern; ids and models may hold slashes."""
    parts: Iterable[str] = re.split(r"(\{\w+\})", template)
    wide = ("{document}", "{model}")
    return "".join(
        (".*" if part in wide else "[^/]+") if part.startswith("{") else re.escape(part)
        for part in parts
    )
