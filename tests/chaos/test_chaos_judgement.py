"""What the harness concludes: each judgement beside the run, and the plan that a seed names."""

from __future__ import annotations

import argparse
import json
import random
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import redis
from chaos import ends, settlements
from chaos.__main__ import Run
from chaos.agenda import Agenda, Wanted, not_shown
from chaos.client_ledger import Call
from chaos.faults import Faults
from chaos.fleet import Plan
from chaos.launch import Order
from chaos.leftovers import check_counts, unfinished
from chaos.outcome import LEAST_RECOVERIES, Outcome
from chaos.parts import Part, part
from chaos.points import _die_at
from chaos.roles import Slot
from chaos.scenes import QUICK, die_at
from chaos.verdict import Buried, Verdict

from vecfleet.common import keys
from vecfleet.common.redis_client import connect

JSON_KEYS = [
    *("kills", "faults", "acknowledged", "lost", "doubled", "stuck"),
    *("recovery_p50_s", "recovery_p99_s"),
]


class Stub:
    """A slot without a process."""

    def __init__(self, name: str, role: str, running: bool = True, code: int = -9) -> None:
        self.name, self.role = name, role
        self.is_wanted, self.is_stopped, self.crash_at = True, False, ""
        self.life, self.codes, self.pid = 1, [], 1
        self._running, self._code = running, code

    def running(self) -> bool:
        return self._running

    def start(self, **_: object) -> None:
        self.life += 1

    def kill(self) -> None:
        pass

    pause = resume = kill

    def terminate(self) -> None:
        pass

    def wait(self, deadline_s: float) -> int:
        self.codes.append(-9)
        return -9

    def dies(self) -> None:
        self.codes.append(self._code)
        self.life += 1


# What a seed names


class StubFleet:
    """Slots without processes, of which some do not run; and faults that fail."""

    plan = Plan()

    def __init__(self, chance: random.Random | None) -> None:
        roles = ("worker", "aggregator", "gateway", "producer", "search", "http")
        self.slots = {
            f"{role}{n}": Stub(f"{role}{n}", role, chance is None or chance.random() < 0.5)
            for role in roles
            for n in range(2)
        }
        self._fails = chance is not None

    def of(self, *roles: str) -> list[Stub]:
        return [slot for slot in self.slots.values() if slot.role in roles]

    def fill_redis(self) -> None:
        if self._fails:
            raise redis.ConnectionError("away")

    def __getattr__(self, name: str) -> object:
        return SimpleNamespace() if name == "server" else _Anything()


class _Anything:
    def __call__(self, *_: object, **__: object) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        return self


def drawn(seed: int, chance: random.Random | None) -> list[str]:
    faults = Faults(StubFleet(chance), seed=seed)
    for _ in range(300):
        faults.begin_one()
    return faults.plan


def test_a_seed_names_one_plan_whoever_runs_and_whatever_fails():
    plan = drawn(7, None)
    assert drawn(7, random.Random(1)) == drawn(7, random.Random(2)) == plan
    assert drawn(8, None) != plan
    assert len({fault.partition(" ")[0] for fault in plan}) > 8


def test_a_part_is_told_whole_by_its_command():
    plan = replace(QUICK, seed=3, mutants=(("worker", "no_fence"),), persistence="everysec")
    told = Part("storm", plan, duration_s=8.0, gap_s=0.2, weights={"kill": 2})
    words = shlex.split(told.command)
    assert words[:4] == ["PYTHONPATH=tests", "python", "-m", "chaos"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--replay", type=Part.of)
    assert parser.parse_args(words[4:]).replay == told
    for kind in ("points", "recovery", "full_windows"):
        run = part(kind, seed=5, times=7)
        assert Part.of(shlex.split(run.command)[-1]) == run


# What a run must have shown


def test_a_slow_recovery_fails_where_there_are_enough_deaths_to_say_so():
    assert not Outcome(recoveries_s=[59.0] * LEAST_RECOVERIES).is_kept
    assert Outcome(recoveries_s=[11.0] * LEAST_RECOVERIES).is_kept
    assert Outcome(recoveries_s=[59.0]).is_kept
    late = Outcome(recoveries_s=[59.0] * LEAST_RECOVERIES)
    late.kills["worker"] += LEAST_RECOVERIES
    assert closed(late)[0] == 1


def test_a_run_that_shows_nothing_fails():
    assert closed(Outcome())[0] == 1
    empty = Outcome()
    empty.take(Verdict())
    assert empty.failures == ["nothing was acknowledged"]


def closed(outcome: Outcome) -> tuple[int, list[str]]:
    said: list[str] = []
    run = Run(SimpleNamespace())
    run.total = outcome
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **_: said.append(text))
        return run.close(), said


