"""API keys: their form, their file, and how a gateway reads it again."""

import hashlib
import json
import logging
import os
import stat

import pytest

from vecfleet.common.api_keys import (
    SCOPES,
    KeySet,
    add_key,
    check_scopes,
    id_of,
    new_key,
    read_keys,
    remove_key,
)
from vecfleet.common.errors import ConfigError, InvalidName, NotFound
from vecfleet.common.names import check_tenant
from vecfleet.gateway.keyring import LOOK_S, Keyring


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def tick(self):
        self.now += LOOK_S


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def test_a_key_has_256_random_bits_and_the_file_only_its_digest(path):
    shown, entry = new_key("acme", ["search", "embed"])
    other, _ = new_key("acme", ["search"])
    add_key(path, entry)
    prefix, key_id, secret = shown.split("_")
    assert (prefix, key_id, len(bytes.fromhex(secret)) * 8) == ("vf", entry.id, 256)
    assert shown != other
    assert secret not in path.read_text()
    assert hashlib.sha256(shown.encode()).hexdigest() in path.read_text()
    assert entry.scopes == ("embed", "search")
    assert secret not in repr(entry)
    assert entry.sha256 not in repr(entry)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_only_the_whole_key_is_good(path):
    shown, entry = new_key()
    keys = KeySet([entry])
    assert keys.find(shown) == entry
    wrong = shown[:-1] + ("0" if shown[-1] != "0" else "1")
    for bad in ("", "vf_", wrong, shown + "0", shown.upper(), f" {shown}", entry.sha256, entry.id):
        assert keys.find(bad) is None, bad
    assert KeySet([new_key()[1]]).find(shown) is None


def test_an_ended_key_is_not_good():
    shown, entry = new_key(expires_at=1000)
    keys = KeySet([entry])
    assert keys.find(shown, 999.9) == entry
    assert keys.find(shown, 1000.0) is None


def test_the_comparison_takes_the_same_way_whoever_is_asked_for(monkeypatch):
    from vecfleet.common import api_keys

    compared = []
    monkeypatch.setattr(api_keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)))
    shown, entry = new_key()
    unknown, _ = new_key()
    for given in (shown, unknown, "nonsense"):
        KeySet([entry]).find(given)
    assert len(compared) == 3
    assert all(len(a) == len(b) == 64 for a, b in compared)


def test_ids_are_told_of_whole_keys_only():
    shown, entry = new_key()
    assert id_of(shown) == entry.id
    assert id_of(shown[:-1]) == ""
    assert id_of("my password") == ""


def test_keys_are_added_and_removed_and_keep_each_other(path):
    entries = [new_key(note=f"number {n}")[1] for n in range(3)]
    for entry in entries:
        add_key(path, entry)
    remove_key(path, entries[1].id)
    assert read_keys(path).entries == (entries[0], entries[2])
    with pytest.raises(NotFound):
        remove_key(path, entries[1].id)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "../other"},
        {"tenant": "Acme"},
        {"scopes": []},
        {"scopes": ["root"]},
        {"scopes": [["embed"]]},
        {"scopes": "embed"},
        {"id": "../../x"},
        {"sha256": "ab"},
        {"sha256": None},
        {"expires_at": "tomorrow"},
        {"expires_at": True},
        {"created_at": None},
        {"note": "two\nlines"},
        {"password": "x"},
    ],
)
def test_a_wrong_entry_is_refused_and_not_quoted(path, change):
    row = {
        "id": "0" * 12,
        "sha256": "5" * 64,
        "tenant": "-",
        "scopes": ["embed"],
        "created_at": 1,
        "expires_at": None,
        "note": "",
    }
    path.write_text(json.dumps({"version": 1, "keys": [row]}))
    assert len(read_keys(path).entries) == 1
    path.write_text(json.dumps({"version": 1, "keys": [{**row, **change}]}))
    with pytest.raises(ConfigError, match=r"keys\[0\]") as refused:
        read_keys(path)
    assert "5" * 64 not in str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2, "keys": []}', '{"version": 1}'])
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_text(content)
    with pytest.raises(ConfigError, match="key file"):
        read_keys(path)


def test_a_file_that_anybody_may_write_is_refused(path):
    add_key(path, new_key()[1])
    path.chmod(0o602)
    with pytest.raises(ConfigError, match="anybody may write"):
        read_keys(path)


def test_scopes_are_known_ones():
    assert check_scopes(reversed(SCOPES)) == SCOPES
    with pytest.raises(ConfigError):
        check_scopes(["embed", "all"])


@pytest.mark.parametrize("name", ["-", "a", "acme", "9to5", "a-b_c", "x" * 32])
def test_tenants_have_plain_names(name):
    assert check_tenant(name) == name


@pytest.mark.parametrize(
    "name", ["", "--", "-a", "_a", "A", "a.b", "a/b", "..", "a\0", "a\n", "x" * 33, "аcme", 1, None]
)
def test_other_names_are_no_tenants(name):
    with pytest.raises(InvalidName):
        check_tenant(name)


def test_a_keyring_follows_its_file(path):
    first, one = new_key()
    second, two = new_key()
    add_key(path, one)
    clock = Clock()
    ring = Keyring(path, clock)
    add_key(path, two)
    assert ring.find(second) is None  # it has not looked yet
    clock.tick()
    assert ring.find(second) == two
    remove_key(path, one.id)
    clock.tick()
    assert ring.find(first) is None
    assert ring.find(second) == two


def test_a_broken_file_keeps_the_old_keys_and_is_told_once(path, caplog):
    shown, entry = new_key()
    add_key(path, entry)
    clock = Clock()
    ring = Keyring(path, clock)
    good = path.read_text()
    for breaks in (lambda: path.write_text(good[:-20]), path.unlink):
        breaks()
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                clock.tick()
                assert ring.find(shown) == entry
        assert len(caplog.records) == 1
        assert entry.sha256 not in caplog.text
    other, new = new_key()
    add_key(path, new)
    clock.tick()
    assert ring.find(other) == new
    assert ring.find(shown) is None


def test_a_file_that_is_mended_within_one_tick_of_its_clock_is_read(path):
    """A half-written file may have the size and the times of the whole one."""
    shown, entry = new_key()
    add_key(path, entry)
    clock = Clock()
    ring = Keyring(path, clock)
    good = path.read_text()
    path.write_text("{" * len(good))
    clock.tick()
    ring.find(shown)
    broken = path.stat()
    path.write_text(good)
    os.utime(path, ns=(broken.st_atime_ns, broken.st_mtime_ns))
    clock.tick()
    assert ring.find(shown) == entry
    assert ring._fault == ""


def test_a_keyring_needs_its_file_at_the_start(path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Keyring(path)
