"""The checks on texts that the synchronous routes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from vecfleet.common.document import check_text, check_texts, check_tokens
from vecfleet.common.errors import InvalidInput
from vecfleet.common.model import ModelCard
from vecfleet.gateway import fields
from vecfleet.gateway.config import GatewayLimits

MAX_DIMENSIONS = 1 << 16


class Wishes(TypedDict):
    """How texts shall be embedded; None: not said."""

    dimensions: int | None
    prompt_name: str | None
    instruction: str | None


def one_or_many(value: Any, field: str, bounds: GatewayLimits) -> list[str]:
    """The texts of an input that is a string or a list of strings, checked."""
    if isinstance(value, str):
        size = check_text(value, field)
        texts: list[Any] = [value]
    elif isinstance(value, list):
        if value and isinstance(value[0], int | list):
            raise InvalidInput(
                f"{field} holds token ids; send strings, which the model's own tokenizer reads",
                field=field,
            )
        size = check_texts(value, field, bounds.max_inputs)
        texts = value
    else:
        raise InvalidInput(f"{field} must be a string or a list of strings", field=field)
    check_size(size, len(texts), field, bounds)
    return texts


def check_size(size: int, texts: int, field: str, bounds: GatewayLimits) -> None:
    """Raise ``TooManyItems`` when texts of ``size`` bytes have too many tokens together."""
    check_tokens(size, texts, field, bounds.max_request_tokens)


def wishes(body: fields.Row) -> Wishes:
    """The ``dimensions``, ``prompt_name`` and ``instruction`` of a request."""
    instruction = body.get("instruction")
    if instruction is not None:
        check_text(instruction, "instruction")
    return {
        "dimensions": fields.whole(body, "dimensions", None, 1, MAX_DIMENSIONS),
        "prompt_name": fields.word(body, "prompt_name"),
        "instruction": instruction,
    }


def check_wishes(
    asked: Wishes, card: ModelCard, texts: Sequence[str], bounds: GatewayLimits
) -> None:
    """Refuse, before anything is queued, what the model does not take or is too much together."""
    card.vector_length(asked["dimensions"])
    before = card.prompt_of(prompt_name=asked["prompt_name"], instruction=asked["instruction"])
    if asked["instruction"] is not None and before:
        size = len(before.encode()) * len(texts) + sum(len(text.encode()) for text in texts)
        check_size(size, len(texts), "instruction", bounds)
