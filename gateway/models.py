"""GET /v1/models: what is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.directory import ServedModel
from vecfleet.common.errors import UnknownModel
from vecfleet.gateway import answers
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.routing import OPEN, Routes, json_response


class Models:
    """The models that workers announced in the last day."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def routes(self) -> Routes:
        """The router."""
        routes = Routes("models")
        routes.add(
            "GET",
            "/v1/models",
            self.list,
            says="The models that are served",
            scopes=OPEN,
            answer=answers.MODELS,
            links=answers.LINKS_OF_MODELS,
        )
        routes.add(
            "GET",
            "/v1/models/{model:path}",
            self.read,
            says="One model",
            scopes=OPEN,
            answer=answers.MODEL,
        )
        return routes

    async def list(self, request: Request) -> Response:
        """All models."""
        data = [_entry(model) for model in await self._fleet.models()]
        return json_response({"object": "list", "data": data})

    async def read(self, request: Request) -> Response:
        """One model, by its name as announced (which may hold slashes)."""
        name = request.path_params["model"]
        for model in await self._fleet.models():
            if model.card.name == name:
                return json_response(_entry(model))
        raise UnknownModel(field="model")


def _entry(model: ServedModel) -> dict[str, Any]:
    card = model.card
    return {
        "id": card.name,
        "object": "model",
        "created": model.last_seen_ms // 1000,
        "owned_by": "vecfleet",
        "tasks": card.tasks,
        "dimension": card.dimension,
        "max_tokens": card.max_tokens,
        "rerank_method": card.rerank_method,
        "prompts": sorted(card.prompts),
        "takes_instruction": card.takes_instruction,
        "matryoshka": card.matryoshka,
        "matryoshka_dimensions": card.matryoshka_dimensions,
        "matryoshka_least": card.matryoshka_least,
        "engine": card.engine,
        "dtype": card.dtype,
        "quantization": card.quantization,
        "pooling": card.pooling,
        "workers": len(model.workers),
    }
