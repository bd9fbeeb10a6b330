"""Real passages: the docstrings of installed packages."""

from __future__ import annotations

import ast
import random
from importlib import util
from pathlib import Path

PACKAGES = ("transformers", "scipy", "numpy")


def passages(count: int, seed: int = 0) -> list[str]:
    """``count`` distinct docstrings in a fixed random order."""
    found: dict[str, None] = {}
    for package in PACKAGES:
        spec = util.find_spec(package)
        assert spec is not None and spec.origin is not None
        for file in sorted(Path(spec.origin).parent.rglob("*.py"))[:400]:
            found.update(dict.fromkeys(_docstrings(file)))
        if len(found) >= 2 * count:
            break
    texts = list(found)
    assert len(texts) >= count
    random.Random(seed).shuffle(texts)
    return texts[:count]


def _docstrings(file: Path) -> list[str]:
    tree = ast.parse(file.read_text("utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if text and len(text) > 60]