def test_the_last_line_is_json_and_full_windows_are_told_beside_it():
    outcome = Outcome(full_windows=[(32, 27.5)])
    outcome.kills["worker"] += 1
    code, said = closed(outcome)
    assert code == 0
    assert list(json.loads(said[-1])) == JSON_KEYS
    assert any("32 claims 27.5 s" in line for line in said)
    assert any("recovery is not judged" in line for line in said)


def test_a_part_that_fails_tells_how_to_run_it_again(tmp_path, capsys):
    def breaks(_: object) -> Outcome:
        raise TimeoutError("the clients did not fill the queue")

    run = Run(tmp_path)
    run.do(SimpleNamespace(run=breaks, kind="storm", command="chaos --replay 7", plan=Plan()))
    run.do(SimpleNamespace(run=lambda _: pytest.fail("nothing comes after a failure"), kind="x"))
    assert run.close() == 1
    said = capsys.readouterr().out.splitlines()
    assert "FAILED; again: chaos --replay 7" in said
    assert any("did not fill the queue" in line for line in said)
    assert list(json.loads(said[-1])) == JSON_KEYS


def test_the_usual_run_holds_every_part_that_a_target_needs():
    agenda = Agenda(Wanted(1800.0, 1))
    parts = [*agenda.first()]
    while storm := agenda.next_storm():
        parts.append(storm)
        agenda.took(storm.duration_s + 10.0)
    parts += agenda.last()
    assert {p.plan.persistence for p in parts if p.kind == "storm"} == {
        *("always", "everysec", "none")
    }
    times = {p.kind: p.times for p in parts}
    assert times["points"] >= 1 and times["full_windows"] >= 4
    assert times["recovery"] >= LEAST_RECOVERIES
    assert sum(p.duration_s for p in parts) > 600
    assert len({p.plan.seed for p in parts if p.kind == "storm"}) > 5
    short = Agenda(Wanted(30.0, 1))
    assert not [*short.first()] and short.next_storm()
    assert "no storm with Redis on none" in not_shown([part("points", seed=1)], Outcome())


# How somebody died


@pytest.mark.parametrize(("code", "fired"), [(-9, 1), (0, 0), (1, 0), (3, 0)])
def test_only_sigkill_at_a_crash_point_counts(code, fired):
    slot = Stub("worker0", "worker", code=code)
    fleet = SimpleNamespace(of=lambda _: [slot], tend=slot.dies, slots={})
    outcome = Outcome()
    _die_at(fleet, "worker.after_claim", random.Random(1), outcome)
    assert outcome.fired["worker.after_claim"] == fired
    assert bool(outcome.failures) != bool(fired)
    if not fired:
        with pytest.raises(AssertionError, match="not at worker"):
            die_at(fleet, slot, "worker.after_claim")


@pytest.mark.parametrize("role", ["worker", "gateway", "producer", "http", "search", "aggregator"])
def test_a_writer_alone_may_end_with_1(role):
    slot = Stub(f"{role}0", role)
    slot.codes = [-9, 0, 3, 1]
    assert ends.strange(slot) == ([] if role == "aggregator" else [4])


HUNG = "the engine has done no step for 4 s: this worker ends\nTimeout (0:00:00.5)!\nThread 0x7f\n"
BROKEN = "the engine fails on every text: RuntimeError\n"
CRASHED = "Traceback (most recent call last):\nKeyError: 'a bug'\n"


