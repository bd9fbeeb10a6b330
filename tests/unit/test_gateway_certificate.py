"""A renewed key that cannot be used changes nothing, and asks nobody."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

from certificates import Authority
from servers import require_or_skip

FOLLOW = """
import asyncio, logging, os, shutil, ssl, sys
from pathlib import Path
from vecfleet.gateway import certificate

logging.basicConfig(format="%(message)s")
certificate.LOOK_S = 0.01
os.open(sys.argv[1], os.O_RDWR)  # the first one is a new session's terminal
cert, key, locked, unlocked = map(Path, sys.argv[2:])
said = []
certificate.log.addFilter(lambda record: said.append(record.getMessage()) or True)
certificate.log.setLevel("INFO")

async def until(words):
    while not any(words in line for line in said):
        await asyncio.sleep(0.01)

async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    following = asyncio.create_task(certificate.follow_certificate(context, cert, key))
    await asyncio.sleep(0)
    shutil.copy(locked, key)
    await until("stays as it was")
    shutil.copy(unlocked, key)
    await until("was read again")
    following.cancel()

asyncio.run(main())
"""


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    require_or_skip(shutil.which("openssl"), "openssl")
    own = Authority(tmp_path).issue("localhost")
    locked, key = tmp_path / "locked.key", tmp_path / "tls.key"
    shutil.copy(own.key, key)
    encrypt = ("openssl", "pkcs8", "-topk8", "-v2", "aes-256-cbc", "-passout", "pass:secret")
    subprocess.run([*encrypt, "-in", own.key, "-out", locked], check=True, capture_output=True)
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", FOLLOW, os.ttyname(theirs), own.cert, key, locked, own.key],
            start_new_session=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 0, done.stderr
    assert "passphrase" not in done.stderr.lower()
