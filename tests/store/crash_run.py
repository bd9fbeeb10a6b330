"""One life of a partition's writer, which may end anywhere: run by test_store_crash.py.

Arguments: directory, seed, crash point, its occurrence, crash point of the maintenance child.
Applies what is not yet in the log of acknowledged shards, out of order, with duplicates, a few
shards a call, with maintenance in between.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from index_oracle import open_writer, settle, shard

SHARDS = 70
DOCUMENTS = 600
ROWS = 60

Plan = list[tuple[str, list[tuple[str, int]], list[tuple[str, int]]]]


def make_plan() -> Plan:
    """Shards whose result does not depend on their order: shard k holds version k of everything."""
    generator = random.Random(5)
    plan: Plan = []
    for k in range(SHARDS):
        chosen = generator.sample(range(DOCUMENTS), ROWS + 3)
        rows = [(f"doc-{i}", k) for i in chosen]
        plan.append((f"s{k:03d}", rows[:ROWS], rows[ROWS:]))
    return plan


def acknowledged(directory: Path) -> set[str]:
    log = directory.with_suffix(".log")
    return set(log.read_text().split("\n")[:-1]) if log.exists() else set()


def acknowledge(directory: Path, shard_ids: list[str]) -> None:
    with directory.with_suffix(".log").open("a") as log:
        log.write("".join(f"{shard_id}\n" for shard_id in shard_ids))
        log.flush()
        os.fsync(log.fileno())


def main() -> None:
    directory, seed, point, occurrence = Path(sys.argv[1]), *sys.argv[2:5]
    generator, seen = random.Random(int(seed)), [0]

    def crash(name: str) -> None:
        if name == point:
            seen[0] += 1
            if seen[0] == int(occurrence):
                os.kill(os.getpid(), signal.SIGKILL)

    plan = make_plan()
    done = acknowledged(directory)
    writer = open_writer(directory, int(seed), crash=crash, crash_child_at=sys.argv[5])
    waiting = [one for one in plan if one[0] not in done]
    generator.shuffle(waiting)
    while waiting:
        batch = [waiting.pop() for _ in range(min(len(waiting), generator.randint(1, 3)))]
        batch += generator.sample(plan, 1) if generator.random() < 0.3 else []
        writer.apply([shard(*one) for one in batch])
        acknowledge(directory, [one[0] for one in batch])
        done.update(one[0] for one in batch)
        waiting = [one for one in waiting if one[0] not in done]
        # No version below the oldest shard that is still to come can arrive.
        watermark = min((one[1][0][1] for one in waiting), default=SHARDS)
        writer.maintain(watermark=watermark)
        if generator.random() < 0.15:
            settle(writer, watermark=watermark)
    settle(writer)
    writer.close()


if __name__ == "__main__":
    main()
