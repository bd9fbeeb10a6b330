"""The commands of a fleet's clients; they need the producer's dependencies alone."""

from vecfleet.fleet.ingest_command import ingest
from vecfleet.fleet.query_commands import embed, rerank, search
from vecfleet.fleet.status_command import collections, status

CLIENT_COMMANDS = {
    "ingest": ingest,
    "search": search,
    "rerank": rerank,
    "embed": embed,
    "status": status,
    "collections": collections,
}

__all__ = [
    "CLIENT_COMMANDS",
    "collections",
    "embed",
    "ingest",
    "rerank",
    "search",
    "status",
]
