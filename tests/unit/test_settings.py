"""Settings: typed, every fault at once, and no secret in a log."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import DEFAULT_REDIS_URL, Settings, redact_url

ROOT = Path(__file__).parents[2]


def test_values_get_their_types() -> None:
    settings = Settings.read(
        {"VECFLEET_PORT": "9000", "VECFLEET_DATA": "/srv/vf", "VECFLEET_TIMEOUT_S": "2.5"}
    )
    assert (settings.port, settings.data, settings.timeout_s) == (9000, Path("/srv/vf"), 2.5)


def test_what_is_not_ours_is_not_read_and_empty_means_unset() -> None:
    assert Settings.read({"HOME": "/root", "VECFLEET_PORT": ""}) == Settings.read({})


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.read(
            {
                "VECFLEET_PORT": "eighty",
                "VECFLEET_REDIS_URL": "localhost:6379",
                "VECFLEET_LOG_LEVEL": "loud",
                "VECFLEET_PROT": "8000",
            }
        )
    message = str(caught.value)
    for name in ("PORT", "REDIS_URL", "LOG_LEVEL"):
        assert f"VECFLEET_{name}: " in message
    assert "VECFLEET_PROT is no setting" in message


def test_a_password_is_in_neither_repr_nor_error() -> None:
    settings = Settings.read({"VECFLEET_REDIS_URL": "redis://ann:hunter2@redis.example:6379/0"})
    assert settings.redis_url is not None
    assert "hunter2" in settings.redis_url
    assert "hunter2" not in repr(settings) + str(settings)
    with pytest.raises(ConfigError) as caught:
        Settings.read({"VECFLEET_REDIS_URL": "http://ann:hunter2@redis.example"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:pw@h:1/0", "redis://***@h:1/0"),
        ("redis://u:pw@h:1/0", "redis://***@h:1/0"),
        ("redis://h:1/0?password=pw&db=2", "redis://h:1/0?password=***&db=2"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
    ],
)
def test_redaction(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings.read({}).port = 1  # type: ignore[misc]


def test_the_redis_of_the_fleet_that_runs_here_is_found(tmp_path: Path) -> None:
    settings = Settings.read({"VECFLEET_DATA": str(tmp_path)})
    assert settings.find_redis_url() == DEFAULT_REDIS_URL
    (tmp_path / "fleet.json").write_text(json.dumps({"redis_url": "unix:///x.sock", "pid": 1}))
    assert settings.find_redis_url() == "unix:///x.sock"
    chosen = settings.model_copy(update={"redis_url": "redis://other:6379/0"})
    assert chosen.find_redis_url() == "redis://other:6379/0"
    (tmp_path / "fleet.json").write_text("{")
    assert settings.find_redis_url() == DEFAULT_REDIS_URL


def test_the_environment_is_read_in_one_place() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    readers = [
        name
        for name in listed
        if not name.startswith("tests/")
        and (ROOT / name).exists()
        and any(word in (ROOT / name).read_text() for word in ("os.environ", "os.getenv"))
    ]
    assert readers == ["common/settings.py"]
