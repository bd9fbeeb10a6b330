"""Segments that lie under right checksums: put aside or served, and nothing beside them is lost."""

import resource

import pytest
from fuzz.corruption import TYPED, copied
from fuzz.images import QUERIES, TOP_K, all_ids, make_images
from fuzz.lies import lying, table_of, with_table
from fuzz.sizes import sized
from hypothesis import given
from hypothesis import strategies as st

from vecfleet.common.errors import CorruptSegment
from vecfleet.worker.digest import content_keys, id_keys
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.segment import Segment

EXAMPLES = 60
MOST_GROWTH_KB = 200 << 10


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return {image.name: image for image in make_images(tmp_path_factory.mktemp("lies"))}


def serve(directory, thresholds):
    """Ask for everything; the (id, version, text) of all documents."""
    reader = PartitionReader.open(directory, thresholds=thresholds)
    try:
        stored = list(reader.documents())
        reader.vectors(id_keys([document.id for document in stored]))
        list(reader.read(all_ids()))
        nothing = content_keys(["" for _ in all_ids()], [None for _ in all_ids()])
        reader.unchanged(id_keys(all_ids()), nothing)
        for exact in (False, True):
            for hits in reader.search(QUERIES, TOP_K, exact=exact):
                list(hits)
        return [(document.id, document.version, document.text) for document in stored]
    finally:
        reader.close()


@pytest.mark.parametrize("name", ["indexed", "signs"])
def test_a_segment_that_lies_is_put_aside_or_read_and_others_are_served(images, name, tmp_path):
    image = images[name]
    files = sorted(path.name for path in image.directory.glob("seg-*"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @sized(EXAMPLES, 5, shrinks=False)
    @given(st.data())
    def check(data):
        file = data.draw(st.sampled_from(files))
        lie = data.draw(lying((image.directory / file).read_bytes()))
        with copied(tmp_path, image.directory, file, lie) as directory:
            try:
                served = serve(tmp_path / directory, image.thresholds)
            except TYPED:
                return
        others = {(d, v[0], v[1]) for d, v in image.outside(file).items()}
        assert others <= set(served)

    check()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_GROWTH_KB


def test_a_lie_in_the_order_of_keys_is_told(images, tmp_path):
    image = images["indexed"]
    path = next(iter(sorted(image.directory.glob("seg-*"))))
    good = path.read_bytes()
    same = tmp_path / path.name
    same.write_bytes(with_table(bytearray(good), table_of(good)))
    Segment.open(same)
    made = bytearray(good)
    at, _, _ = table_of(good)["columns"]["order"]
    made[at : at + 4] = b"\xff\xff\xff\x7f"
    same.write_bytes(with_table(made, table_of(good)))
    with pytest.raises(CorruptSegment, match="order"):
        Segment.open(same)
