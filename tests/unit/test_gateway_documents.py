"""Putting documents in, reading and deleting them, and following submissions."""

import asyncio
import json

import pytest
from gateway_fakes import FakeFleet, gateway_client

from vecfleet.common.errors import JobCancelled, QueueFull
from vecfleet.gateway.config import GatewayLimits
from vecfleet.gateway.lines import LineCutter

DOCUMENTS = "/collections/books/documents"
NDJSON = {"content-type": "application/x-ndjson"}


async def made(client, **settings):
    answer = await client.put("/collections/books", json=settings)
    assert answer.status_code == 201
    return answer.json()


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


async def test_json_body_becomes_one_submission():
    fleet = FakeFleet()
    rows = [{"id": f"d{i}", "text": f"text {i}", "metadata": {"n": i}} for i in range(600)]
    async with gateway_client(fleet) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, json={"documents": rows})
    assert answer.status_code == 202
    said = answer.json()
    assert (said["accepted"], said["rejected"], said["state"]) == (600, 0, "closed")
    assert [(sub, place, len(block)) for sub, place, block in fleet.blocks] == [
        (said["submission_id"], 0, 256),
        (said["submission_id"], 1, 256),
        (said["submission_id"], 2, 88),
    ]
    assert fleet.submissions.kept[said["submission_id"]].documents == 600


@pytest.mark.parametrize(
    ("sent", "field", "code"),
    [
        ({"documents": []}, "documents", "invalid_input"),
        ({"documents": "x"}, "documents", "invalid_input"),
        ({"documents": [{"id": "a", "text": "b"}], "model": "x"}, "model", "invalid_input"),
        ({"documents": [{"id": "a", "text": "b"}, 7]}, "documents[1]", "invalid_input"),
        ({"documents": [{"id": "a", "text": ""}]}, "documents[0].text", "empty_text"),
        (
            {"documents": [{"id": "a", "text": "b"}, {"id": "", "text": "b"}]},
            "documents[1].id",
            "invalid_input",
        ),
        ({"id": "a", "text": "b", "titel": "c"}, "documents[0].titel", "unknown_field"),
        ({"id": "a", "text": "b", "version": 3}, "documents[0].version", "invalid_input"),
        ({"id": "a", "text": "b", "metadata": [1]}, "documents[0].metadata", "invalid_input"),
        ({"documents": [{"id": "a", "text": "b"}] * 4}, "documents", "too_many_items"),
        ([{"id": "a", "text": "b"}], "body", "invalid_input"),
    ],
)
async def test_json_body_is_taken_whole_or_not_at_all(sent, field, code):
    fleet = FakeFleet()
    async with gateway_client(fleet, GatewayLimits(max_documents=3)) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, json=sent)
    assert answer.status_code == 400
    assert (answer.json()["error"]["field"], answer.json()["error"]["code"]) == (field, code)
    assert fleet.blocks == []
    assert fleet.submissions.kept == {}


async def test_deeply_nested_metadata_is_refused():
    metadata = {}
    inner = metadata
    for _ in range(40):
        inner["a"] = {}
        inner = inner["a"]
    async with gateway_client(FakeFleet()) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, json={"id": "a", "text": "b", "metadata": metadata})
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "documents[0].metadata"


async def test_json_body_that_finds_no_room_leaves_nothing_behind():
    fleet = FakeFleet()
    fleet.full = [QueueFull(retry_after_s=3)]
    async with gateway_client(fleet) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, json={"id": "a", "text": "b"})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert fleet.submissions.kept == {}


async def test_ndjson_takes_good_lines_and_tells_of_bad_ones():
    fleet = FakeFleet()
    stream = (
        lines({"id": "a", "text": "one"})
        + b"\n\n  \r\n{bad\n"
        + lines({"id": "b"}, {"id": "c", "text": "three", "extra": 1}, {"id": "d", "text": "four"})
    )
    async with gateway_client(fleet) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, content=stream, headers=NDJSON)
    said = answer.json()
    assert answer.status_code == 202
    assert (said["accepted"], said["rejected"], said["next_line"]) == (2, 3, 8)
    assert [(e["line"], e["field"], e["code"]) for e in said["errors"]] == [
        (4, "line", "invalid_input"),
        (5, "text", "invalid_input"),
        (6, "extra", "unknown_field"),
    ]
    assert fleet.blocks[0][2].ids == ["a", "d"]


async def test_ndjson_errors_are_counted_beyond_those_that_are_told():
    async with gateway_client(FakeFleet(), GatewayLimits(max_kept_errors=2)) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, content=b"x\n" * 50, headers=NDJSON)
    said = answer.json()
    assert (said["accepted"], said["rejected"], len(said["errors"])) == (0, 50, 2)


