"""The API keys that a gateway knows: read from their file again whenever it has changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from vecfleet.common.api_keys import ApiKey, KeySet, read_keys
from vecfleet.common.errors import ConfigError
from vecfleet.gateway.file_stamp import stamp_of

log = logging.getLogger(__name__)

LOOK_S = 0.5  # between two looks at the file: a revoked key is good for so long
GONE_S = 10.0  # a file may be missing so long, while somebody puts another in its place


class Keyring:
    """The keys in one file. Looking costs a ``stat`` every half a second, and no thread."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the file; raises ``ConfigError`` when it cannot be read."""
        self._path = path
        self._clock = clock
        self._stamp = stamp_of(path)
        self._keys = read_keys(path)
        self._looked = clock()
        self._fault = ""
        self._gone_since: float | None = None

    def find(self, shown: str) -> ApiKey | None:
        """The entry of a key that is good now."""
        self._look()
        return self._keys.find(shown)

    def tenants(self) -> list[str]:
        """Everybody who has a key."""
        self._look()
        return self._keys.tenants()

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        stamp = stamp_of(self._path)
        if stamp == self._stamp and not self._fault:
            return
        try:
            keys: KeySet = read_keys(self._path)
        except ConfigError as error:
            if str(error) != self._fault:
                log.error("the API keys stay as they were: %s", error)
            self._fault = str(error)  # it is read again at each look until it is good
            self._forget_where_gone(now)
            return
        self._keys, self._stamp, self._fault, self._gone_since = keys, stamp, "", None
        log.info("the API keys were read again", extra={"fields": {"keys": len(keys.entries)}})

    def _forget_where_gone(self, now: float) -> None:
        """Who removes the file means that nobody has a key any more."""
        if not _is_gone(self._path):
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        elif now - self._gone_since >= GONE_S and self._keys.entries:
            log.error("no API key is good any more: %s is gone", self._path)
            self._keys = KeySet()


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False  # who knows
    return False
