"""Records out of maps: what is missing or of another type is named, what is newer is ignored."""

from __future__ import annotations

import pytest

from vecfleet.common import codec
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.errors import CorruptPayload
from vecfleet.common.model import ModelCard

RECORD = Collection("books", "c0ffee", CollectionSpec("m", "5pace", 3)).to_wire()
CARD = ModelCard(
    "m",
    ("embed", "rerank"),
    "5pace",
    3,
    512,
    "float32",
    "fake",
    prompts={"query": "q: "},
    settings={"threads": 2, "step_s": 0.5, "attention": "sdpa"},
    matryoshka_dimensions=(1, 2),
).to_wire()


def test_what_was_written_is_read():
    assert Collection.from_wire(codec.loads(codec.dumps(RECORD))).to_wire() == RECORD
    assert ModelCard.from_wire(codec.loads(codec.dumps(CARD))).to_wire() == CARD


def test_what_a_newer_version_added_is_ignored():
    newer = {**RECORD, "newer": 1, "spec": {**RECORD["spec"], "policy": "newer", "newer": {}}}
    assert Collection.from_wire(newer).spec.policy == "newer"
    assert ModelCard.from_wire({**CARD, "newer": 1, "tasks": ["newer"]}).tasks == ("newer",)


def test_what_an_older_version_left_out_has_its_default():
    spec = {name: RECORD["spec"][name] for name in ("model", "space", "dimension")}
    older = Collection.from_wire({"name": "books", "uid": "c0ffee", "spec": spec})
    assert older == Collection.from_wire(RECORD)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"uid": None}, "Collection.uid"),
        ({"uid": 7}, "Collection.uid"),
        ({"partitions": "1"}, "Collection.partitions"),
        ({"partitions": True}, "Collection.partitions"),
        ({"created_s": "now"}, "Collection.created_s"),
        ({"spec": None}, "CollectionSpec"),
        ({"spec": []}, "CollectionSpec"),
        ({"spec": {}}, "CollectionSpec.model is missing"),
        ({"spec": {**RECORD["spec"], "dimension": 3.0}}, "CollectionSpec.dimension"),
        ({"spec": {**RECORD["spec"], "dimension": 0}}, "CollectionSpec.dimension"),
        ({"spec": {**RECORD["spec"], "policy": 1}}, "CollectionSpec.policy"),
    ],
)
def test_a_collections_record_of_another_shape_is_refused(wrong, named):
    with pytest.raises(CorruptPayload, match=named):
        Collection.from_wire({**RECORD, **wrong})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"tasks": "embed"}, "ModelCard.tasks"),
        ({"tasks": [1]}, "ModelCard.tasks"),
        ({"tasks": []}, "no task"),
        ({"prompts": {"query": 1}}, "ModelCard.prompts"),
        ({"prompts": []}, "ModelCard.prompts"),
        ({"rerank_method": 1}, "ModelCard.rerank_method"),
        ({"settings": {"a": []}}, "ModelCard.settings"),
        ({"matryoshka_dimensions": ["1"]}, "ModelCard.matryoshka_dimensions"),
        ({"matryoshka": 1}, "ModelCard.matryoshka"),
    ],
)
def test_a_models_card_of_another_shape_is_refused(wrong, named):
    with pytest.raises(CorruptPayload, match=named):
        ModelCard.from_wire({**CARD, **wrong})


@pytest.mark.parametrize("wire", [None, [], "a", 7, b"a", {"name": "evil"}])
def test_what_is_no_record_at_all_is_refused(wire):
    for kind in (Collection, CollectionSpec, ModelCard):
        with pytest.raises(CorruptPayload):
            kind.from_wire(wire)
