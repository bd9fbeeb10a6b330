"""What a model's card allows: shorter vectors, prompts, instructions; and its way over the wire."""

import pytest

from vecfleet.common import codec
from vecfleet.common.errors import EmptyText, InvalidInput
from vecfleet.common.model import ModelCard

QWEN = {"query": "Instruct: Search the web\nQuery:", "document": ""}


def card(**more):
    return ModelCard("m", ("embed",), "0" * 16, 64, 32, "float32", "fake", **more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"matryoshka": True, "matryoshka_least": 32},
        {"matryoshka": True, "matryoshka_dimensions": (16, 32)},
    ],
)
def test_a_card_comes_back_from_the_wire_as_it_was(more):
    sent = card(prompts=QWEN, **more)
    assert ModelCard.from_wire(codec.loads(codec.dumps(sent.to_wire()))) == sent


def test_an_older_workers_card_is_of_a_model_that_cuts_nothing():
    wire = card().to_wire()
    for name in [name for name in wire if name.startswith("matryoshka")]:
        del wire[name]
    assert ModelCard.from_wire({**wire, "newer": 1}) == card()
    assert not ModelCard.from_wire(wire).matryoshka


@pytest.mark.parametrize(
    ("more", "allowed"),
    [
        ({}, {64}),
        ({"matryoshka": True}, set(range(1, 65))),
        ({"matryoshka": True, "matryoshka_least": 32}, set(range(32, 65))),
        ({"matryoshka": True, "matryoshka_dimensions": (16, 32)}, {16, 32, 64}),
    ],
)
def test_vectors_are_as_long_as_the_model_is_trained_for(more, allowed):
    asked = card(**more)
    assert asked.vector_length() == 64
    for dimensions in range(-1, 70):
        if dimensions in allowed:
            assert asked.vector_length(dimensions) == dimensions
        else:
            with pytest.raises(InvalidInput) as raised:
                asked.vector_length(dimensions)
            assert raised.value.field == "dimensions"


@pytest.mark.parametrize("wrong", [True, 32.0, "32", [32], 10**30])
def test_dimensions_are_a_whole_number(wrong):
    with pytest.raises(InvalidInput, match="dimensions must be from 1 to 64"):
        card(matryoshka=True).vector_length(wrong)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "must be 64: m is not trained for shorter vectors"),
        ({"matryoshka": True, "matryoshka_least": 32}, "must be from 32 to 64 for m"),
        ({"matryoshka": True, "matryoshka_dimensions": (16, 32)}, "one of 16, 32, 64 for m"),
    ],
)
def test_a_refusal_says_what_is_allowed(more, says):
    with pytest.raises(InvalidInput, match=says):
        card(**more).vector_length(7)


def test_a_prompt_is_given_by_itself_by_name_or_as_a_task():
    asked = card(prompts=QWEN)
    assert asked.prompt_of() is None
    assert asked.prompt_of(prompt="Say: ") == "Say: "
    assert asked.prompt_of(prompt="") == ""
    assert asked.prompt_of(prompt_name="query") == QWEN["query"]
    assert asked.prompt_of(prompt_name="document") == ""
    assert asked.prompt_of(instruction="Find laws") == "Instruct: Find laws\nQuery:"


def test_an_instruction_keeps_what_the_models_own_prompt_puts_before_the_question():
    e5 = card(prompts={"query": "Instruct: Given a question\nQuery: "})
    assert e5.prompt_of(instruction="Find laws") == "Instruct: Find laws\nQuery: "


@pytest.mark.parametrize(
    ("prompts", "given", "field"),
    [
        (QWEN, {"prompt_name": "nope"}, "prompt_name"),
        (QWEN, {"prompt_name": ["query"]}, "prompt_name"),
        (QWEN, {"prompt": 5}, "prompt"),
        (QWEN, {"instruction": 5}, "instruction"),
        (QWEN, {"prompt_name": "query", "instruction": "Find laws"}, "instruction"),
        (QWEN, {"prompt": "", "prompt_name": "query"}, "prompt_name"),
        ({}, {"instruction": "Find laws"}, "instruction"),
        ({"query": "query: "}, {"instruction": "Find laws"}, "instruction"),
    ],
)
def test_what_the_model_does_not_take_is_named(prompts, given, field):
    with pytest.raises(InvalidInput) as raised:
        card(prompts=prompts).prompt_of(**given)
    assert raised.value.field == field


def test_an_instruction_is_a_text():
    with pytest.raises(EmptyText):
        card(prompts=QWEN).prompt_of(instruction=" \n")
