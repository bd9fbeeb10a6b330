"""The command line: quick help, exit codes that mean something, errors that say what to do."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import version

import pytest

from vecfleet.common.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidInput,
    JobFailed,
    NoWorker,
    QueueFull,
    SpaceMismatch,
    UnknownCollection,
    VecfleetError,
)
from vecfleet.common.settings import Settings
from vecfleet.fleet.cli import COMMANDS, exit_code_of, run
from vecfleet.fleet.roles import with_given


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: vecfleet {name}")


def test_the_list_of_commands_loads_none_of_them() -> None:
    code = (
        "import sys\nfrom vecfleet.fleet.cli import run\nrun(['--help'])\n"
        "print(*(m for m in sys.modules if m.startswith('vecfleet.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    loaded = done.stdout.splitlines()[-1]
    assert not [name for name in loaded.split() if name.endswith(("_command", "_commands"))]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"vecfleet {version('vecfleet')}"


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["worker"], "torch", "worker"),
        (["gateway"], "fastapi", "gateway"),
        (["aggregator"], "faiss", "aggregator"),
        (["up"], "faiss", "local"),
        (["demo"], "torch", "local"),
    ],
)
def test_a_role_without_its_dependencies_names_the_extra(
    arguments: list[str],
    missing: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == missing else find_spec(name, *rest),
    )
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert missing in told
    assert f"pip install 'vecfleet[{extra}]'" in told


@pytest.mark.parametrize(
    ("url", "shows"),
    [
        ("redis://worker:hunter2@127.0.0.1:1/0", True),
        ("redis://:hunter2@127.0.0.1:1/0", True),
        ("unix:///run/redis.sock?password=hunter2", True),
        ("redis://worker@127.0.0.1:1/0", False),
        ("redis://127.0.0.1:1/0", False),
    ],
)
def test_a_password_that_ps_shows_is_told_of(
    url: str, shows: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with_given(Settings(), redis_url=url)
    assert ("ps shows the password" in caplog.text) == shows
    assert "hunter2" not in caplog.text
    caplog.clear()
    with_given(Settings(redis_url=url), port=1)  # from the environment
    assert not caplog.text


def test_a_bad_setting_stops_any_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VECFLEET_PORT", "eighty")
    monkeypatch.setenv("VECFLEET_MODLE", "m")
    assert run(["status"]) == 2
    told = capsys.readouterr().err
    assert "VECFLEET_PORT" in told
    assert "VECFLEET_MODLE" in told


def test_a_bad_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["worker", "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("x"), 2),
        (ConfigError("x"), 2),
        (SpaceMismatch("x"), 2),
        (UnknownCollection("x"), 4),
        (QueueFull("x"), 3),
        (NoWorker("x"), 3),
        (DeadlineExceeded("x"), 3),
        (JobFailed("x"), 1),
        (VecfleetError("x"), 1),
    ],
)
def test_exit_codes(error: VecfleetError, code: int) -> None:
    assert exit_code_of(error) == code
