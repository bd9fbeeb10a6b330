"""Jobs that nobody admitted: written into Redis by hand, by a hostile or a broken producer.

Each must come to an end (an answer, the dead letter, or nothing where it was nothing), and its
neighbours, good jobs in the same queues, must be done as if it had not been there.
"""

from __future__ import annotations

import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
from index_oracle import shard_bytes, vector_of

from vecfleet.common import codec, keys, payloads
from vecfleet.common.collection import Collection
from vecfleet.worker.shard import build_shard

FUNCTIONS = (
    payloads.EMBED,
    payloads.RERANK,
    payloads.MERGE,
    payloads.SEARCH,
    payloads.GET,
    payloads.UNCHANGED,
    payloads.STATS,
    payloads.CREATE,
    payloads.DELETE,
    "os.system",
    "",
)
_FIELDS = (
    "vf_cost",
    "vf_enqueued",
    "vf_box",
    "vf_deadline",
    "vf_sub",
    "vf_block",
    "vf_docs",
    "vf_refused",
    "vf_merge",
    "vf_version",
    "vf_attempts",
    "vf_named",
    "vf_condemned",
    "vf_from",
    "vf_at",
    "vf_text",
    "vf_deaths",
    "timeout",
    "result_ttl",
    "retries_left",
    "status",
    "origin",
)
_VALUES = (
    b"",
    b"abc",
    b"\xff\xfe",
    b"-1",
    b"0",
    b"1",
    b"3.5",
    b"1e400",
    b"nan",
    b"inf",
    b"0x10",
    b" 7 ",
    b"99999999999999999999",
    b"9223372036854775807",
    b"9" * 400,
    b"9" * 5000,
    b"queued",
    b"1,2,,x",
    b"*",
    b"vf.-.merge.zz-0.bulk",
    b"\0",
    b"a:b:c",
)


ODD = "odd-"  # what the ids of aimed jobs, and of what they hold, begin with
_AIMED = 0.3  # of the jobs are right but for one thing, so that it may go a long way
_METADATA = (
    b'{"a":"\\ud800"}',
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"a":NaN}',
    b'{"n":18446744073709551617}',
)


def _long_prompt() -> dict[str, Any]:
    """Six hundred texts that each get a prompt of 7 MB."""
    return {"texts": ["a"] * 600, "prompt": "x" * (7 << 20), "truncate": True}


@dataclass(frozen=True)
class RawJob:
    """What is written, and where."""

    queue: str
    id: bytes
    fields: dict[str, bytes]

    def __str__(self) -> str:
        shown = {name: value[:60] for name, value in self.fields.items()}
        return f"{self.id[:40]!r} in {self.queue}: {shown}"


