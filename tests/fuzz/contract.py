"""What the OpenAPI document promises of an answer, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

import jsonschema_rs
import orjson
from fuzz.wire import Answer

FLEET_AWAY = frozenset((503, 504))
_ELSEWHERE = (400, 404, 405, 431)  # the door's answers where no route is meant
_DOCS = ("/docs", "/openapi.json", "/redoc", "/docs/oauth2-redirect")


class Broken(AssertionError):
    """An answer that the document does not promise."""


class Contract:
    """The routes of one OpenAPI document and the schemas of their answers."""

    def __init__(self, document: dict[str, Any]) -> None:
        components = {"components": document["components"]}
        self._routes: list[tuple[re.Pattern[str], dict[str, dict[int, Any]]]] = []
        for template, operations in document["paths"].items():
            declared: dict[str, dict[int, Any]] = {}
            for method, operation in operations.items():
                declared[method.upper()] = {
                    int(code): _validators(answer["content"], components)
                    for code, answer in operation["responses"].items()
                }
            self._routes.append((re.compile(_pattern(template)), declared))
        shapes = [{"$ref": f"#/components/schemas/{name}", **components} for name in _SHAPES]
        self._any_error = jsonschema_rs.validator_for({"anyOf": shapes, **components})

    def check(self, method: str, target: str, answer: Answer, *, away: bool = False) -> None:
        """Raise ``Broken`` unless ``answer`` to ``method target`` was declared; ``away``: the fleet
        was stopped, so that 503 and 504 are the right answers."""
        if answer.status == 0:
            return (
                None  # closed without a word: only what is no HTTP is treated so, and counted apart
            )
        if answer.status >= 500 and not (away and answer.status in FLEET_AWAY):
            raise Broken(f"{answer.status}: {answer.body[:500]!r}")
        path = unquote_to_bytes(target.partition("?")[0].partition("#")[0]).decode(
            "utf-8", "replace"
        )
        for pattern, declared in self._routes:
            if pattern.fullmatch(path) and method in declared:
                return self._check_declared(declared[method], answer)
        if path in _DOCS:
            return None
        if answer.status not in _ELSEWHERE:
            raise Broken(f"{method} {path[:80]!r} is no route, and was answered {answer.status}")
        return self._check_error(answer)

    def _check_declared(self, declared: dict[int, Any], answer: Answer) -> None:
        if answer.status == 400 and answer.headers.get("content-type", "").startswith("text/plain"):
            return  # the protocol's own, for what is no HTTP
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
            raise Broken(
                f"{answer.status} breaks its schema: {fault.message}: {answer.body[:300]!r}"
            )

    def _check_error(self, answer: Answer) -> None:
        if answer.headers.get("content-type", "").startswith("text/plain"):
            return
        if not self._any_error.is_valid(orjson.loads(answer.body)):
            raise Broken(f"{answer.status} has no error's shape: {answer.body[:300]!r}")


_SHAPES = ("Error", "OpenAIError", "TeiError")


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