@pytest.mark.parametrize(
    ("code", "says", "is_strange"),
    [
        (1, HUNG, False),
        (1, BROKEN, False),
        (1, CRASHED, True),
        (1, "", True),
        (-11, HUNG, False),
        (-11, BROKEN, True),
        (-6, "", False),
    ],
)
def test_a_worker_that_a_text_ended_has_said_so_in_that_life(tmp_path, code, says, is_strange):
    log, codes = tmp_path / "worker0.log", [-9, code, -9]
    nursery = SimpleNamespace(start=lambda order: 1, code=lambda pid: codes[len(slot.codes)])
    slot = Slot("worker0", "worker", Order((), log=str(log)), nursery)
    for line in (HUNG + BROKEN, says, HUNG + BROKEN):
        slot.start()
        with log.open("a") as file:
            file.write("worker ready\n" + line)
        assert not slot.running()
    assert ends.strange(slot, is_poisoned=True) == ([2] if is_strange else [])
    assert ends.strange(slot) == [2]
    fleet = SimpleNamespace(slots={"worker0": slot}, plan=Plan(poisoners=1))
    told = ends.strange_ends(fleet)
    expected = f"worker0 ended with [{code}]:\nworker ready\n{says}"
    assert told == ([expected] if is_strange else [])


# What is left in Redis


@pytest.fixture
def client(redis_url):
    with connect(redis_url) as client:
        yield client


@pytest.mark.parametrize(
    "name",
    [
        *("vf:sum:embed.x.bulk", "vf:line:embed.x.bulk", "vf:clock:embed.x.bulk"),
        *("vf:parked:vf.-.merge.c0ffee-0.bulk", "vf:load:vf.-.embed.x.bulk"),
    ],
)
def test_counts_that_stay_behind_are_noticed(client, name):
    assert not unfinished(client)
    client.set(name, 1)
    assert unfinished(client) == [name]


def test_an_acknowledged_submission_that_redis_does_not_know_is_stuck(client):
    assert "is unknown" in unfinished(client, ["5ub"])[0]
    client.hset(keys.submission("5ub"), "state", "done")
    assert not unfinished(client, ["5ub"])


@pytest.mark.parametrize(
    ("good", "bad", "wrong"),
    [(9, 1, ""), (10, 0, "lost"), (8, 1, "lost"), (10, 1, "doubled"), (9, 2, "doubled")],
)
def test_what_a_submission_counts_must_be_what_there_is(client, good, bad, wrong):
    told = {"committed_documents": good, "failed_documents": bad}
    client.hset(keys.submission("5ub"), mapping=told)
    verdict = Verdict()
    call = Call("c", 0, "5ub", 0.0, documents=10, dropped=0, is_delete=False)
    check_counts(client, {"5ub": call}, [Buried("5ub-0-refused-3", "a", "text")], verdict)
    assert [name for name in ("lost", "doubled") if getattr(verdict, name)] == wrong.split()


# What Redis notes of settlements


def note(outcome: str, job: str = "j" * 34, worker: str = "w") -> settlements.Note:
    return settlements.Note(1.0, worker, job, "vf.-.embed.x.bulk", outcome)


def test_whatever_is_settled_twice_is_doubled():
    for outcome in ("commit", "hand_on", "fail", "answer"):
        assert settlements.settled_twice([note(outcome), note(outcome)])
        assert not settlements.settled_twice([note("release"), note("taken_over"), note(outcome)])
    taken = [note("taken_over")] * 3
    assert settlements.worker_deaths(taken) == {"j" * 34: 3}


def test_a_script_that_has_changed_is_an_error(monkeypatch):
    from vecfleet.worker import ledger

    monkeypatch.setattr(ledger, "read_lua", lambda *_: "return 1\n")
    settlements.plant()
    with pytest.raises(LookupError, match="change the harness too"):
        ledger.read_lua(None, "ledger", "settle")
