"""Reading documents: every format, compression and kind of bad line."""

from __future__ import annotations

import gzip
import io
import json
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import module_or_skip

from vecfleet.common.document import parse_document
from vecfleet.common.errors import ConfigError, InvalidInput
from vecfleet.producer import lines as lines_module
from vecfleet.producer.fields import FieldMap
from vecfleet.producer.items import Rejected, Sourced
from vecfleet.producer.lines import cut_lines
from vecfleet.producer.readers import read_documents

ROWS = [{"id": f"d{i}", "text": f"text {i} – ü"} for i in range(5)]


def jsonl(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(*paths: object, **options: object) -> list[Sourced | Rejected]:
    return list(read_documents([str(path) for path in paths], **options))


def documents(items: list[Sourced | Rejected]) -> list[tuple[str, str]]:
    return [(i.document.id, i.document.text) for i in items if isinstance(i, Sourced)]


def rejects(items: list[Sourced | Rejected]) -> list[tuple[int, str]]:
    return [(i.line, i.code) for i in items if isinstance(i, Rejected)]


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


EXPECTED = [(str(row["id"]), str(row["text"])) for row in ROWS]


@pytest.mark.parametrize(
    ("ending", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)],
    ids=["plain", "gzip", "zstd"],
)
def test_json_lines_in_every_compression(tmp_path, ending, compress):
    path = save(tmp_path / f"a.jsonl{ending}", compress(jsonl(ROWS)))
    found = read(path)
    assert documents(found) == EXPECTED
    assert [(i.file, i.line) for i in found] == [(path.name, n) for n in range(1, 6)]


def test_zstd_of_several_frames_is_read_to_its_end(tmp_path):
    data = zstandard.compress(jsonl(ROWS[:2])) + zstandard.compress(jsonl(ROWS[2:]))
    assert documents(read(save(tmp_path / "a.jsonl.zst", data))) == EXPECTED


def test_standard_input_is_decompressed_by_its_first_bytes(monkeypatch):
    class Stdin:
        buffer = io.BufferedReader(io.BytesIO(gzip.compress(jsonl(ROWS))))

    monkeypatch.setattr(sys, "stdin", Stdin)
    stream = read_documents(["-"])
    assert documents(list(stream)) == EXPECTED
    assert stream.bytes_total is None


def test_bad_lines_are_told_and_the_rest_goes_on(tmp_path):
    path = save(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf"
        + b'{"id": "a", "text": "good"}\r\n'
        + b'{"id": "b", "text": \n'
        + b'{"id": "c", "text": "\xff\xfe"}\n'
        + b"\n   \n"
        + b'{"id": "d", "text": "  "}\n'
        + b'{"id": "e"}\n'
        + b"[1, 2]\n"
        + b'{"id": "f", "text": "x", "metadata": {"a": NaN}}\n'
        + b'{"id": "g", "text": 5}\n'
        + b'{"id": ["h"], "text": "x"}\n'
        + b'{"id": "i", "text": "x", "metadata": "no object"}\n'
        + b'{"id": "z", "text": "last, without a newline"}',
    )
    found = read(path)
    assert [d for d, _ in documents(found)] == ["a", "z"]
    bad = "invalid_input"
    assert rejects(found) == [
        (2, bad), (3, bad), (6, "empty_text"), (7, bad), (8, bad), (9, bad),
        (10, bad), (11, bad), (12, bad),
    ]  # fmt: skip
    assert all(i.file == "a.jsonl" and i.raw for i in found if isinstance(i, Rejected))


