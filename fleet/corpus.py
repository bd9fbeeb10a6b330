"""Real passages that are on every machine: the docstrings of the installed Python packages.

Sources are parsed, never imported. The passages come in the same order each time, each under its
dotted name, so that the same installation gives the same documents.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MIN_CHARACTERS = 80
MAX_CHARACTERS = 1000
_MAX_SOURCE_BYTES = 4 << 20
_SKIPPED_FOLDERS = frozenset(("__pycache__", "tests", "test", "testing", "_vendor", "vendor"))
_TURN = 40  # documents of one package before the next one's turn
_KINDS = {ast.Module: "module", ast.ClassDef: "class"}

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_corpus(root: Path | None = None, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Documents as ``parse_document`` takes them, made from the packages below ``root``.

    ``root`` is this environment's site-packages by default. Packages take turns, so that the first
    ``limit`` documents tell of all of them. A name or a text that comes up again (a property and
    its setter, a method that every model repeats) is told once.
    """
    root = root or Path(sysconfig.get_path("purelib"))
    return itertools.islice(
        _unique(_in_turns([_package(path, root) for path in _listed(root)])), limit
    )


def _unique(documents: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    names: set[str] = set()
    texts: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document["text"].encode(), digest_size=16).digest()
        if document["id"] not in names and digest not in texts:
            names.add(document["id"])
            texts.add(digest)
            yield document


def _in_turns(packages: list[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    while packages:
        left = []
        for package in packages:
            turn = list(itertools.islice(package, _TURN))
            yield from turn
            if len(turn) == _TURN:
                left.append(package)
        packages = left


def _package(start: Path, root: Path) -> Iterator[dict[str, Any]]:
    for path in _sources(start):
        module = _dotted(path.relative_to(root))
        for name, kind, docstring in _docstrings(path, module):
            yield {
                "id": name,
                "text": docstring,
                "metadata": {
                    "package": module.split(".", 1)[0],
                    "kind": kind,
                    "file": path.relative_to(root).as_posix(),
                },
            }


def passage(docstring: str) -> str | None:
    """A docstring as one passage: its paragraphs up to a sensible length; None when too short.

    The cut falls between paragraphs, or between words where the first paragraph is too long.
    """
    text = inspect.cleandoc(docstring).strip()
    if len(text) < MIN_CHARACTERS:
        return None
    if len(text) <= MAX_CHARACTERS:
        return text
    head = text[: MAX_CHARACTERS + 1]
    paragraph = head.rfind("\n\n")
    if paragraph < MIN_CHARACTERS:
        paragraph = max(head.rfind(" "), head.rfind("\n"))
    return head[: paragraph if paragraph >= MIN_CHARACTERS else MAX_CHARACTERS].rstrip()


def _sources(start: Path) -> Iterator[Path]:
    """The sources of one package, those nearest to its top first: they hold what people use."""
    folders = [start] if start.is_dir() else []
    if not folders:
        yield start
    while folders:
        inner: list[Path] = []
        for folder in folders:
            for path in _listed(folder):
                if path.is_dir():
                    inner.append(path)
                else:
                    yield path
        folders = inner


def _listed(folder: Path) -> list[Path]:
    """The packages and modules in a folder, in one order everywhere, private ones last."""
    found = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and not path.is_symlink() and _is_told(path)
    ]
    return sorted(found, key=lambda path: (path.name.startswith("_"), path.name))


def _is_told(path: Path) -> bool:
    if path.is_dir():
        return path.name not in _SKIPPED_FOLDERS and path.suffix == ""
    return path.suffix == ".py" and path.stat().st_size <= _MAX_SOURCE_BYTES


def _dotted(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # Python 2, templates, files that test parsers
    yield from _told(tree, module)


def _told(node: ast.Module | _Definition, name: str) -> Iterator[tuple[str, str, str]]:
    text = passage(ast.get_docstring(node, clean=False) or "")
    if text is not None and _is_unicode(text):
        yield name, _KINDS.get(type(node), "function"), text
    for child in node.body:
        if isinstance(child, _Definition):
            yield from _told(child, f"{name}.{child.name}")


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded; lone surrogates in odd docstrings cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
