"""Supervision of real processes: restart, order of stopping, hard end, and no orphans."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from servers import Process, eventually, process_exists, wait_until

from vecfleet.common.errors import ConfigError, VecfleetError
from vecfleet.fleet.process import kill_family, marked
from vecfleet.fleet.supervisor import (
    LAST_DELAY_S,
    ChildSpec,
    Supervisor,
    describe_end,
    restart_delay_s,
)

WAITS = "import signal; print('up', flush=True); signal.pause()"
DRAINS = (
    "import signal, sys\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('drained', flush=True), sys.exit(0)))\n"
    "print('up', flush=True)\n"
    "signal.pause()"
)
STUBBORN = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True)\n"
    "while True: time.sleep(60)"
)
HAS_A_CHILD = (
    "import subprocess, sys, signal\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
    "print(child.pid, flush=True)\n"
    "signal.pause()"
)

HAS_A_DAEMON = (
    "import os, signal\n"
    "if os.fork():\n"
    "    signal.pause()\n"
    "os.setsid()\n"
    "if os.fork():\n"
    "    os._exit(0)\n"
    "print(os.getpid(), flush=True)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "while True: signal.pause()"
)


def spec(name: str, code: str, **options: object) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", code), **options)  # type: ignore[arg-type]


class Watched:
    """A supervisor whose lines and events are kept."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.events: list[tuple[str, str]] = []
        self.supervisor = Supervisor(
            lambda name, line: self.lines.append((name, line)),
            lambda event, name: self.events.append((event, name)),
        )

    async def said_again(self, name: str) -> None:
        """Wait until ``name`` runs anew and printed something."""
        await eventually(
            lambda: (
                self.events.count(("started", name)) == 2
                and len([line for line in self.lines if not line[1].startswith("{")]) == 2
            ),
            what=f"{name} once more",
        )

    async def said(self, name: str, line: str, times: int = 1) -> None:
        await eventually(
            lambda: self.lines.count((name, line)) >= times, what=f"{name} saying {line!r}"
        )


async def test_a_killed_child_is_started_again() -> None:
    watched = Watched()
    watched.supervisor.start(spec("one", WAITS))
    await watched.said("one", "up")
    first = watched.supervisor.pids()["one"]

    os.kill(first, signal.SIGKILL)
    await watched.said("one", "up", times=2)
    assert watched.supervisor.pids()["one"] != first
    assert any(
        "ended (killed by SIGKILL); starts again in 0.5 s" in line for _, line in watched.lines
    )
    await watched.supervisor.stop()
    assert watched.supervisor.pids() == {}


async def test_children_drain_in_the_reverse_order_of_their_start() -> None:
    watched = Watched()
    watched.supervisor.start(spec("redis", DRAINS))
    watched.supervisor.start(spec("worker-0", DRAINS), spec("worker-1", DRAINS))
    watched.supervisor.start(spec("gateway", DRAINS))
    for name in ("redis", "worker-0", "worker-1", "gateway"):
        await watched.said(name, "up")
    await watched.supervisor.stop()
    drained = [name for name, line in watched.lines if line == "drained"]
    assert drained[0] == "gateway"
    assert drained[-1] == "redis"
    assert Counter(drained) == Counter(("redis", "worker-0", "worker-1", "gateway"))


async def test_a_child_that_ignores_the_drain_is_killed_at_its_deadline() -> None:
    watched = Watched()
    watched.supervisor.start(spec("deaf", STUBBORN, drain_s=0.2))
    await watched.said("deaf", "up")
    pid = watched.supervisor.pids()["deaf"]
    await watched.supervisor.stop()
    assert not process_exists(pid)
    assert any("did not stop" in line for _, line in watched.lines)


