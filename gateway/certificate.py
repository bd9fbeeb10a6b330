"""The TLS certificate of a gateway: read again when its files have changed."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from vecfleet.gateway.file_stamp import stamp_of

log = logging.getLogger(__name__)

LOOK_S = 1.0


async def follow_certificate(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Keep ``context`` at what the files hold, for new connections; runs until it is cancelled.

    Files that cannot be used, such as a certificate whose key is not written yet, change nothing.
    """
    stamps = stamp_of(cert), stamp_of(key)
    fault = ""
    while True:
        await asyncio.sleep(LOOK_S)
        seen = stamp_of(cert), stamp_of(key)
        if seen == stamps:
            continue
        try:
            # Apart at first: a context that fails half-way would be left with a pair that fits not.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, _no_passphrase)
            context.load_cert_chain(cert, key, _no_passphrase)
        except OSError as error:  # ssl.SSLError is one
            if str(error) != fault:
                log.error("the TLS certificate stays as it was: %s", error)
            fault = str(error)  # it is tried again at each look until it is good
            continue
        stamps, fault = seen, ""
        log.info("the TLS certificate was read again")


def _no_passphrase() -> str:
    """Without it OpenSSL would ask for one on the terminal, and the whole gateway wait."""
    return ""
