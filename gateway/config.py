"""What a gateway is told when it starts; nothing here is read from the environment."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from vecfleet.common import limits
from vecfleet.common.admission import Admission
from vecfleet.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What one client may ask of the gateway."""

    max_inference_body_bytes: int = 8 << 20  # every other JSON body
    max_buffered_bytes: int = 256 << 20  # bodies held in memory; tenants share them
    max_unread_bytes: int = 256 << 20  # large answers on their way to clients; tenants share them
    max_line_bytes: int = 2 << 20  # one line of an NDJSON stream
    max_header_bytes: int = 64 << 10
    max_inputs: int = limits.MAX_INPUTS
    max_request_tokens: int = limits.MAX_REQUEST_TOKENS
    max_rerank_documents: int = limits.MAX_RERANK_DOCUMENTS
    max_documents: int = 20_000  # in one JSON body
    max_top_k: int = limits.MAX_TOP_K
    max_kept_errors: int = 100  # refused lines told in an answer
    max_streams: int = 64  # NDJSON bodies read at the same time; tenants share them
    max_connections: int = 4096
    header_timeout_s: float = 10.0
    idle_timeout_s: float = 30.0  # a connection between two requests
    body_grace_s: float = 10.0  # a body may be silent for so long ...
    stream_grace_s: float = 60.0  # ... and an NDJSON stream for so long, ...
    unread_silence_s: float = 30.0  # a client may take nothing of its answer for so long
    min_body_bytes_per_s: int = 1000  # ... with bytes at this rate on the average
    queue_full_wait_s: float = 20.0  # a stream waits so long for room in the queue


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway process."""

    redis_url: str = field(repr=False)  # may hold a password
    host: str = "127.0.0.1"
    port: int = 8080
    keys_file: Path | None = None  # the API keys; without it everybody may do everything
    no_keys: bool = False  # that is meant
    tls_cert: Path | None = None  # certificates in PEM, the server's own first
    tls_key: Path | None = None
    embed_model: str | None = None  # where a request names none; None: the only one served
    rerank_model: str | None = None
    collection: str | None = None  # what POST /search reads; None: the only one there is
    timeout_s: float = 30.0  # how long a request waits for its answer
    redis_wait_s: float = 30.0  # how long the start waits for Redis
    max_body_bytes: int = limits.MAX_BODY_BYTES  # a JSON body of documents
    drain_s: float = 20.0  # how long requests in flight may take after SIGTERM
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    admission: Admission = field(default_factory=Admission)

    def checked(self) -> GatewayConfig:
        """The config itself; raises a ``ConfigError`` that names every fault at once."""
        faults = []
        if self.keys_file is None and not self.no_keys:
            faults.append(
                "there are no API keys: make one with `vecfleet keys create`, or say --no-keys, "
                "for yourself alone on this machine or behind a proxy that asks for keys of its own"
            )
        if self.keys_file is not None and self.no_keys:
            faults.append("a key file and --no-keys contradict each other")
        if (self.tls_cert is None) != (self.tls_key is None):
            faults.append("tls_cert and tls_key go together")
        if not 0 <= self.port <= 65535:
            faults.append(f"port {self.port} is not from 0 to 65535")
        for name in ("timeout_s", "drain_s", "redis_wait_s"):
            if getattr(self, name) < 0:
                faults.append(f"{name} must not be negative")
        if self.max_body_bytes <= 0:
            faults.append("max_body_bytes must be more than 0")
        if self.max_body_bytes > self.limits.max_buffered_bytes // 2:
            most = self.limits.max_buffered_bytes // 2
            faults.append(f"max_body_bytes may be {most} at most, half of what all bodies may hold")
        faults += [
            f"limits.{name} must be more than 0"
            for name in GatewayLimits.__dataclass_fields__
            if getattr(self.limits, name) <= 0 and name != "queue_full_wait_s"
        ]
        if faults:
            raise ConfigError("; ".join(faults))
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, or "": every address
