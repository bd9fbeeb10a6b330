"""A share of the HTTP cases against real processes; ``make fuzz`` runs them long."""

import asyncio

import pytest
from fuzz.__main__ import run_http
from fuzz.contract import Broken, Contract
from fuzz.fleet import live_fleet
from fuzz.requests_run import Tally, get_document
from fuzz.wire import Answer
from servers import require_or_skip

CASES = 1500


@pytest.mark.timeout(300)
def test_no_answer_breaks_the_contract(tmp_path, redis_binary):
    require_or_skip(redis_binary, "redis-server")
    tally = Tally()
    with live_fleet(tmp_path) as fleet:
        asyncio.run(run_http(fleet, CASES, 7, tally, outages=False))
        document = asyncio.run(get_document(fleet.port))
    assert not tally.failures, "\n".join(tally.failures[:10])
    assert tally.cases >= CASES
    assert tally.seen_5xx == 0
    assert {200, 201, 202, 400, 404, 405, 422} <= set(tally.statuses)
    _refuses_what_is_not_declared(Contract(document))


def _refuses_what_is_not_declared(contract):
    """The check itself can fail."""
    good = {"content-type": "application/json"}
    for method, target, answer in (
        ("GET", "/health", Answer(200, good, b'{"status": "fine"}')),
        ("POST", "/v1/embeddings", Answer(500, good, b"{}")),
        ("POST", "/v1/embeddings", Answer(418, good, b"{}")),
        ("POST", "/v1/embeddings", Answer(400, good, b'{"error": "no"}')),
        ("POST", "/embed", Answer(400, good, b"no json")),
        ("GET", "/nowhere", Answer(200, good, b"{}")),
    ):
        with pytest.raises(Broken):
            contract.check(method, target, answer)
