"""Damage to what is kept: every flipped byte and every cut is noticed, or changes nothing.

A case is (seed, number): it picks an image and a file, damages it, and reads and writes on as the
search process and the aggregator would. ``judge`` tells "detected" or "harmless" and raises
``Undetected`` for anything else: wrong data, missing data that nothing names, an error that is none
of ours.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzz.images import (
    QUERIES,
    TOP_K,
    Documents,
    Image,
    Seen,
    all_ids,
    make_catalog,
    make_images,
    see,
)
from index_oracle import DIMENSION, metadata_of, shard, shard_bytes, text_of, vector_of

from vecfleet.common.errors import (
    CorruptData,
    CorruptShard,
    Unavailable,
)
from vecfleet.worker.ann import set_threads
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.partition import PartitionWriter
from vecfleet.worker.shard import Shard

TYPED = (CorruptData, Unavailable)  # what damage may be answered with
TOKEN = 1 << 40
_BLOCK = 4096
_WEIGHTS = {".db": 6, ".db-wal": 12, ".mark": 1, ".db-shm": 1}


class Undetected(AssertionError):
    """Damage went by unnoticed."""


@dataclass(frozen=True)
class Damage:
    """What was done to a file."""

    file: str
    kind: str
    place: int
    length: int = 0

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}+{self.length} of {self.file}"


def damaged(data: bytes, generator: random.Random, file: str) -> tuple[bytes, Damage]:
    """``data`` with one fault that does change it."""
    while True:
        kind = generator.choices(("flip", "byte", "zeros", "cut", "tail"), (50, 15, 10, 20, 5))[0]
        place = _place(len(data), generator)
        new, length = bytearray(data), 0
        if kind == "flip":
            new[place] ^= 1 << generator.randrange(8)
        elif kind == "byte":
            new[place] = generator.randrange(256)
        elif kind == "zeros":
            length = min(generator.choice((16, 512, _BLOCK)), len(data) - place)
            new[place : place + length] = bytes(length)
        elif kind == "cut":
            place = generator.choice((0, place, place - place % 512, place - place % _BLOCK))
            del new[place:]
        else:
            length = generator.choice((1, 24, 512))
            place = len(data)
            new += generator.randbytes(length)
        if bytes(new) != data:
            return bytes(new), Damage(file, kind, place, length)


def _place(size: int, generator: random.Random) -> int:
    """Anywhere; often where headers are."""
    if generator.random() < 0.25:
        return generator.randrange(min(size, 128))
    return generator.randrange(size)


class Subjects:
    """Everything that is damaged, made once below ``root``."""

    def __init__(self, root: Path) -> None:
        set_threads(1)
        self.root = root
        self.images = make_images(root)
        self.catalog, self.records = make_catalog(root)
        documents = [(f"d{i}", i) for i in range(40)]
        self.shards = [
            shard_bytes("one", documents, [("gone", 9)]),
            shard_bytes("two", [("ü" * 200, 1)]),
            shard_bytes("three", [], [("a", 1), ("b", 2)]),
        ]
        self.targets: list[tuple[int, Callable[[random.Random], tuple[str, Damage]]]] = []
        for image in self.images:
            for path in sorted(image.directory.iterdir()):
                if path.is_file() and path.stat().st_size:
                    weight = _WEIGHTS.get(path.suffix, 3)
                    self.targets.append((weight, _partition_case(self, image, path.name)))
        self.targets.append((4, lambda generator: _catalog_case(self, generator)))
        self.targets.append((8, lambda generator: _shard_case(self, generator)))

    def run(self, seed: str, number: int) -> tuple[str, Damage]:
        """One case; raises ``Undetected``."""
        generator = random.Random(f"{seed}/{number}")
        weights = [weight for weight, _ in self.targets]
        (_, case) = generator.choices(self.targets, weights)[0]
        return case(generator)


def _partition_case(
    subjects: Subjects, image: Image, file: str
) -> Callable[[random.Random], tuple[str, Damage]]:
    data = (image.directory / file).read_bytes()

    def case(generator: random.Random) -> tuple[str, Damage]:
        new, damage = damaged(data, generator, f"{image.name}/{file}")
        with copied(subjects.root, image.directory, file, new) as directory:
            try:
                return judge(image, Path(directory), file), damage
            except Undetected as fault:
                raise Undetected(f"{damage}: {fault}") from fault
            except Exception as error:
                raise Undetected(f"{damage}: {type(error).__name__}: {error}") from error

    return case


def copied(root: Path, source: Path, file: str, new: bytes) -> tempfile.TemporaryDirectory[str]:
    """A folder like ``source`` in which ``file`` holds ``new``; segments are links, not copies."""
    folder = tempfile.TemporaryDirectory(dir=root, prefix="case-")
    for path in source.iterdir():
        target = Path(folder.name) / path.name
        if path.name == file:
            target.write_bytes(new)
        elif path.suffix in (".seg", ".faiss"):
            os.link(path, target)
        else:
            shutil.copyfile(path, target)
    return folder


def judge(image: Image, directory: Path, file: str) -> str:
    """Read, write, read again; "detected" or "harmless", else ``Undetected``."""
    reading = _reading(image, directory)
    writing = _writing(image, directory)
    after = _reading(image, directory)
    if reading is not None and writing is not None and after is None:
        raise Undetected("it could be read before the writer came, and cannot be read now")
    fresh: Documents = {} if writing is None else {"late": _late()}
    allowed = [image.seen.documents, image.outside(file)]
    if writing is None:
        allowed += image.earlier  # it serves what it last knew to be good
    names_it = bool((reading and reading.quarantined) or (after and after.quarantined) or writing)
    if reading is None or writing is None or names_it:
        for seen, added in ((reading, {}), (after, fresh)):
            if seen is not None:
                _check_part(seen, [{**documents, **added} for documents in allowed])
        return "detected"
    assert after is not None
    whole = image.without.get(file)
    if reading != image.seen and reading != whole:
        raise Undetected(_difference(image.seen, reading))
    if after.documents != {**image.seen.documents, **fresh}:
        raise Undetected("after the writer: " + _difference(image.seen, after))
    return "harmless" if reading == image.seen else "detected"


def _reading(image: Image, directory: Path) -> Seen | None:
    """What the search process sees; None where it says that something is damaged."""
    try:
        return see(directory, image.thresholds, all_ids())
    except TYPED:
        return None


def _writing(image: Image, directory: Path) -> tuple[str, ...] | None:
    """What the aggregator puts aside while it opens and adds a document; None: it refuses."""
    try:
        writer = PartitionWriter.open(directory, image.spec, TOKEN, thresholds=image.thresholds)
        try:
            (outcome,) = writer.apply([shard("late", [("late", 5)])])
            if outcome.error is not None:
                raise Undetected(f"a new shard is refused: {outcome.error}")
            return writer.stats().quarantined
        finally:
            writer.close()
    except TYPED:
        return None


def _late() -> tuple[int, str, bytes | None, bytes]:
    vector = vector_of("late", 5, DIMENSION).astype("<f2").tobytes()
    return 5, text_of("late", 5), metadata_of("late", 5), vector


def _check_part(seen: Seen, allowed: Sequence[Documents]) -> None:
    """What is served beside a damaged file is true, and is all that lies outside of it."""
    if seen.documents not in allowed:
        fewest = min((_apart(known, seen.documents) for known in allowed), key=len)
        raise Undetected(f"{len(fewest)} documents are wrong or missing: {fewest[:3]}")
    if seen.unchanged != tuple(document in seen.documents for document in all_ids()):
        raise Undetected("it is wrong about what it holds")
    want = _nearest(seen.documents)
    if [document for document, _ in want] != [document for document, *_ in seen.exact]:
        raise Undetected(f"of {len(seen.documents)} documents it finds others than the nearest")
    for (_, right), (document, score, *_) in zip(want, seen.exact, strict=True):
        if abs(score - right) > 2e-3:
            raise Undetected(f"the score of {document} is {score}, not {right}")
    best = min(1, len(seen.documents))
    if len(seen.hits) != len(want) + len(QUERIES) * best:
        raise Undetected(f"of {len(seen.documents)} documents a search finds {len(seen.hits)}")
    for document, score, text, metadata in seen.hits + seen.exact:
        if (text, metadata) != seen.documents[document][1:3] or not -1.001 < score < 1.001:
            raise Undetected(f"a hit says {document}, {score}, {text!r}")


def _nearest(documents: Documents) -> list[tuple[str, float]]:
    """For each query the ``TOP_K`` nearest of ``documents``, the queries one after the other."""
    if not documents:
        return []
    ids = list(documents)
    stored = np.array([np.frombuffer(documents[d][3], "<f2") for d in ids], np.float32)
    return [
        (ids[place], float(row[place]))
        for row in QUERIES @ stored.T
        for place in np.argsort(-row)[:TOP_K].tolist()
    ]


def _apart(known: Documents, served: Documents) -> list[str]:
    return sorted(d for d in known.keys() | served.keys() if known.get(d) != served.get(d))


def _difference(want: Seen, have: Seen) -> str:
    wrong = [
        name for name in Seen.__dataclass_fields__ if getattr(want, name) != getattr(have, name)
    ]
    lost = sorted(want.documents.keys() - have.documents.keys())
    return f"{', '.join(wrong)} differ; {len(lost)} documents are missing: {lost[:3]}"


def _catalog_case(subjects: Subjects, generator: random.Random) -> tuple[str, Damage]:
    data = (subjects.catalog / "catalog.db").read_bytes()
    new, damage = damaged(data, generator, "catalog.db")
    with copied(subjects.root, subjects.catalog, "catalog.db", new) as directory:
        try:
            catalog = Catalog.open(Path(directory))
            try:
                records = [record.to_wire() for record in catalog.list()]
                names = [catalog.get(r["name"], r["tenant"]).to_wire() for r in subjects.records]
                deleted = catalog.deleted(0)
            finally:
                catalog.close()
        except TYPED:
            return "detected", damage
        except Exception as error:
            raise Undetected(f"{damage}: {type(error).__name__}: {error}") from error
    if records != subjects.records or names != subjects.records or len(deleted) != 1:
        raise Undetected(f"{damage}: the collections are others")
    return "harmless", damage


def _shard_case(subjects: Subjects, generator: random.Random) -> tuple[str, Damage]:
    new, damage = damaged(generator.choice(subjects.shards), generator, "shard")
    try:
        Shard.parse(new)
    except CorruptShard:
        return "detected", damage
    except Exception as error:
        raise Undetected(f"{damage}: {type(error).__name__}: {error}") from error
    raise Undetected(f"{damage}: it was taken")