async def test_what_is_kept_of_refused_lines_is_small_however_long_they_are():
    rows = [{"id": "a", "text": "b", "f" * 1_000_000: 1} for _ in range(5)]
    async with gateway_client(FakeFleet()) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, content=lines(*rows), headers=NDJSON)
        alone = await client.post(DOCUMENTS, json=rows[0])
    assert answer.status_code == 202
    errors = answer.json()["errors"]
    assert [error["line"] for error in errors] == [1, 2, 3, 4, 5]
    assert all(error["code"] == "unknown_field" for error in errors)
    assert all(error["field"].startswith("f") for error in errors)
    assert len(answer.content) < 5 * 2000
    assert alone.status_code == 400
    assert len(alone.content) < 2000


async def test_ndjson_that_has_begun_waits_for_room():
    fleet = FakeFleet()
    rows = [{"id": f"d{i}", "text": "t"} for i in range(300)]
    refusals = [QueueFull(retry_after_s=0.01), QueueFull(retry_after_s=0.01)]
    taken = fleet.enqueue_blocks

    async def first_then_full(collection, blocks, **options):
        if fleet.blocks and refusals:
            raise refusals.pop()
        return await taken(collection, blocks, **options)

    fleet.enqueue_blocks = first_then_full
    async with gateway_client(fleet) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, content=lines(*rows), headers=NDJSON)
    assert answer.status_code == 202
    assert answer.json()["accepted"] == 300
    assert refusals == []


async def test_ndjson_that_finds_no_room_for_its_first_block_is_told_at_once():
    fleet = FakeFleet()
    fleet.full = [QueueFull(retry_after_s=3), QueueFull(retry_after_s=3)]
    limits = GatewayLimits(queue_full_wait_s=1000)
    async with gateway_client(fleet, limits) as client:
        await made(client)
        row = lines({"id": "a", "text": "b"})
        async with asyncio.timeout(30):
            answer = await client.post(DOCUMENTS, content=row, headers=NDJSON)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert len(fleet.full) == 1, "it has waited"
    assert fleet.submissions.kept == {}


@pytest.mark.parametrize("kind", [{}, NDJSON], ids=["json", "stream"])
async def test_what_there_is_no_room_for_is_refused_at_its_headers(kind):
    async def body():
        for _ in range(1000):
            yield b" " * 1000  # read to its end, it would get a 400

    fleet = FakeFleet()
    fleet.no_room = QueueFull(retry_after_s=3)
    async with gateway_client(fleet) as client:
        await made(client)
        headers = {**kind, "content-length": str(9 << 20)}
        answer = await client.post(DOCUMENTS, content=body(), headers=headers)
        assert answer.status_code == 429
        assert answer.headers["connection"] == "close"
        assert fleet.looked == [0 if kind else 9 << 20]  # a stream is taken block by block
        # A submission that is there already asks for no room.
        row, key = {"id": "a", "text": "b" * 100_000}, {"idempotency-key": "k"}
        assert (await client.post(DOCUMENTS, json=row, headers=key)).status_code == 429
        fleet.no_room = None
        assert (await client.post(DOCUMENTS, json=row, headers=key)).status_code == 202
        fleet.no_room = QueueFull(retry_after_s=3)
        assert (await client.post(DOCUMENTS, json=row, headers=key)).status_code == 202
        assert (await client.post(DOCUMENTS, json={"id": "a", "text": "b"})).status_code == 202


async def test_ndjson_that_finds_no_room_tells_what_was_taken_and_where_to_go_on():
    fleet = FakeFleet()
    rows = [{"id": f"d{i}", "text": "t"} for i in range(300)]
    taken = fleet.enqueue_blocks

    async def first_only(collection, blocks, **options):
        if fleet.blocks:
            raise QueueFull(retry_after_s=4)
        return await taken(collection, blocks, **options)

    fleet.enqueue_blocks = first_only
    async with gateway_client(fleet, GatewayLimits(queue_full_wait_s=0)) as client:
        await made(client)
        answer = await client.post(DOCUMENTS, content=lines(*rows), headers=NDJSON)
    said = answer.json()
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "4"
    assert said["error"]["code"] == "queue_full"
    assert (said["accepted"], said["next_line"]) == (256, 257)
    assert fleet.submissions.kept[said["submission_id"]].documents == 256


