"""POST /v1/embeddings (OpenAI) and POST /embed (Text Embeddings Inference)."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.document import naming_texts
from vecfleet.common.errors import InvalidInput
from vecfleet.common.payloads import EmbedReply
from vecfleet.gateway import answers, fields, schemas
from vecfleet.gateway.body import Bodies
from vecfleet.gateway.config import GatewayConfig
from vecfleet.gateway.context import context_of, tenant_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.routing import Routes
from vecfleet.gateway.texts import Wishes, check_wishes, one_or_many, wishes
from vecfleet.gateway.unread import Unread
from vecfleet.gateway.vectors import list_answer, openai_answer

_OPENAI_FIELDS = frozenset(
    ("input", "model", "encoding_format", "user", "truncate", *Wishes.__annotations__)
)
_TEI_FIELDS = frozenset(
    ("inputs", "truncate", "truncation_direction", "normalize", *Wishes.__annotations__)
)


class Embeddings:
    """Texts to vectors."""

    def __init__(self, fleet: Fleet, bodies: Bodies, config: GatewayConfig, unread: Unread) -> None:
        self._fleet = fleet
        self._unread = unread
        self._bodies = bodies
        self._config = config

    def routes(self) -> Routes:
        """The router."""
        routes = Routes("embeddings")
        routes.add(
            "POST",
            "/v1/embeddings",
            self.openai,
            says="Embed texts; the OpenAI API's shape",
            body=schemas.EMBEDDINGS,
            answer=answers.EMBEDDINGS,
            media=("application/json", "application/octet-stream"),
            scopes=("embed",),
        )
        routes.add(
            "POST",
            "/embed",
            self.tei,
            says="Embed texts; Text Embeddings Inference's shape",
            body=schemas.EMBED,
            answer=answers.EMBED,
            scopes=("embed",),
        )
        return routes

    async def openai(self, request: Request) -> Response:
        """The OpenAI API; ``prompt_name``, ``instruction``, ``truncate`` and bytes are ours."""
        body = await self._bodies.read_object(request)
        fields.only(body, _OPENAI_FIELDS)
        encoding = fields.choice(body, "encoding_format", ("float", "base64", "bytes"))
        texts = one_or_many(body.get("input"), "input", self._config.limits)
        name = fields.word(body, "model", self._config.embed_model)
        asked = wishes(body)
        truncate = fields.flag(body, "truncate", True)
        fields.word(body, "user")
        card = await self._fleet.find_model(name, "embed")
        check_wishes(asked, card, texts, self._config.limits)
        length = card.vector_length(asked["dimensions"])
        self._unread.check_vectors(context_of(request), len(texts), length)
        with naming_texts("input", alone=isinstance(body["input"], str)):
            reply = await self._fleet.embed(
                texts, model=card, truncate=truncate, tenant=tenant_of(request), **asked
            )
        _note(request, reply)
        return openai_answer(reply, encoding)

    async def tei(self, request: Request) -> Response:
        """Text Embeddings Inference; ``truncate`` is false unless given, as there."""
        body = await self._bodies.read_object(request)
        fields.only(body, _TEI_FIELDS)
        texts = one_or_many(body.get("inputs"), "inputs", self._config.limits)
        asked = wishes(body)
        if not fields.flag(body, "normalize", True):
            raise InvalidInput(
                "normalize must be true: the vectors have length 1", field="normalize"
            )
        check_direction(body)
        card = await self._fleet.find_model(self._config.embed_model, "embed")
        check_wishes(asked, card, texts, self._config.limits)
        length = card.vector_length(asked["dimensions"])
        self._unread.check_vectors(context_of(request), len(texts), length)
        truncate = fields.flag(body, "truncate", False)
        with naming_texts("inputs", alone=isinstance(body["inputs"], str)):
            reply = await self._fleet.embed(
                texts, model=card, truncate=truncate, tenant=tenant_of(request), **asked
            )
        _note(request, reply)
        return list_answer(reply)


def check_direction(body: fields.Row) -> None:
    """Texts are cut at their end only."""
    direction = body.get("truncation_direction")
    if direction not in (None, "right", "Right"):
        raise InvalidInput(
            "truncation_direction must be right: texts are cut at their end",
            field="truncation_direction",
        )


def _note(request: Request, reply: EmbedReply) -> None:
    context_of(request).note_inference(
        reply.queue_ms, reply.inference_ms, sum(reply.tokens), len(reply.truncated)
    )
