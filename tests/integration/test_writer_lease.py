"""The writer's lease and its fencing token, on each Redis there is."""

from __future__ import annotations

import threading

import pytest
from servers import wait_until

from vecfleet.common import keys
from vecfleet.common.errors import StaleWriter
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.writer_lease import WriterLease


def lease_of(client, holder: str) -> WriterLease:
    """One of another machine: whether its process lives cannot be seen."""
    lease = WriterLease(client, "main", ttl_s=60)
    lease._holder = f"{holder}:1:1"
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
