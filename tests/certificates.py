"""Certificates of an authority that lives as long as the test."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path


class Authority:
    """A root and what it signs, made by the openssl program."""

    def __init__(self, folder: Path, name: str = "root") -> None:
        self._folder = folder
        self.cert, self._key = folder / f"{name}.crt", folder / f"{name}.key"
        _openssl(
            "req", "-x509", *_NEW_KEY, "-days", "2", "-subj", f"/CN={name}",
            "-keyout", str(self._key), "-out", str(self.cert),
        )  # fmt: skip

    def issue(self, name: str, alternatives: str = "") -> Certificate:
        """A certificate for ``name``; ``alternatives`` may be ``DNS:localhost,IP:127.0.0.1``."""
        made = Certificate(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        request, extra = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extra.write_text(f"subjectAltName={alternatives or f'DNS:{name}'}\n")
        _openssl(
            "req", *_NEW_KEY, "-subj", f"/CN={name}",
            "-keyout", str(made.key), "-out", str(request),
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.cert), "-CAkey", str(self._key),
            "-CAcreateserial", "-days", "2", "-extfile", str(extra), "-out", str(made.cert),
        )  # fmt: skip
        return made


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
