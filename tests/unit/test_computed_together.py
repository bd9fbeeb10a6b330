"""What a death is remembered by is all that the engine computes at once, and nothing else."""

from vecfleet.common.codec import pack_call
from vecfleet.common.dead_entry import text_keys
from vecfleet.common.payloads import computed_together


def keys(**payload):
    return text_keys(pack_call("vecfleet.embed", payload))


def test_blocks_and_calls_without_a_prompt_remember_alike():
    block = keys(texts=["a", "b"], ids=["1", "2"], uid="u", space="s")
    assert block == keys(texts=["a", "b"], truncate=False)
    assert len(set(block)) == 2


def test_a_prompt_is_part_of_it():
    plain = keys(texts=["a"])
    others = [
        keys(texts=["a"], prompt="p"),
        keys(texts=["a"], prompt_name="p"),
        keys(texts=["a"], instruction="p"),
        keys(texts=["pa"]),
    ]
    assert len({tuple(found) for found in (plain, *others)}) == 5


def test_a_document_is_not_to_blame_for_a_question_or_an_instruction():
    told = [
        computed_together({"query": query, "documents": ["d"], "instruction": instruction})
        for query in ("q", "r")
        for instruction in ("", "i")
    ]
    assert len({tuple(found) for found in told}) == 4


def test_what_is_no_such_call_has_none():
    assert keys(delete=["1"]) == keys(texts=7) == keys(texts=[7]) == []