async def test_one_that_is_not_ready_has_nothing_to_drain() -> None:
    watched = Watched()
    options = {"drain_s": 0.5, "early_drain_s": 0.05}
    watched.supervisor.start(spec("ready", STUBBORN, **options), spec("not", STUBBORN, **options))
    await watched.said("ready", "up")
    await watched.said("not", "up")
    watched.supervisor.ready([watched.supervisor.pids()["ready"]])
    await watched.supervisor.stop()
    told = {name: line for name, line in watched.lines if "did not stop" in line}
    assert "within 0.05 s" in told["not"]
    assert "within 0.5 s" in told["ready"]


async def test_a_hard_end_does_not_wait_for_the_drain() -> None:
    watched = Watched()
    watched.supervisor.start(spec("deaf", STUBBORN))
    await watched.said("deaf", "up")
    watched.supervisor.kill()
    async with asyncio.timeout(30):
        await watched.supervisor.stop()


async def test_what_a_dead_child_started_is_ended_too() -> None:
    watched = Watched()
    watched.supervisor.start(spec("parent", HAS_A_CHILD))
    await eventually(lambda: watched.lines, what="the grandchild's pid")
    grandchild = int(watched.lines[0][1])

    os.kill(watched.supervisor.pids()["parent"], signal.SIGKILL)
    await eventually(lambda: not process_exists(grandchild), what="the grandchild's end")
    await watched.supervisor.stop()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_what_left_its_session_and_lost_its_parent_is_ended_too(end: signal.Signals) -> None:
    watched = Watched()
    watched.supervisor.start(spec("parent", HAS_A_DAEMON))
    await eventually(lambda: watched.lines, what="the daemon's pid")
    daemon, parent = int(watched.lines[0][1]), watched.supervisor.pids()["parent"]
    assert os.getsid(daemon) not in (os.getsid(0), daemon)
    assert os.getpgid(daemon) != parent

    if end == signal.SIGKILL:  # it crashes, and by its restart nothing of the first one is there
        os.kill(parent, end)
        await watched.said_again("parent")
        assert not process_exists(daemon)
        daemon = int(watched.lines[-1][1])
        assert process_exists(daemon)
    await watched.supervisor.stop()
    assert not process_exists(daemon)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
