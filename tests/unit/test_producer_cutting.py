"""Blocks: cut as both doors cut them, always the same way."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vecfleet.common import limits
from vecfleet.common.document import Document, cut_blocks, parse_document
from vecfleet.producer.cutting import MOST_REJECTS, CutBlock, Cutter
from vecfleet.producer.items import Rejected, Sourced

SIZES = st.lists(st.sampled_from([1, 10, 4000, 100_000, 250_000]), max_size=60)


def cut(items: object, versions: str = "assigned") -> tuple[list[CutBlock], list[Rejected]]:
    cutter = Cutter(versions)
    blocks, rejects = [], []
    for block in cutter.feed(items):
        rejects += cutter.take_rejects()
        blocks += [block] if block else []
    blocks += cutter.end()
    return blocks, rejects + cutter.take_rejects()


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 700))
def test_blocks_are_those_of_the_shared_cutter(sizes, many):
    rows = [parse_document({"id": f"d{i}", "text": "x" * n}) for i, n in enumerate(sizes)]
    rows += [parse_document({"id": f"s{i}", "text": "short"}) for i in range(many)]
    blocks, rejects = cut(rows)
    expected = list(cut_blocks(rows))
    assert [b.block.ids for b in blocks] == [b.ids for b in expected]
    assert [b.block.size for b in blocks] == [b.size for b in expected]
    assert [b.place for b in blocks] == list(range(len(blocks)))
    assert not rejects


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=8))
def test_the_cut_does_not_depend_on_how_the_items_come(parts):
    rows = [{"id": f"{i}", "text": f"t{i}"} for i in range(sum(parts))]
    cutter = Cutter("assigned")
    blocks, at = [], 0
    for n in parts:
        blocks += cutter.feed(rows[at : at + n])
        at += n
    blocks += cutter.end()
    whole, _ = cut(rows)
    assert [b.block for b in blocks] == [b.block for b in whole]
    for block in blocks:
        block.set_digest()
        assert len(block.digest) == 32


def test_what_is_no_document_is_rejected_with_its_place():
    broken = Rejected("f.jsonl", 9, "invalid_input", "no")
    items = [
        {"id": "a", "text": "x"},
        {"id": "b", "text": ""},
        "nonsense",
        broken,
        {"id": "c", "text": "x", "unknown": 1},
        Document("d", " "),
        Document("e", "fine", b'{"a":1}'),
        Sourced(parse_document({"id": "f", "text": "x", "version": 3}), "g.csv", 4),
    ]
    blocks, rejects = cut(items)
    assert [b.block.ids for b in blocks] == [["a", "e"]]
    assert blocks[0].lines == [1, 7]
    assert blocks[0].block.size == 2 + 5 + 7
    assert [(r.file, r.line, r.code) for r in rejects] == [
        ("", 2, "empty_text"),
        ("", 3, "invalid_input"),
        ("f.jsonl", 9, "invalid_input"),
        ("", 5, "unknown_field"),
        ("", 6, "empty_text"),
        ("g.csv", 4, "invalid_input"),
    ]


def test_given_versions_must_be_given():
    blocks, rejects = cut(
        [{"id": "a", "text": "x"}, {"id": "b", "text": "x", "version": 1}], "given"
    )
    assert [b.block.ids for b in blocks] == [["b"]]
    assert [r.id for r in rejects] == ["a"]


def test_rejects_do_not_gather_without_bound():
    cutter = Cutter("assigned")
    turns = 0
    for block in cutter.feed({"id": f"{i}"} for i in range(10 * MOST_REJECTS)):
        assert block is None
        assert len(cutter.take_rejects()) <= MOST_REJECTS
        turns += 1
    assert turns >= 9


def test_the_digest_tells_every_column_apart():
    base = {"id": "a", "text": "x", "metadata": {"k": 1}, "version": 5}
    changed = [{**base, "id": "b"}, {**base, "text": "y"}, {**base, "metadata": {"k": 2}},
               {**base, "version": 6}]  # fmt: skip
    digests = set()
    for row in [base, *changed]:
        (block,), _ = cut([row], "given")
        block.set_digest()
        digests.add(block.digest)
    assert len(digests) == 5


def test_some_documents_of_a_block():
    (block,), _ = cut([{"id": f"{i}", "text": f"t{i}", "metadata": {"i": i}} for i in range(6)])
    block.set_digest()
    some = block.only([1, 4])
    assert some.block.ids == ["1", "4"]
    assert some.block.metadata == [b'{"i":1}', b'{"i":4}']
    assert some.lines == [2, 5]
    assert (some.place, some.digest) == (block.place, block.digest)
    assert 0 < some.block.size < block.block.size
    assert len(block.only([])) == 0
    assert len(block) <= limits.BLOCK_DOCUMENTS
