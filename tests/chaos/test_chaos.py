"""The promise under the faults of docs/guarantees.md, in a share that fits a test run.

A failure of a whole run prints the command that runs the same plan again. Of the others a failure
prints the seed; ``CHAOS_SEED=... pytest`` gives them the same one.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from chaos import settlements
from chaos.asker import answers
from chaos.client_ledger import read_calls, read_notes
from chaos.crash_points import POINTS
from chaos.faults import NETWORK
from chaos.fleet import Fleet, with_everything
from chaos.leftovers import acknowledged_submissions, check_counts, unfinished
from chaos.parts import Part, part
from chaos.power import PowerCut, noticed
from chaos.scenes import QUICK, finish, stop_at, wait, wait_for_progress, wait_for_settlement_by
from chaos.verdict import Verdict

from vecfleet.common import keys
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.names import new_id
from vecfleet.common.redis_client import connect_async

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
    plan = with_everything(replace(QUICK, seed=SEED, aggregators=2, small_disk=True))
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
        sees_what_is_planted_now(fleet)


def sees_what_is_planted_now(fleet: Fleet) -> None:
    """The oracle, of a fleet that is well: a forgotten submission, a count, a settlement."""
    submissions = acknowledged_submissions(fleet)
    notes = list(settlements.read(fleet.redis))
    for outcome in ("hand_on", "commit"):
        noted = {note.job.partition("-")[0] for note in notes if note.outcome == outcome}
        assert submissions and set(submissions) <= noted
    forgotten, counted = list(submissions)[:2]
    fleet.redis.delete(keys.submission(forgotten))
    fleet.redis.hincrby(keys.submission(counted), "committed_documents", 1)
    assert len(unfinished(fleet.redis, submissions)) == 1
    verdict = Verdict()
    check_counts(fleet.redis, submissions, [], verdict)
    assert len(verdict.lost) == len(verdict.doubled) == 1
    commit = next(note for note in notes if note.outcome == "commit")
    assert settlements.settled_twice([*notes, commit])


def lose_what_was_accepted(fleet: Fleet) -> PowerCut:
    """Kill Redis when something is accepted and not done, until that has lost something.

    Where we are held up for a second in between, it is on the disk already.
    """
    for _ in range(10):
        cut = kill_with_something_accepted(fleet)
        if any(not lost.was_done for lost in cut.lost):
            return cut
        wait_for_progress(fleet, 1)
    raise AssertionError(f"nothing was lost, ten times: {cut}")


def kill_with_something_accepted(fleet: Fleet) -> PowerCut:
    def waits() -> bool:
        accepted, done = (
            {
                note.fields["submission"]
                for path in fleet.ledgers()
                for note in read_notes(path, what)
            }
            for what in ("accepted", "done")
        )
        # What is done in Redis is only not told yet: a client may still be asking for it.
        states = [fleet.redis.hget(keys.submission(id), "state") for id in accepted - done]
        return b"closed" in states

    for slot in fleet.of("worker", "aggregator"):
        slot.pause()
    wait(fleet, waits, "something is accepted")
    cut = fleet.restart_redis()
    for slot in fleet.of("worker", "aggregator"):
        slot.resume()
    assert cut is not None
    return cut


@pytest.mark.parametrize("persistence", ["everysec", "none"])
def test_what_redis_lost_is_told_and_sent_again(tmp_path, persistence):
    """With ``everysec`` a kill is a power cut: nothing older than its last seconds is lost."""
    plan = replace(QUICK, seed=SEED, persistence=persistence, until="done", deletes=False)
    with Fleet(tmp_path, plan) as fleet:
        for _ in range(2):
            wait_for_progress(fleet, CALLS)
            lose_what_was_accepted(fleet)
        wait_for_progress(fleet, CALLS)
        verdict, strange = finish(fleet, redis_lost_data=True)
        assert verdict.is_kept and not strange, (str(verdict), strange, SEED)
        assert noticed(fleet.cuts, fleet.ledgers()) >= 2


def blocks_wait(fleet):
    return sum(fleet.redis.llen(name) for name in fleet.redis.scan_iter("rq:queue:*.embed.*.bulk"))


async def fill_merge_queue(fleet):
    """A deletion of what is not there: nothing comes of it, but it waits."""
    async with FleetClient(connect_async(fleet.server.url)) as client:
        for collection in await client.collections():
            version = 1 if collection.spec.versions == "given" else None
            await client.enqueue_delete(
                collection, ["nobody"], submission=new_id(), version=version
            )


def test_what_waits_for_a_writer_parks_and_goes_on_whoever_dies(tmp_path):
    plan = replace(QUICK, seed=SEED, producers=8, http_clients=0, max_merge_bytes=1_000)
    # A deletion would wait for the writer, and not for room.
    plan = replace(plan, deletes=False, given_share=False)
    with Fleet(tmp_path, plan) as fleet:
        for dies in ("worker", "aggregator", "worker"):
            wait_for_progress(fleet, 3)
            (writer,) = fleet.of("aggregator")
            # What waits already when the writer has too much parks; what comes then is refused.
            for worker in fleet.of("worker"):
                worker.pause()
            wait(fleet, lambda: blocks_wait(fleet) >= 2, "blocks wait")
            writer.pause()
            asyncio.run(fill_merge_queue(fleet))
            for worker in fleet.of("worker"):
                worker.resume()
            wait(fleet, lambda: any(fleet.redis.scan_iter("vf:parked:*")), "something is parked")
            fleet.of(dies)[0].kill()
            writer.resume()
        wait_for_progress(fleet, 3)
        verdict, strange = finish(fleet)
        assert verdict.is_kept and not strange, (str(verdict), strange, SEED)


def test_texts_that_kill_and_hang_cost_their_neighbours_nothing(tmp_path):
    plan = replace(QUICK, seed=SEED, poisoners=1, askers=1, max_step_s=1.5)
    with Fleet(tmp_path, plan) as fleet:
        wait(
            fleet,
            lambda: len(read_calls(tmp_path / "poison0.ledger")) > 3,
            "a text that kills and one that hangs are over",
        )
        verdict, strange = finish(fleet)
        assert verdict.is_kept and not strange, (str(verdict), strange, SEED)
        assert verdict.dead >= 3 and not verdict.worn
        assert answers(tmp_path)["answered"]


def test_jobs_of_a_killed_worker_are_settled_by_another(tmp_path):
    outcome = kept(tmp_path, part("recovery", seed=SEED))
    assert len(outcome.recoveries_s) == 1
