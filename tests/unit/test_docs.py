"""The documents say what the code does: names, tables and links are compared."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from fastapi.routing import APIRoute
from prometheus_client import generate_latest

from vecfleet.common import errors, keys
from vecfleet.common.fleet_state import FleetState
from vecfleet.common.model import ModelCard
from vecfleet.common.settings import PREFIX, Settings
from vecfleet.fleet.cli import COMMANDS
from vecfleet.gateway import metrics
from vecfleet.gateway.app import create_app
from vecfleet.gateway.config import GatewayConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def without_code(text: str) -> str:
    return FENCE.sub("", text)


def fences(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$", text, re.M)
    assert found, f"there is no section {title!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.M)
    return rest[: end.start()] if end else rest


def rows(text: str) -> Iterator[list[str]]:
    """The cells of a table's rows, without its head."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
    return plain.replace(" ", "-")


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text()), re.M)
    return {anchor(heading) for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        assert "://" not in target, f"{path.name} links out: {target}"
        file, _, fragment = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path.name}: {target}"
        if fragment:
            assert fragment in anchors(found), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_python_in_the_pages_parses(path: Path) -> None:
    for program in fences(path.read_text(), "python"):
        ast.parse(program)


def test_the_pages_name_no_python_name_that_is_gone() -> None:
    for path in PAGES:
        for program in fences(path.read_text(), "python"):
            for node in ast.walk(ast.parse(program)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vecfleet"):
                    module = __import__(str(node.module), fromlist=["_"])
                    for name in node.names:
                        assert hasattr(module, name.name), f"{path.name}: {name.name}"


def test_commands_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    scripts = fences((ROOT / "README.md").read_text(), "bash")
    assert scripts
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for line in script.splitlines():
            word, _, rest = line.partition(" ")
            first = rest.split(" ")[0]
            if word == "make":
                assert first in targets, line
            elif word == "vecfleet":
                assert first in COMMANDS, line
                for option in re.findall(r"(?<= )--[a-z-]+", rest):
                    assert option in options_of(first), line


def options_of(command: str) -> set[str]:
    import importlib

    lazy = COMMANDS[command]
    found = getattr(importlib.import_module(lazy.module), lazy.attribute)
    commands = [found, *getattr(found, "commands", {}).values()]
    return {option for one in commands for parameter in one.params for option in parameter.opts}


def test_every_key_is_documented_and_no_other() -> None:
    pattern = re.compile(r"^((?:rq|vf):\S+)", re.M)
    schema = set(pattern.findall(keys.__doc__ or ""))
    documented = {
        row[0].strip("`") for row in rows(section(page("redis.md"), "Keys")) if ":" in row[0]
    }
    assert documented == schema


def test_every_script_is_documented_and_no_other() -> None:
    scripts = {
        path.relative_to(ROOT).as_posix()
        for folder in ("common", "worker", "producer", "gateway")
        for path in (ROOT / folder).glob("*.lua")
    }
    assert set(re.findall(r"\[`([\w/]+\.lua)`\]", section(page("redis.md"), "Scripts"))) == scripts


def test_the_constants_in_the_key_table_are_the_codes() -> None:
    text = page("redis.md")
    for said, value in (
        ("| `vf:alive:{box}` | string | 30 s", keys.ALIVE_TTL_S == 30),
        ("120 s after the last reply", keys.REPLY_TTL_S == 120),
        ("at most 100,000", keys.MAX_REPLIES == 100_000),
        ("| `vf:sub:{submission}` | hash | 7 days", keys.SUBMISSION_TTL_S == 7 * 24 * 3600),
        ("at most 1,000 |", keys.MAX_KEPT_ERRORS == 1000),
        ("| `vf:writer:{home}` | string | 10 s", keys.LEASE_TTL_S == 10),
        ("| `vf:worker:{worker}` | hash | 60 s", keys.WORKER_TTL_S == 60),
        ("for 30 days", keys.DEAD_TTL_S == 30 * 24 * 3600),
        ("500 s by", keys.RESULT_TTL_S == 500),
    ):
        assert said in text, said
        assert value, said


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {
        row[0].strip("`"): row[1].strip("`")
        for row in rows(section(page("operations.md"), "Settings"))
    }
    fields = {PREFIX + name.upper(): field for name, field in Settings.model_fields.items()}
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        if name != f"{PREFIX}REDIS_URL":
            default = "none" if field.default is None else str(field.default)
            assert documented[name] == default, name


def test_the_choices_of_settings_are_documented() -> None:
    documented = {
        row[0].strip("`"): row[2] for row in rows(section(page("operations.md"), "Settings"))
    }
    for name, field in Settings.model_fields.items():
        for choice in choices(field.annotation):
            assert f"`{choice}`" in documented[PREFIX + name.upper()], (name, choice)


def choices(annotation: Any) -> list[str]:
    if get_origin(annotation) in (Union, UnionType):
        return [choice for part in get_args(annotation) for choice in choices(part)]
    return [c for c in get_args(annotation) if isinstance(c, str)]


def test_every_metric_is_documented_and_no_other() -> None:
    counted = metrics.HttpMetrics()
    counted.observe("GET", "/health", 200, 0.1)
    shown = generate_latest(counted.registry).decode()
    card = ModelCard("m", ("embed",), "s", 1, 1, "float32", "fake")
    fleet = metrics._FleetCollector(
        FleetState((), ()),
        [metrics.ServedModel(card, (), 0)],
    )
    names = set(re.findall(r"^# TYPE (\w+) (?:counter|gauge|histogram)$", shown, re.M))
    names = {name for name in names if not name.endswith("_created")}
    names |= {metric.name for metric in fleet.collect()}
    documented = {
        row[0].strip("`")
        for row in rows(section(page("operations.md"), "What to watch"))
        if row[0].startswith("`vecfleet_")
    }
    assert documented == names


def test_every_role_is_documented() -> None:
    roles = section(page("operations.md"), "Roles")
    for name in COMMANDS:
        if name != "demo":
            assert re.search(rf"`(vecfleet )?{name}`", roles), name


def test_every_route_is_documented_and_no_other() -> None:
    app = create_app(None, GatewayConfig("redis://nowhere"))  # type: ignore[arg-type]
    routes = {
        f"{method} {route.path.replace(':path', '')}"
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert routes
    documented = re.findall(r"^### ((?:GET|POST|PUT|DELETE) \S+)$", page("http.md"), re.M)
    assert sorted(documented) == sorted(routes)


def test_the_error_table_is_the_codes() -> None:
    documented = {
        row[0].strip("`"): (int(row[1]), row[2], row[3])
        for row in rows(section(page("http.md"), "Errors"))
    }
    assert documented == {
        code: (
            errors.HTTP_STATUS[code],
            "yes" if kind.retryable else "no",
            (kind.__doc__ or "").split("\n", 1)[0],
        )
        for code, kind in errors.BY_CODE.items()
        if kind.__module__ == errors.__name__
    }


def test_the_state_machine_is_drawn_from_the_scripts() -> None:
    """Each outcome that settle.lua knows, and each script, has its transition."""
    text = section(page("architecture.md"), "The job's state machine")
    settle = (ROOT / "worker" / "settle.lua").read_text()
    outcomes = re.findall(r"^--   (\w+) {2,}\w", settle, re.M)
    assert {"answer", "hand_on", "commit", "fail", "finish"} <= set(outcomes)
    for outcome in outcomes:
        assert f"`settle.lua`, `{outcome}`" in text, outcome
    for script in ("enqueue", "claim", "release", "rescue", "cancel"):
        assert f"`{script}.lua`" in text, script