def test_a_line_that_is_too_long_is_left_out_in_bounded_memory(tmp_path):
    long = b'{"id": "b", "text": "' + b"x" * (lines_module.MAX_LINE_BYTES + 10) + b'"}\n'
    good = jsonl(ROWS[:1])
    found = read(save(tmp_path / "a.jsonl", good + long + good))
    assert rejects(found) == [(2, "text_too_long")]
    assert [i.line for i in found] == [1, 2, 3]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=20),
    st.booleans(),
    st.integers(1, 64),
)
def test_lines_are_those_of_split_whatever_the_chunks(parts, ends, most):
    class Trickle(io.BytesIO):
        def read1(self, size=-1):
            return self.read(min(size, 7))

    raw = b"\n".join(parts) + (b"\n" if ends else b"")
    found: list[tuple[int, bytes | None]] = []
    for first, lines in cut_lines(Trickle(raw), max_bytes=most):
        assert first == len(found) + 1
        found += enumerate(lines, first)
    expected = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [line for _, line in found] == [x if len(x) <= most else None for x in expected]


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.one_of(st.text(max_size=4), st.integers(), st.none()),
            "text": st.one_of(st.text(max_size=9), st.none()),
            "metadata": st.one_of(
                st.none(), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
            ),
            "version": st.one_of(st.none(), st.integers(-2, 9), st.booleans()),
        },
    )
)
def test_a_row_is_judged_as_the_other_door_judges_it(row):
    named = {**row, "id": "f:1" if row.get("id") in (None, "") else row["id"]}
    if type(named["id"]) is int:
        named["id"] = str(named["id"])
    if not named.get("metadata"):
        named.pop("metadata", None)
    try:
        expected = parse_document(named)
    except InvalidInput:
        with pytest.raises(InvalidInput):
            FieldMap().parse(row, "f:1")
        return
    found = FieldMap().parse(row, "f:1")
    assert (found.id, found.text, found.version) == (expected.id, expected.text, expected.version)
    assert (found.metadata or b"{}") == (expected.metadata or b"{}")


def test_fields_are_mapped_and_the_rest_becomes_metadata(tmp_path):
    row = {"key": 7, "body": "x", "lang": "en", "metadata": {"a": 1}, "rev": 3}
    path = save(tmp_path / "a.jsonl", jsonl([row]))
    fields = FieldMap("key", "body", "rev")
    (item,) = read(path, fields=fields)
    assert (item.document.id, item.document.version) == ("7", 3)
    assert json.loads(item.document.metadata) == {"a": 1, "lang": "en"}
    (item,) = read(path, fields=FieldMap("key", "body", "rev", metadata_fields=("lang",)))
    assert json.loads(item.document.metadata) == {"lang": "en"}
    (item,) = read(path, fields=FieldMap("key", "body", "rev", metadata_fields=()))
    assert item.document.metadata is None


def test_rows_without_an_id_are_named_after_file_and_line(tmp_path):
    save(tmp_path / "a.jsonl", jsonl([{"text": "x"}, {"id": "", "text": "y"}]))
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.jsonl", jsonl([{"text": "z"}]))
    assert [d for d, _ in documents(read(tmp_path))] == ["a.jsonl:1", "a.jsonl:2", "in/a.jsonl:1"]
    # Two files of one name must not give two rows one id.
    both = documents(read(tmp_path / "a.jsonl", tmp_path / "in" / "a.jsonl"))
    assert len({d for d, _ in both}) == 3


def test_csv(tmp_path):
    path = save(
        tmp_path / "a.csv",
        b'id,text,lang\r\n1,"two\nlines, quoted",en\r\n2,only two\r\n3,\xff,x\r\n,no id,\r\n'
        b'5,"open quote,x\r\n',
    )
    found = read(path)
    assert documents(found) == [("1", "two\nlines, quoted"), ("a.csv:6", "no id")]
    assert rejects(found)[:2] == [(4, "invalid_input"), (5, "invalid_input")]
    assert rejects(found)[2][0] == 7
    assert json.loads(found[0].document.metadata) == {"lang": "en"}


def test_tsv_with_versions(tmp_path):
    path = save(tmp_path / "a.tsv", b"id\ttext\tversion\na\tx y\t12\nb\tz\tnew\n")
    found = read(path)
    assert found[0].document.version == 12
    assert rejects(found) == [(3, "invalid_input")]


