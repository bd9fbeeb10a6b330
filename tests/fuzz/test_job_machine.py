"""The state machine of jobs, a short run; and mutants of the scripts, which it has to notice."""

from pathlib import Path
from unittest import mock

import pytest
from chaos.mutants import no_version_check
from fuzz.index_machine import IndexMachine
from fuzz.job_machine import JobMachine
from fuzz.sizes import sized
from hypothesis.stateful import run_state_machine_as_test

from vecfleet.common import queue_client
from vecfleet.common.errors import VecfleetError
from vecfleet.common.redis_client import read_lua
from vecfleet.worker import ledger, partition
from vecfleet.worker.manifest import Manifest

LONG = 10  # times as many examples of make fuzz
MOST = 200  # examples after which a mutant must have been noticed; they are by the fifteenth
MUTANTS = {
    "no fence": (
        "local held = redis.call('ZREM', 'vf:lease:' .. queue, member) == 1",
        "redis.call('ZREM', 'vf:lease:' .. queue, member) local held = true",
    ),
    "a commit that does not count": (
        "if redis.call('SETBIT', ok, block, 1) == 1 then return end",
        "redis.call('SETBIT', ok, block, 1) do return end",
    ),
    "rescue of what has not expired": ("'-inf', text(now_ms), 'LIMIT'", "'-inf', '+inf', 'LIMIT'"),
    "a committed block taken again": (
        "redis.call('GETBIT', KEYS[6], block) == 1 then number = -2",
        "false then number = -2",
    ),
    "what waits of all tenants is counted twice": (
        "if add(sum, '', tokens, bytes, jobs)",
        "add(sum, '', tokens, bytes, jobs) if add(sum, '', tokens, bytes, jobs)",
    ),
    "a queue that ran empty stays in line": ("redis.call('ZREM', places, queue)\n", "\n"),
    "a cancelled job keeps its lease": ("redis.call('ZREM', 'vf:lease:' .. queue, member)\n", "\n"),
}


def run(redis_url, mutant=("", ""), examples=100, times=1, base=JobMachine, **told):
    machine = type("Machine", (base,), {"url": redis_url, "mutant": mutant, **told})
    machine.ends.clear()
    run_state_machine_as_test(
        machine,
        settings=sized(examples, times, shrinks=False),
    )
    return machine.ends


def test_every_job_is_in_one_place_whatever_happens(redis_url):
    ends = run(redis_url, times=LONG)
    assert set(ends) == {"queued", "leased", "merged", "dead", "cancelled"}, ends


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_scripts_is_noticed(redis_url, name):
    scripts = read_lua(Path(ledger.__file__).parent, "ledger", "rescue")
    scripts += read_lua(Path(queue_client.__file__).parent, "enqueue", "cancel")
    assert MUTANTS[name][0] in scripts, "the mutant's place has changed"
    with pytest.raises((AssertionError, KeyError)):
        run(redis_url, MUTANTS[name], examples=MOST)


def test_what_was_acknowledged_is_in_the_index_once(redis_url):
    ends = run(redis_url, examples=40, times=LONG, base=IndexMachine)
    assert {"merged", "leased"} <= set(ends), ends


def test_a_settlement_before_the_commit_is_noticed(redis_url):
    with pytest.raises(AssertionError):
        run(redis_url, examples=MOST, base=IndexMachine, is_hasty=True)


def test_an_index_without_a_version_check_is_noticed(redis_url):
    with mock.patch.object(partition, "deaths_by", partition.deaths_by):
        no_version_check()
        with pytest.raises(AssertionError):
            run(redis_url, examples=MOST, base=IndexMachine)


def test_an_index_without_a_fence_is_noticed(redis_url):
    commit = Manifest.commit

    def anybodys(self, token, *args):
        return commit(self, self.state().token, *args)

    noticed = (AssertionError, VecfleetError, pytest.fail.Exception)
    with mock.patch.object(Manifest, "commit", anybodys), pytest.raises(noticed):
        run(redis_url, examples=MOST, base=IndexMachine)
