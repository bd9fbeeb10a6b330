"""The writer's lease and its fencing token, on each Redis there is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from servers import Process, wait_until

from vecfleet.common import keys
from vecfleet.common.errors import StaleWriter
from vecfleet.worker import writer_lease
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.writer_lease import WriterLease

HOLDS = """
import sys, threading
from vecfleet.common.redis_client import connect
from vecfleet.worker.writer_lease import WriterLease
lease = WriterLease(connect(sys.argv[1]), "main", ttl_s=600)
assert lease.acquire(threading.Event())
print("holds", lease.token, flush=True)
threading.Event().wait()
"""
APART = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")


def can_be_apart() -> bool:
    """Whether a process may have a PID namespace of its own here."""
    found = shutil.which(APART[0])
    return bool(found) and subprocess.run([*APART, "true"], capture_output=True).returncode == 0


def waits(client, caplog) -> bool:
    """Whether one that wants the lease waits for who has it."""
    wants, stop = WriterLease(client, "main"), threading.Event()
    thread = threading.Thread(target=wants.acquire, args=(stop,))
    caplog.clear()
    thread.start()
    try:
        assert wait_until(lambda: wants.token or "holds this index" in caplog.text)
    finally:
        stop.set()
        thread.join()
    return not wants.token


def lease_of(client, holder: str) -> WriterLease:
    """One of another machine: whether its process lives cannot be seen."""
    lease = WriterLease(client, "main", ttl_s=60)
    lease._holder = f"{holder}:1:1@there"
    return lease


def test_who_froze_while_it_took_the_lease_is_older_than_its_heir(client, tmp_path, monkeypatch):
    frozen, heir, stop = lease_of(client, "a"), lease_of(client, "b"), threading.Event()
    script, taken, thaw = frozen._script, threading.Event(), threading.Event()

    def freezing(**call):
        answer = script(**call)
        taken.set()
        assert thaw.wait(60)
        return answer

    monkeypatch.setattr(frozen, "_script", freezing)
    thread = threading.Thread(target=frozen.acquire, args=(stop,))
    thread.start()
    try:
        assert taken.wait(60)
        client.delete(keys.writer("main"))  # its lease runs out
        assert heir.acquire(stop)
        catalog = Catalog.open(tmp_path, token=heir.token)
    finally:
        thaw.set()
        thread.join()
    assert 0 < frozen.token < heir.token
    with pytest.raises(StaleWriter):
        Catalog.open(tmp_path, token=frozen.token)
    catalog.check_writer()
    catalog.close()
    heir.renew()
    with pytest.raises(StaleWriter):
        frozen.renew()


def test_tokens_grow_and_a_waiting_one_is_told_to_stop(client):
    first, second, stop = lease_of(client, "a"), lease_of(client, "b"), threading.Event()
    assert first.acquire(stop)
    thread = threading.Thread(target=second.acquire, args=(stop,))
    thread.start()
    first.release()
    assert wait_until(lambda: second.token > first.token)
    thread.join()
    stop.set()
    assert not first.acquire(stop)


@contextmanager
def held_by_another(client, *before: str):
    """The lease is a process's that runs behind ``before`` and is killed in the end."""
    process = Process([*before, sys.executable, "-c", HOLDS, client.url])
    try:
        process.wait_for_line("^holds")
        yield
    finally:
        process.kill()
        process.close()


def test_a_dead_process_of_the_same_place_holds_nothing(client, caplog):
    with held_by_another(client):
        assert waits(client, caplog)
    assert client.ttl(keys.writer("main")) > 60
    assert not waits(client, caplog)


@pytest.mark.skipif(not can_be_apart(), reason="no PID namespaces for us here")
def test_a_process_of_another_pid_namespace_keeps_its_lease(client, caplog):
    with held_by_another(client, *APART):
        assert waits(client, caplog)


@pytest.mark.parametrize(
    "change",
    [
        lambda host, boot, space: (f"{host}2", boot, space),
        lambda host, boot, space: (host, boot[::-1], space),
        lambda host, boot, space: (host, boot, f"{space}0"),
        None,
    ],
    ids=["host", "boot", "pid namespace", "none"],
)
def test_who_may_be_elsewhere_is_waited_for(client, caplog, change):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()  # its number is nobody's now
    who, place = writer_lease._this_process().split("@")
    host, _, started = who.split(":")
    holder = f"{host}:{process.pid}:{started}"
    if change:
        there, *where = change(host, *place.split("/"))
        holder = f"{there}:{process.pid}:{started}@{'/'.join(where)}"
    client.set(keys.writer("main"), holder, px=600_000)
    assert waits(client, caplog)
    client.set(keys.writer("main"), f"{host}:{process.pid}:{started}@{place}")
    assert not waits(client, caplog)


def test_a_process_whose_number_another_has_now_holds_nothing(client, caplog):
    who, place = writer_lease._this_process().split("@")
    host, pid, started = who.split(":")
    client.set(keys.writer("main"), f"{host}:{pid}:{int(started) - 1}@{place}", px=600_000)
    assert not waits(client, caplog)


def test_with_a_proc_of_other_numbers_nobody_is_taken_for_dead(
    client, caplog, monkeypatch, tmp_path
):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    who, place = writer_lease._this_process().split("@")
    host, _, started = who.split(":")
    client.set(keys.writer("main"), f"{host}:{process.pid}:{started}@{place}", px=600_000)
    (tmp_path / "sys").symlink_to("/proc/sys")
    (tmp_path / "self").symlink_to("/proc/self")  # it names no process by our number
    monkeypatch.setattr(writer_lease, "_PROC", tmp_path)
    assert waits(client, caplog)


def test_who_cannot_be_seen_is_waited_for(client, caplog, monkeypatch):
    holder = WriterLease(client, "main", ttl_s=600)
    assert holder.acquire(threading.Event())

    def hidden(pid):
        raise PermissionError(pid)

    monkeypatch.setattr(writer_lease, "_started", hidden)
    assert waits(client, caplog)


def test_what_is_no_holder_is_waited_for(client, caplog):
    client.set(keys.writer("main"), b"\xff:x")
    assert waits(client, caplog)
