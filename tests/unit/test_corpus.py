"""The demo's passages: deterministic, unique, read without importing anything."""

from __future__ import annotations

from pathlib import Path

from vecfleet.common.document import parse_document
from vecfleet.fleet.corpus import MAX_CHARACTERS, MIN_CHARACTERS, passage, read_corpus

LONG = "This sentence is here so that the docstring has the length of a real passage. " * 2


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def package(root: Path) -> None:
    write(root, "alpha/__init__.py", f'"""Alpha. {LONG}"""\nraise SystemExit("imported!")\n')
    write(
        root,
        "alpha/tools.py",
        f'class Hammer:\n    """Hammer. {LONG}"""\n'
        f'    @property\n    def weight(self):\n        """Weight. {LONG}"""\n'
        f'    @weight.setter\n    def weight(self, v):\n        """Setter. {LONG}"""\n'
        '    def short(self):\n        """Too short."""\n',
    )
    write(root, "alpha/copy.py", f'def same():\n    """Weight. {LONG}"""\n')
    write(root, "alpha/broken.py", "def (:\n")
    write(root, "alpha/tests/test_alpha.py", f'"""A test. {LONG}"""\n')
    write(root, "alpha-1.0.dist-info/notes.py", f'"""No package. {LONG}"""\n')
    write(root, "beta.py", f'async def run():\n    """Run. {LONG}"""\n')


def test_names_kinds_and_files(tmp_path: Path) -> None:
    package(tmp_path)
    found = {d["id"]: d["metadata"] for d in read_corpus(tmp_path)}
    assert found["alpha"] == {"package": "alpha", "kind": "module", "file": "alpha/__init__.py"}
    assert found["alpha.tools.Hammer"]["kind"] == "class"
    assert found["beta.run"] == {"package": "beta", "kind": "function", "file": "beta.py"}


def test_a_name_and_a_text_come_once(tmp_path: Path) -> None:
    package(tmp_path)
    documents = list(read_corpus(tmp_path))
    assert sorted(d["id"] for d in documents) == [
        "alpha",
        "alpha.copy.same",  # comes before alpha.tools, and so keeps the text they share
        "alpha.tools.Hammer",
        "alpha.tools.Hammer.weight",
        "beta.run",
    ]
    texts = [d["text"] for d in documents]
    assert len(set(texts)) == len(texts)


def test_the_order_is_the_same_each_time_and_a_limit_takes_its_beginning(tmp_path: Path) -> None:
    package(tmp_path)
    documents = list(read_corpus(tmp_path))
    assert list(read_corpus(tmp_path)) == documents
    assert list(read_corpus(tmp_path, 2)) == documents[:2]


def test_packages_take_turns(tmp_path: Path) -> None:
    for name in ("large", "small"):
        functions = (
            f'def f{n}():\n    """{name} {n}. {LONG}"""\n'
            for n in range(200 if name == "large" else 3)
        )
        write(tmp_path, f"{name}/__init__.py", "\n".join(functions))
    first = [d["metadata"]["package"] for d in read_corpus(tmp_path, 60)]
    assert first.count("small") == 3


def test_a_passage_is_cut_between_paragraphs_or_words() -> None:
    assert passage("x" * (MIN_CHARACTERS - 1)) is None
    paragraphs = "\n\n".join(["word " * 100] * 5)
    cut = passage(paragraphs)
    assert cut is not None
    assert cut.endswith("word")
    assert len(cut) <= MAX_CHARACTERS
    words = passage("longword " * 500)
    assert words is not None
    assert set(words.split()) == {"longword"}
    assert len(passage("x" * 5000) or "") == MAX_CHARACTERS


def test_this_environments_docstrings_are_documents() -> None:
    documents = list(read_corpus(limit=300))
    assert len(documents) == 300
    for document in documents:
        parse_document(document)
