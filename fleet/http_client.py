"""A small HTTP client over one connection that is kept open: JSON in, JSON out."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from vecfleet.common.errors import VecfleetError, from_wire

_TIMEOUT_S = 60.0


class HttpClient:
    """Calls one gateway; not for several threads at once."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """``url`` is the gateway's, such as http://127.0.0.1:8000."""
        parts = urlsplit(url)
        is_tls = parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=_TIMEOUT_S)
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST; raises the error that the gateway answers with."""
        data = json.dumps(body).encode()
        try:
            self._connection.request("POST", path, data, self._headers)
            response = self._connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise VecfleetError(f"the gateway did not answer {path}: {error}") from error
        if response.status >= 400:
            raise _error(answer, response.status)
        return dict(answer)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _error(answer: Any, status: int) -> VecfleetError:
    told = answer.get("error", answer) if isinstance(answer, dict) else {}
    if isinstance(told, dict) and "code" in told:
        return from_wire(told)
    return VecfleetError(f"the gateway answered with status {status}")