def test_parquet_by_row_groups(tmp_path):
    pa, pq = module_or_skip("pyarrow"), module_or_skip("pyarrow.parquet")
    table = pa.table(
        {
            "id": pa.array([1, 2, 3, None]),
            "text": ["a", "b", None, "d"],
            "at": [datetime(2026, 1, i, tzinfo=UTC) for i in range(1, 5)],
            "price": [Decimal("1.50")] * 4,
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=2)
    stream = read_documents([path])
    found = list(stream)
    assert documents(found) == [("1", "a"), ("2", "b"), ("a.parquet:4", "d")]
    assert rejects(found) == [(3, "invalid_input")]
    metadata = json.loads(found[0].document.metadata)
    assert metadata == {"at": "2026-01-01T00:00:00+00:00", "price": "1.50"}
    assert stream.bytes_read == stream.bytes_total == path.stat().st_size


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = save(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(ConfigError, match=r"pip install 'vecfleet\[parquet\]'"):
        read_documents([path])


@pytest.mark.parametrize("data", [b"no parquet at all", b""])
def test_a_file_that_is_no_parquet_is_told(tmp_path, data):
    module_or_skip("pyarrow")
    path = save(tmp_path / "a.parquet", data)
    after = save(tmp_path / "b.jsonl", jsonl(ROWS))
    found = read(path, after)
    assert rejects(found) == [(1, "corrupt_data")]
    assert documents(found) == EXPECTED


def test_text_by_line_and_by_file(tmp_path):
    lines = save(tmp_path / "a.txt", b"one\r\n\ntwo\n")
    assert documents(read(lines)) == [("a.txt:1", "one"), ("a.txt:3", "two")]
    whole = save(tmp_path / "b.md", b"# Title\n\nbody\n")
    assert documents(read(whole)) == [("b.md", "# Title\n\nbody\n")]
    assert documents(read(lines, format="files")) == [("a.txt", "one\r\n\ntwo\n")]
    big = save(tmp_path / "c.md", b"x" * (256 * 1024 + 1))
    assert rejects(read(big)) == [(1, "text_too_long")]


@pytest.mark.parametrize(
    ("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)]
)
def test_a_file_that_breaks_off_is_told_and_the_next_is_read(tmp_path, name, compress):
    rows = [{"id": f"{i}", "text": f"{i * 7919} " * 30} for i in range(20_000)]
    whole = compress(jsonl(rows))
    torn = save(tmp_path / name, whole[: len(whole) // 2])
    after = save(tmp_path / "b.jsonl", jsonl(ROWS))
    found = read(torn, after)
    codes = [i.code for i in found if isinstance(i, Rejected)]
    if name.endswith(".gz"):
        assert codes == ["corrupt_data"]
    assert documents(found)[-5:] == EXPECTED


def test_what_cannot_be_read_is_refused_before_anything_is_sent(tmp_path):
    unknown = save(tmp_path / "a.bin", b"x")
    for paths, words in (
        ([], "at least one"),
        ([tmp_path / "missing.jsonl"], "no such file"),
        ([unknown], "--format"),
        (["-", "-"], "once"),
        ([str(tmp_path / "*.jsonl")], "no such file"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_documents(paths)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="--format"):
        read_documents([empty])
    with pytest.raises(ConfigError, match="standard input"):
        read_documents(["-"], format="parquet")


def test_patterns_directories_and_hidden_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "notes.bin"):
        save(tmp_path / name, jsonl([{"text": name}]))
    assert [t for _, t in documents(read(tmp_path))] == ["a.jsonl", "b.jsonl"]
    assert [t for _, t in documents(read(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    assert len(read(tmp_path, format="jsonl")) == 3


def test_a_row_in_the_documents_own_shape_has_no_unknown_fields(tmp_path):
    row = {"id": "a", "text": "x", "metadata": {"a": 1}, "versoin": 3}
    path = save(tmp_path / "a.jsonl", jsonl([row]))
    (refused,) = read(path)
    assert refused.code == "unknown_field"
    assert refused.message.startswith("versoin is not a field")
    (kept,) = read(path, fields=FieldMap(metadata_fields=("metadata", "versoin")))
    assert json.loads(kept.document.metadata) == {"a": 1, "versoin": 3}
    del row["metadata"]
    (plain,) = read(save(path, jsonl([row])))
    assert json.loads(plain.document.metadata) == {"versoin": 3}
    table = save(tmp_path / "a.csv", b'id,text,metadata,lang\na,x,"{""a"": 1}",en\n')
    (cell,) = read(table)
    assert json.loads(cell.document.metadata) == {"a": 1, "lang": "en"}


def test_an_empty_name_is_not_the_current_directory(tmp_path, monkeypatch):
    save(tmp_path / "a.jsonl", jsonl(ROWS))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="must not be empty"):
        read("")
    assert documents(read(".")) == EXPECTED