async def test_cancelled_submission_ends_its_stream():
    fleet = FakeFleet()
    fleet.full = [JobCancelled()]
    async with gateway_client(fleet) as client:
        await made(client)
        answer = await client.post(
            DOCUMENTS, content=lines({"id": "a", "text": "b"}), headers=NDJSON
        )
    assert answer.status_code == 409
    assert answer.json()["accepted"] == 0


async def test_idempotency_key_makes_the_same_submission():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await made(client)
        said = [
            (
                await client.post(
                    DOCUMENTS,
                    json={"id": "a", "text": "b"},
                    headers={"idempotency-key": key} if key else {},
                )
            ).json()["submission_id"]
            for key in ("k1", "k1", "k2", None)
        ]
        bad = await client.post(
            DOCUMENTS, json={"id": "a", "text": "b"}, headers={"idempotency-key": "x" * 300}
        )
    assert said[0] == said[1]
    assert len(set(said)) == 3
    assert bad.status_code == 400
    assert bad.json()["error"]["field"] == "Idempotency-Key"


async def test_given_versions_are_wanted_where_the_collection_has_them():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await made(client, versions="given")
        without = await client.post(DOCUMENTS, json={"id": "a", "text": "b"})
        with_one = await client.post(DOCUMENTS, json={"id": "a", "text": "b", "version": 7})
        deletion = await client.delete(f"{DOCUMENTS}/a?version=8")
        unversioned = await client.delete(f"{DOCUMENTS}/a")
    assert without.json()["error"]["field"] == "documents[0].version"
    assert with_one.status_code == 202
    assert deletion.status_code == 202
    assert fleet.deleted == [("a", 8)]
    assert unversioned.json()["error"]["field"] == "version"


@pytest.mark.parametrize("query", ["truncate=maybe", "trunkate=true"])
async def test_query_parameters_are_checked(query):
    async with gateway_client(FakeFleet()) as client:
        await made(client)
        answer = await client.post(f"{DOCUMENTS}?{query}", json={"id": "a", "text": "b"})
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == query.split("=")[0]


async def test_documents_are_read_and_deleted_by_ids_with_slashes():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await made(client)
        await client.post(DOCUMENTS, json={"id": "a/b c", "text": "t", "metadata": {"k": [1]}})
        read = await client.get(f"{DOCUMENTS}/a/b%20c")
        missing = await client.get(f"{DOCUMENTS}/a")
        deleted = await client.delete(f"{DOCUMENTS}/a/b%20c")
    assert read.json() == {"id": "a/b c", "text": "t", "version": 1, "metadata": {"k": [1]}}
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "document_not_found")
    assert deleted.status_code == 202
    assert fleet.deleted == [("a/b c", None)]
    assert deleted.json()["submission_id"] in fleet.submissions.kept


async def test_submissions_are_followed_and_cancelled():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await made(client)
        sent = (await client.post(DOCUMENTS, json={"id": "a", "text": "b"})).json()
        path = f"/submissions/{sent['submission_id']}"
        seen = (await client.get(path)).json()
        cancelled = (await client.post(f"{path}/cancel")).json()
        again = (await client.delete(path)).json()
        unknown = await client.get("/submissions/" + "0" * 32)
    assert (seen["state"], seen["documents"], seen["committed"], seen["pending"]) == (
        "closed",
        1,
        0,
        1,
    )
    assert cancelled["state"] == again["state"] == "cancelled"
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "submission_not_found")


async def test_missing_collection_is_a_404_before_the_body_is_read():
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post(DOCUMENTS, content=b"{", headers=NDJSON)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "collection_not_found"


def cut(cutter, *parts):
    found = [(line.number, line.raw) for part in parts for line in cutter.feed(part)]
    return found + [(line.number, line.raw) for line in cutter.end()]


def test_lines_are_cut_wherever_the_parts_end():
    whole = b"a\nbc\r\n\n d \nlast"
    expected = cut(LineCutter(100), whole)
    assert expected == [(1, b"a"), (2, b"bc\r"), (4, b" d "), (5, b"last")]
    for at in range(len(whole) + 1):
        assert cut(LineCutter(100), whole[:at], whole[at:]) == expected
    assert cut(LineCutter(100), *(bytes([byte]) for byte in whole)) == expected


def test_long_lines_are_skipped_in_bounded_memory():
    cutter = LineCutter(10)
    parts = [b"ok\n", *([b"x" * 1000] * 50), b"\nfine\n", b"y" * 11 + b"\n", b"z" * 11]
    assert cut(cutter, *parts) == [(1, b"ok"), (2, None), (3, b"fine"), (4, None), (5, None)]
