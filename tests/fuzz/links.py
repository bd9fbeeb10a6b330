"""schemathesis's own state machine: requests that follow the links of the OpenAPI document.

An answer's ids and names go into the requests that come after it. Which rule runs and what it sends
comes from Hypothesis by its seed; schemathesis leaves a link unused at times, by a coin of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import hypothesis
import requests
import schemathesis
from fuzz.contract import Contract
from fuzz.corpus import COLLECTIONS, Request, as_request, prepare
from fuzz.keys import MINE, Keyring
from fuzz.requests_run import JSON, Tally, check_one
from fuzz.wire import Answer, Connection
from hypothesis.errors import FlakyStrategyDefinition
from schemathesis.core.transport import Response

from vecfleet.worker.fake_engine import NAN

STEPS = 30  # of one scenario
_AT_ONCE = 10  # scenarios of one seed
_POISONED = 0.1  # of the documents put in end in the dead letter


@dataclass
class Followed:
    """What came of a share of the scenarios."""

    tally: Tally = field(default_factory=Tally)
    served: Counter[str] = field(default_factory=Counter)
    links: Counter[str] = field(default_factory=Counter)  # followed, by their full name


def declared_links(document: dict[str, Any]) -> set[str]:
    """The document's links as schemathesis calls them."""
    return {
        f"{method.upper()} {path} -> [{status}] {name}"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for status, answer in operation["responses"].items()
        for name in answer.get("links", ())
    }


async def follow_links(
    port: int, contract: Contract, keyring: Keyring, cases: int, seed: int, workers: int
) -> Followed:
    """At least ``cases`` requests in scenarios of ``STEPS``, by several processes."""
    total, loop = Followed(), asyncio.get_running_loop()
    share = max(1, cases // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        arguments = [
            (port, contract.document, keyring, share, seed * 1000 + n) for n in range(workers)
        ]
        found = await asyncio.gather(
            *(loop.run_in_executor(pool, run_scenarios, *given) for given in arguments)
        )
    for one in found:
        total.tally.add(one.tally)
        total.served += one.served
        total.links += one.links
    return total


def run_scenarios(
    port: int, document: dict[str, Any], keyring: Keyring, cases: int, seed: int
) -> Followed:
    """Scenarios of at least ``cases`` requests to ``port``; what is wrong is in the tally."""
    contract, followed = Contract(document), Followed()
    generator = random.Random(f"links/{seed}")
    schema = schemathesis.openapi.from_dict(document)
    with asyncio.Runner() as runner:
        connection = Connection(port)

        class Machine(schema.as_state_machine()):  # type: ignore[misc]
            def before_call(self, case: Any) -> None:
                _make_likely(case, generator)

            def call(self, case: Any, **kwargs: Any) -> Response:
                prepared = prepare(case)
                request = keyring.signed(as_request(prepared, "a link"), keyring.mine)
                answer = runner.run(
                    check_one(connection, contract, request, followed.tally, keyring=keyring)
                )
                return _response(answer, prepared)

            def validate_response(self, response: Response, case: Any, *_: Any, **__: Any) -> None:
                """It was checked when it came."""

            def teardown(self) -> None:
                for node in self.recorder.cases.values():
                    if node.transition is not None and node.is_transition_applied:
                        name, _, _ = node.transition.id.rpartition(" -> ")
                        followed.links[name] += 1

        scenarios = max(1, min(_AT_ONCE, cases // STEPS))
        seeds = random.Random(f"scenarios/{seed}")
        while followed.tally.cases < cases:
            runner.run(
                check_one(connection, contract, _hopeless(keyring), followed.tally, keyring=keyring)
            )
            hypothesis.seed(seeds.getrandbits(64))(Machine)
            # The coin, and what the fleet answers, are not Hypothesis's: it may notice.
            with contextlib.suppress(FlakyStrategyDefinition):
                Machine.run(settings=_settings(scenarios))
        connection.close()
    followed.served = contract.served
    return followed


def _settings(scenarios: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=scenarios,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def _hopeless(keyring: Keyring) -> Request:
    """Documents that end in the dead letter, so that its links lead somewhere."""
    documents = [{"id": f"hopeless-{n}", "text": f"{NAN} {n}"} for n in range(20)]
    body = json.dumps({"documents": documents}).encode()
    target = "/collections/books/documents"
    return keyring.signed(Request("POST", target, dict(JSON), body, "a link"), keyring.mine)


def _make_likely(case: Any, generator: random.Random) -> None:
    """Names that are there, and now and then a text that no engine can do."""
    name = case.path_parameters.get("collection")
    if name is not None and name not in (*COLLECTIONS, MINE) and generator.random() < 0.8:
        case.path_parameters["collection"] = generator.choice(COLLECTIONS)
    body = case.body
    rows = body.get("documents") if isinstance(body, dict) else None
    if isinstance(rows, list) and rows and isinstance(rows[0], dict):
        for row in rows:
            if isinstance(row, dict) and generator.random() < 0.7:
                row.pop("version", None)  # most collections number for themselves
        if generator.random() < _POISONED:
            rows[0]["text"] = f"{NAN} {generator.random()}"


def _response(answer: Answer, prepared: requests.PreparedRequest) -> Response:
    try:
        phrase = HTTPStatus(answer.status).phrase
    except ValueError:
        phrase = ""
    headers = {name: [value] for name, value in answer.headers.items()}
    return Response(answer.status, headers, answer.body, prepared, 0.01, False, phrase)
