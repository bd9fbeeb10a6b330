"""The promise under the faults of docs/guarantees.md, in a share that fits a test run.

A failure of a whole run prints the command that runs the same plan again. Of the others a failure
prints the seed; ``CHAOS_SEED=... pytest`` gives them the same one.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from chaos.crash_points import POINTS
from chaos.faults import NETWORK
from chaos.fleet import Fleet
from chaos.parts import Part, part
from chaos.power import cut_off_the_last_second
from chaos.scenes import QUICK, finish, stop_at, wait, wait_for_progress, wait_for_settlement_by

SEED = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))
CALLS = 10


@pytest.fixture(autouse=True)
def told_seed():
    print(f"seed {SEED}")


def kept(tmp_path, run):
    outcome = run.run(tmp_path)
    assert outcome.is_kept, (outcome.failures, run.command)
    return outcome


def test_a_death_at_each_crash_point_loses_and_doubles_nothing(tmp_path):
    outcome = kept(tmp_path, part("points", seed=SEED))
    assert set(outcome.fired) == set(POINTS)
    assert outcome.acknowledged > 100


def test_a_storm_of_faults_loses_and_doubles_nothing(tmp_path):
    plan = replace(QUICK, seed=SEED, aggregators=2, small_disk=True)
    outcome = kept(tmp_path, Part("storm", plan, duration_s=8.0, gap_s=0.2))
    assert sum(outcome.kills.values()) >= 10
    assert outcome.acknowledged > 100


def test_a_bad_network_loses_and_doubles_nothing(tmp_path):
    weights = dict.fromkeys((*NETWORK, "kill"), 1)
    plan = replace(QUICK, seed=SEED)
    outcome = kept(tmp_path, Part("storm", plan, duration_s=5.0, gap_s=0.25, weights=weights))
    assert sum(outcome.faults.values()) >= 5


def test_a_writer_that_stood_still_does_no_harm_when_it_goes_on(tmp_path):
    with Fleet(tmp_path, replace(QUICK, seed=SEED, aggregators=2)) as fleet:
        wait_for_progress(fleet, CALLS)
        zombie, heir = fleet.of("aggregator")
        heir.is_wanted = False
        heir.kill()
        heir.wait(10.0)
        # Not inside the commit: there it holds the file's lock, and nobody can take over.
        stop_at(fleet, zombie, "aggregator.segment_renamed")
        heir.is_wanted = True  # the next look starts it, and it waits for the lease
        wait_for_progress(fleet, CALLS)
        wait(fleet, lambda: "ready" in Path(heir.order.log).read_text(), "the heir has taken over")
        wait_for_settlement_by(fleet, heir)
        zombie.resume()
        wait(fleet, lambda: 1 in zombie.codes, "the writer that was taken over has ended")
        wait_for_progress(fleet, CALLS)
        verdict, strange = finish(fleet)
        assert verdict.is_kept and not strange, (str(verdict), strange, SEED)
        assert "another writer has taken" in Path(zombie.order.log).read_text().lower()


def test_a_killed_redis_that_keeps_its_file_loses_nothing(tmp_path):
    with Fleet(tmp_path, replace(QUICK, seed=SEED, persistence="always")) as fleet:
        for _ in range(2):
            wait_for_progress(fleet, CALLS)
            fleet.restart_redis()
        wait_for_progress(fleet, CALLS)
        verdict, strange = finish(fleet)
        assert verdict.is_kept and not strange, (str(verdict), strange, SEED)


def test_a_redis_that_keeps_nothing_leaves_nobody_waiting(tmp_path):
    """Clients hear that their jobs are lost, or notice it, and send them again."""
    plan = replace(QUICK, seed=SEED, persistence="none", until="done", deletes=False)
    with Fleet(tmp_path, plan) as fleet:
        wait_for_progress(fleet, CALLS)
        fleet.restart_redis()
        wait_for_progress(fleet, CALLS)
        verdict, strange = finish(fleet, redis_lost_data=True)
        assert verdict.is_kept and not strange, (str(verdict), strange, SEED)


def test_a_power_cut_loses_at_most_the_last_second_and_is_noticed(tmp_path):
    plan = replace(QUICK, seed=SEED, persistence="everysec", until="done", deletes=False)
    with Fleet(tmp_path, plan) as fleet:
        wait_for_progress(fleet, CALLS)
        fleet.restart_redis(lose=lambda: cut_off_the_last_second(fleet.server))
        wait_for_progress(fleet, CALLS)
        verdict, strange = finish(fleet, redis_lost_data=True)
        assert verdict.is_kept and not strange, (str(verdict), strange, SEED)


def test_jobs_of_a_killed_worker_are_settled_by_another(tmp_path):
    outcome = kept(tmp_path, part("recovery", seed=SEED))
    assert len(outcome.recoveries_s) == 1