async def test_a_family_that_cannot_be_looked_for_at_once_is_ended_all_the_same(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def fails_at_first(mark: str) -> bool:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise kind("no room")
        return kill_family(mark)

    monkeypatch.setattr("vecfleet.fleet.supervisor.kill_family", fails_at_first)
    watched = Watched()
    watched.supervisor.start(spec("parent", HAS_A_DAEMON))
    await eventually(lambda: watched.lines, what="the daemon's pid")
    daemon = int(watched.lines[0][1])
    os.kill(watched.supervisor.pids()["parent"], signal.SIGKILL)
    await watched.said_again("parent")
    try:
        assert not process_exists(daemon)
    finally:
        if process_exists(daemon):
            os.kill(daemon, signal.SIGKILL)
        await watched.supervisor.stop()


async def test_what_lives_is_not_taken_for_gone_where_no_file_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what can be looked at is ended nevertheless."""
    environment, mark = marked(None)
    hidden, seen = [
        await asyncio.create_subprocess_exec("sleep", "600", env=environment) for _ in range(2)
    ]
    read_bytes = Path.read_bytes

    def fails_once(path: Path) -> bytes:
        if path.parent.name == str(hidden.pid):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return read_bytes(path)

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(Path, "read_bytes", fails_once)
        kill_family(mark)
    assert await seen.wait() == -signal.SIGKILL
    assert hidden.returncode is None
    assert kill_family(mark)
    assert await hidden.wait() == -signal.SIGKILL
    assert not kill_family(mark)


async def test_a_family_of_another_child_is_left_alone() -> None:
    watched = Watched()
    watched.supervisor.start(spec("one", HAS_A_DAEMON), spec("two", HAS_A_DAEMON))
    await eventually(lambda: len(watched.lines) == 2, what="two daemons")
    daemons = {name: int(line) for name, line in watched.lines}
    os.kill(watched.supervisor.pids()["one"], signal.SIGKILL)
    await eventually(lambda: not process_exists(daemons["one"]), what="the daemon's end")
    assert process_exists(daemons["two"])
    await watched.supervisor.stop()
    assert not process_exists(daemons["two"])


async def test_children_with_one_turn_start_one_after_the_other() -> None:
    watched = Watched()
    turn, other = asyncio.Lock(), asyncio.Lock()
    first, second = spec("first", WAITS, turn=turn), spec("second", WAITS, turn=turn)
    watched.supervisor.start(first, second, spec("elsewhere", WAITS, turn=other))
    await watched.said("first", "up")
    await watched.said("elsewhere", "up")
    assert ("started", "second") not in watched.events

    watched.supervisor.ready([watched.supervisor.pids()["first"]])
    await watched.said("second", "up")
    assert watched.supervisor.not_ready() == {"second", "elsewhere"}

    os.kill(watched.supervisor.pids()["first"], signal.SIGKILL)  # and again it waits its turn
    await eventually(lambda: ("ended", "first") in watched.events, what="its end")
    assert watched.events.count(("started", "first")) == 1
    watched.supervisor.ready([watched.supervisor.pids()["second"]])
    await watched.said("first", "up", times=2)
    await watched.supervisor.stop()


async def test_one_that_dies_while_starting_gives_its_turn_up() -> None:
    watched = Watched()
    turn = asyncio.Lock()
    watched.supervisor.start(
        spec("broken", "raise SystemExit('boom')", turn=turn), spec("good", WAITS, turn=turn)
    )
    await watched.said("good", "up")
    async with asyncio.timeout(30):
        await watched.supervisor.stop()


@pytest.mark.parametrize("code", [1, 2])
async def test_one_that_was_ready_is_started_again_whatever_ends_it(
    code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vecfleet.fleet.supervisor.FIRST_DELAY_S", 0.001)
    monkeypatch.setattr("vecfleet.fleet.supervisor.LAST_DELAY_S", 0.01)
    mark = tmp_path / "ran"
    runs_once = (
        f"import pathlib, signal, sys\nmark = pathlib.Path({str(mark)!r})\n"
        f"if mark.exists(): sys.exit({code})\n"
        "mark.touch(); print('up', flush=True); signal.pause()"
    )
    watched = Watched()
    watched.supervisor.start(spec("one", runs_once, max_failed_starts=2))
    await watched.said("one", "up")
    watched.supervisor.ready([watched.supervisor.pids()["one"]])
    failure = asyncio.create_task(watched.supervisor.failure())
    os.kill(watched.supervisor.pids()["one"], signal.SIGKILL)
    await eventually(lambda: watched.events.count(("ended", "one")) > 5, what="more tries")
    assert not failure.done()
    mark.unlink()
    await watched.said("one", "up", times=2)
    failure.cancel()
    await watched.supervisor.stop()


async def test_a_process_that_the_machine_has_no_room_for_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vecfleet.fleet.supervisor.FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("vecfleet.fleet.supervisor.LAST_DELAY_S", 0.05)
    monkeypatch.setattr("vecfleet.fleet.supervisor._FAMILY_END_S", 0.05)
    watched = Watched()
    watched.supervisor.start(spec("hit", WAITS), spec("other", WAITS))
    await watched.said("hit", "up")
    await watched.said("other", "up")
    watched.supervisor.settled()
    pids = watched.supervisor.pids()
    failure = asyncio.create_task(watched.supervisor.failure())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))  # no file can be opened any more
    try:
        os.kill(pids["hit"], signal.SIGKILL)
        await eventually(
            lambda: sum("Too many open files" in line for _, line in watched.lines) > 3,
            what="starts that failed",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not failure.done()
    await watched.said("hit", "up", times=2)
    assert watched.supervisor.pids()["other"] == pids["other"]
    failure.cancel()
    await watched.supervisor.stop()


@pytest.mark.parametrize("kind", [ConfigError, OSError, RuntimeError])
async def test_what_cannot_be_prepared_once_more_is_tried_again(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vecfleet.fleet.supervisor.FIRST_DELAY_S", 0.001)
    monkeypatch.setattr("vecfleet.fleet.supervisor.LAST_DELAY_S", 0.01)
    tries = 0

    def fails_for_a_while() -> str:
        nonlocal tries
        tries += 1
        if 1 < tries < 8:
            raise kind("for a moment")
        return ""

    watched = Watched()
    watched.supervisor.start(spec("one", WAITS, prepare=fails_for_a_while))
    await watched.said("one", "up")
    watched.supervisor.ready([watched.supervisor.pids()["one"]])
    failure = asyncio.create_task(watched.supervisor.failure())
    os.kill(watched.supervisor.pids()["one"], signal.SIGKILL)
    await watched.said("one", "up", times=2)
    assert not failure.done()
    assert sum("for a moment" in line for _, line in watched.lines) == 6
    failure.cancel()
    await watched.supervisor.stop()


async def test_a_start_that_only_half_succeeded_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vecfleet.fleet.supervisor.FIRST_DELAY_S", 0.01)
    start = asyncio.create_subprocess_exec
    halves: list[asyncio.subprocess.Process] = []

    async def fails_behind_the_fork(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        process = await start(*args, **kwargs)
        if watched.events.count(("ended", "one")) == 1:
            halves.append(process)
            raise RuntimeError("can't start new thread")
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fails_behind_the_fork)
    watched = Watched()
    watched.supervisor.start(spec("one", WAITS))
    await watched.said("one", "up")
    watched.supervisor.ready([watched.supervisor.pids()["one"]])
    os.kill(watched.supervisor.pids()["one"], signal.SIGKILL)
    await eventually(lambda: watched.events.count(("started", "one")) == 2, what="its restart")
    assert [await half.wait() for half in halves] == [-signal.SIGKILL]
    await watched.supervisor.stop()


async def test_one_that_cannot_be_started_while_the_fleet_comes_up_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vecfleet.fleet.supervisor.FIRST_DELAY_S", 0.001)
    tries = 0

    def fails_from_then_on() -> str:
        nonlocal tries
        tries += 1
        if tries > 1:
            raise OSError("no room")
        return ""

    watched = Watched()
    watched.supervisor.start(spec("one", "raise SystemExit(1)", prepare=fails_from_then_on))
    async with asyncio.timeout(30):
        error = await watched.supervisor.failure()
    assert "one failed 3 times" in error.message
    assert "no room" in error.message
    await watched.supervisor.stop()


async def test_one_that_died_is_not_ready_however_long_redis_names_it() -> None:
    watched = Watched()
    turn = asyncio.Lock()
    watched.supervisor.start(spec("one", WAITS, turn=turn))
    await watched.said("one", "up")
    first = watched.supervisor.pids()["one"]
    watched.supervisor.ready([first])
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: ("ended", "one") in watched.events, what="its end")
    watched.supervisor.ready([first])
    assert watched.supervisor.not_ready() == {"one"}
    await watched.said("one", "up", times=2)
    watched.supervisor.ready([first])
    assert turn.locked()
    watched.supervisor.ready([watched.supervisor.pids()["one"]])
    assert not turn.locked()
    await watched.supervisor.stop()


async def test_one_that_found_no_redis_is_tried_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vecfleet.fleet.supervisor.FIRST_DELAY_S", 0.001)
    monkeypatch.setattr("vecfleet.fleet.supervisor.LAST_DELAY_S", 0.01)
    watched = Watched()
    watched.supervisor.start(spec("early", "import sys; sys.exit(3)", max_failed_starts=1))
    failure = asyncio.create_task(watched.supervisor.failure())
    await eventually(lambda: watched.events.count(("ended", "early")) > 3, what="more tries")
    assert not failure.done()
    failure.cancel()
    await watched.supervisor.stop()


async def test_a_wrong_setting_is_not_tried_again() -> None:
    watched = Watched()
    watched.supervisor.start(spec("bad", "import sys; sys.exit(2)"))
    async with asyncio.timeout(30):
        error = await watched.supervisor.failure()
    assert isinstance(error, ConfigError)
    assert watched.events.count(("started", "bad")) == 1
    await watched.supervisor.stop()


async def test_what_must_be_done_before_a_start_is_done_before_each(tmp_path: Path) -> None:
    watched = Watched()
    told = iter(["mended", "", "never"])
    watched.supervisor.start(spec("one", WAITS, prepare=lambda: next(told)))
    await watched.said("one", "up")
    assert any("mended" in line for name, line in watched.lines if name == "one")
    os.kill(watched.supervisor.pids()["one"], signal.SIGKILL)
    await watched.said("one", "up", times=2)
    assert next(told) == "never"
    await watched.supervisor.stop()


@pytest.mark.parametrize("kind", [ConfigError, IndexError])
async def test_what_cannot_be_prepared_is_not_started(kind: type[Exception]) -> None:
    def fail() -> str:
        raise kind("the file cannot be mended")

    watched = Watched()
    watched.supervisor.start(spec("one", WAITS, prepare=fail))
    async with asyncio.timeout(30):
        error = await watched.supervisor.failure()
    assert "cannot be mended" in str(error)
    assert ("started", "one") not in watched.events
    await watched.supervisor.stop()


async def test_a_program_that_is_not_there_is_named() -> None:
    watched = Watched()
    watched.supervisor.start(ChildSpec("gone", ("/no/such/program",)))
    async with asyncio.timeout(30):
        error = await watched.supervisor.failure()
    assert isinstance(error, ConfigError)
    assert "/no/such/program" in str(error)
    assert watched.events == [("ended", "gone")], "it is not tried again"
    await watched.supervisor.stop()


async def test_a_child_that_never_comes_up_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecfleet.fleet.supervisor.FIRST_DELAY_S", 0.01)
    watched = Watched()
    watched.supervisor.start(spec("broken", "raise SystemExit('boom')"))
    async with asyncio.timeout(30):
        error = await watched.supervisor.failure()
    assert "broken failed 3 times" in str(error)
    assert isinstance(error, VecfleetError)
    assert watched.lines.count(("broken", "boom")) == 3
    await watched.supervisor.stop()


async def test_a_long_line_without_end_is_passed_on_in_pieces() -> None:
    watched = Watched()
    watched.supervisor.start(spec("wide", "print('x' * 3_000_000, flush=True); " + WAITS))
    await watched.said("wide", "up")
    assert sum(len(line) for _, line in watched.lines) >= 3_000_000
    await watched.supervisor.stop()


def test_the_delay_grows_to_a_cap() -> None:
    delays = [restart_delay_s(n) for n in range(1, 20)]
    assert delays == sorted(delays)
    assert (delays[0], delays[1], delays[-1]) == (0.5, 1.0, LAST_DELAY_S)


def test_ends_are_told_in_words() -> None:
    assert describe_end(3) == "exit code 3"
    assert describe_end(-9) == "killed by SIGKILL"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "supervise.py"
    script.write_text(
        "import asyncio, sys\n"
        "from vecfleet.fleet.supervisor import ChildSpec, Supervisor\n"
        "async def main():\n"
        "    s = Supervisor(lambda name, line: None)\n"
        f"    s.start(ChildSpec('a', (sys.executable, '-c', {STUBBORN!r})))\n"
        "    while not s.pids(): await asyncio.sleep(0.01)\n"
        "    print('child', s.pids()['a'], flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    process = Process([sys.executable, str(script)])
    try:
        child = int(process.wait_for_line(r"^child \d+").split()[1])
        process.kill()
        wait_until(lambda: not process_exists(child), what="the child's end")
    finally:
        process.close()