class Hostile:
    """Makes jobs that are wrong in one or several ways."""

    def __init__(
        self,
        generator: random.Random,
        queues: Sequence[str],
        books: Collection,
        numbers: Iterator[int],
    ):
        self._random = generator
        self._queues = queues
        self._merge_queue = str(books.merge_queue)
        self._uid = books.uid
        self._space = books.spec.space
        self._dimension = books.spec.dimension
        self._numbers = numbers

    def job(self) -> RawJob:
        """One more."""
        pick, number = self._random, next(self._numbers)
        if pick.random() < _AIMED:
            return pick.choice((self._block, self._shard, self._lie))(number)
        fields: dict[str, bytes] = {"status": b"queued"}
        queue = pick.choice(self._queues)
        fields["origin"] = queue.encode()
        if pick.random() < 0.5:
            fields["vf_cost"] = b"10"
        for name in pick.sample(_FIELDS, pick.choice((0, 0, 1, 1, 2, 5))):
            fields[name] = pick.choice(_VALUES)
        fields["data"] = pick.choice(self._datas())()
        job_id = b"hostile-%d" % number
        if pick.random() < 0.15:
            job_id += pick.choice(
                (b"\xff\xfe", b":", b":x:y", b" \r\n", b"\0", b"-refused-0", b"%s")
            )
        return RawJob(queue, job_id, fields)

    def _block(self, number: int) -> RawJob:
        """A good block of documents, but that nobody has checked the metadata."""
        payload = {
            "ids": [f"{ODD}{number}"],
            "texts": [f"the odd text of {number}"],
            "versions": [number + 1],
            "metadata": [self._random.choice(_METADATA)],
            "truncate": True,
            "uid": self._uid,
            "space": self._space,
        }
        queue = next(queue for queue in self._queues if ".embed." in queue)
        fields = {"vf_merge": self._merge_queue.encode()}
        return self._aimed(number, queue, codec.pack_call(payloads.EMBED, payload), fields)

    def _shard(self, number: int) -> RawJob:
        """What would have become of the block, had the worker not checked it either."""
        data = build_shard(
            f"{ODD}{number}",
            self._space,
            self._dimension,
            ids=[f"{ODD}{number}"],
            texts=[f"the odd text of {number}"],
            vectors=vector_of("odd", number, self._dimension)[None],
            versions=number + 1,
            metadata=[self._random.choice(_METADATA)],
        )
        return self._aimed(number, self._merge_queue, codec.pack_call(payloads.MERGE, data), {})

    def _lie(self, number: int) -> RawJob:
        """A shard of that job which does not hold what it says."""
        data = codec.pack_call(payloads.MERGE, self._resealed(f"{ODD}{number}"))
        return self._aimed(number, self._merge_queue, data, {})

    def _aimed(self, number: int, queue: str, data: bytes, fields: dict[str, bytes]) -> RawJob:
        every = {"status": b"queued", "origin": queue.encode(), "vf_cost": b"10", "data": data}
        return RawJob(queue, b"%s%d" % (ODD.encode(), number), {**every, **fields})

    def _datas(self) -> list[Callable[[], bytes]]:
        return [
            lambda: self._random.randbytes(self._random.choice((0, 1, 10, 1000))),
            lambda: self._call(self._value(4)),
            lambda: self._call(self._payload()),
            lambda: self._call(self._payload()),
            lambda: self._call(self._payload()),
            lambda: self._flipped(self._call(self._payload())),
            lambda: zlib.compress(self._call(self._payload())),
            lambda: zlib.compress(bytes(80 << 20), 9),  # 80 MB of zeros
            self._empty_lists,
            lambda: zlib.compress(self._call(_long_prompt()), 9),
            lambda: msgpack.packb(self._value(5)),
            lambda: b"\x91" * 5000,
            lambda: b"\xdd\xff\xff\xff\xff" + b"\xc0" * 50,
            lambda: b"\xc6\xff\xff\xff\xff",
            lambda: self._call(self._flipped(shard_bytes("x", [("a", 1)]))),
            lambda: self._call(self._resealed("x")),
            lambda: b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.",  # a pickle
        ]

    def _call(self, payload: Any) -> bytes:
        function = self._random.choice(FUNCTIONS)
        if self._random.random() < 0.1:
            return codec.dumps([function, None, [payload] * self._random.choice((0, 2)), {}])
        return codec.pack_call(function, payload)

    def _payload(self) -> Any:
        """What a good payload looks like, with one thing wrong."""
        good: dict[str, Any] = self._random.choice(
            (
                {"texts": ["a", "b"], "truncate": True},
                {
                    "ids": ["a", "b"],
                    "texts": ["x", "y"],
                    "truncate": True,
                    "uid": self._uid,
                    "space": self._space,
                },
                {"query": "q", "documents": ["a", "b"], "truncate": True},
                {"uid": self._uid, "vectors": bytes(128), "top_k": 3},
                {"uid": self._uid, "ids": ["a"]},
                {"uid": self._uid, "id_keys": bytes(16), "content_keys": bytes(8)},
                {"uid": self._uid},
                {"delete": ["a"], "version": 1},
                {"name": "made", "tenant": "-", "spec": {"model": "m", "space": "s"}},
                {"name": "nobody", "tenant": "-"},
            )
        )
        if self._random.random() < 0.15:
            return self._value(3)
        name = self._random.choice([*good, "extra", "prompt", "dimensions", "metadata", "versions"])
        return {**good, name: self._value(3)}

    def _value(self, depth: int) -> Any:
        pick = self._random
        if depth and pick.random() < 0.3:
            some = [self._value(depth - 1) for _ in range(pick.choice((0, 1, 2, 5)))]
            if pick.random() < 0.5:
                return some
            return {pick.choice(("a", "", "uid", "texts", "é")): value for value in some}
        return pick.choice(
            (
                None,
                True,
                0,
                -1,
                2**63,
                2**64 - 1,
                -(2**63),
                1.5,
                float("nan"),
                float("inf"),
                1e308,
                "",
                " ",
                "text",
                "\0",
                "a" * 5000,
                b"",
                b"\xff" * 128,
                bytes(128),
                self._uid,
                "../..",
                "z" * 32,
                ["a"] * 3000,
                [float("nan")] * 32,
                msgpack.ExtType(5, b"abc"),
                msgpack.ExtType(0, b""),
            )
        )

    def _empty_lists(self) -> bytes:
        """Eight million empty maps, which unpack to a hundred times their size."""
        count = codec.MAX_PAYLOAD_BYTES - 64
        head = b"\x94" + codec.dumps(payloads.EMBED) + b"\xc0\x91"
        return zlib.compress(head + struct.pack(">BI", 0xDD, count) + b"\x80" * (count + 1), 9)

    def _flipped(self, data: bytes) -> bytes:
        made = bytearray(data)
        for _ in range(self._random.choice((1, 3))):
            made[self._random.randrange(len(made))] = self._random.randrange(256)
        return bytes(made)

    def _resealed(self, shard_id: str) -> bytes:
        """A shard that lies under a checksum that is right."""
        rows = [(f"{shard_id}-a", 1), (f"{shard_id}-b", 2)]
        made = bytearray(shard_bytes(shard_id, rows, space=self._space, dimension=self._dimension))
        for _ in range(self._random.choice((1, 2, 8))):
            made[self._random.randrange(12, len(made))] = self._random.randrange(256)
        struct.pack_into("<I", made, 8, zlib.crc32(memoryview(made)[12:]))
        return bytes(made)


def push(client: Any, job: RawJob) -> None:
    """Write ``job`` as nobody should."""
    client.hset(b"rq:job:" + job.id, mapping=job.fields)
    client.rpush(keys.queue_list(job.queue), job.id)


def wait_until_done(client: Any, queues: Sequence[str], deadline_s: float = 60.0) -> None:
    """Until nothing waits and nothing runs in ``queues``."""
    end = time.monotonic() + deadline_s
    while True:
        left = {
            queue: (client.llen(keys.queue_list(queue)), client.zcard(keys.lease(queue)))
            for queue in queues
        }
        if not any(sum(counts) for counts in left.values()):
            return
        assert time.monotonic() < end, f"after {deadline_s} s there are still {left}"
        time.sleep(0.02)
