"""The product's code has no way to turn data into code: read as syntax, not as text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("common", "producer", "gateway", "worker", "fleet", "bench")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]

MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
MODULES |= {"yaml", "jsonpickle", "code", "codeop", "runpy", "imp", "zipimport", "pty"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"torch.load", "pd.read_pickle", "os.system", "os.popen"}
METHODS |= {"logging.config.dictConfig", "logging.config.fileConfig", "rq.utils.import_attribute"}
FETCHERS = {"requests", "httpx", "aiohttp", "urllib3"}

# Importing by a name that is not a literal: the command's own table and the roles' modules.
MAY_IMPORT_BY_NAME = {"fleet/cli.py", "fleet/roles.py"}
# Opening URLs: an operator's commands that ask their own gateway.
MAY_OPEN_URLS = {"fleet/machine.py", "fleet/http_client.py"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def faults(path: str, tree: ast.AST) -> list[str]:
    found = []
    for name in imports(tree):
        if name.split(".")[0] in MODULES:
            found.append(f"imports {name}")
        if name.split(".")[0] in FETCHERS:
            found.append(f"imports {name}")
        if name in ("urllib.request", "http.client") and path not in MAY_OPEN_URLS:
            found.append(f"imports {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in CALLS or name in METHODS:
            found.append(f"calls {name}")
        literal = node.args and isinstance(node.args[0], ast.Constant)
        if name.endswith("import_module") and not literal and path not in MAY_IMPORT_BY_NAME:
            found.append("imports by a name")
        for keyword in node.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and (
                is_true or not isinstance(keyword.value, ast.Constant)
            ):
                found.append(f"{keyword.arg} may be on")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_turns_no_data_into_code(path: Path) -> None:
    assert faults(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "import yaml",
        "eval(x)",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=settings.trust)",
        "importlib.import_module(name)",
        "import requests",
        "import urllib.request",
    ],
)
def test_the_reading_sees_what_it_looks_for(code: str) -> None:
    assert faults("worker/some.py", ast.parse(code)) != []
