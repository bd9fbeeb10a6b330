"""The names of requests in vLLM: they tell a query from bulk, and carry a text's number."""

from __future__ import annotations

from vecfleet.worker.engine import Priority

_KIND = {Priority.INTERACTIVE: "i", Priority.BULK: "b"}


def request_name(priority: Priority, number: int, serial: int) -> str:
    """A name that no other request has, as ``serial`` is counted up."""
    return f"{_KIND[priority]}{number}-{serial}"


def is_bulk(name: str) -> bool:
    """Whether a request is bulk; vLLM may have added to its name."""
    return name.startswith(_KIND[Priority.BULK])


def number_of(name: str) -> int:
    """The number that the request was given."""
    return int(name[1:].partition("-")[0])
