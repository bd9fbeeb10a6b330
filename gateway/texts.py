"""The checks on texts that the synchronous routes share."""

from __future__ import annotations

from typing import Any

from vecfleet.common import limits
from vecfleet.common.document import check_text, check_texts
from vecfleet.common.errors import InvalidInput, TooManyItems
from vecfleet.common.model import ModelCard
from vecfleet.gateway.config import GatewayLimits


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
    tokens = limits.estimate_tokens(size, texts)
    if tokens > bounds.max_request_tokens:
        raise TooManyItems(
            f"{field} has about {tokens} tokens; at most {bounds.max_request_tokens} are "
            "accepted in one request",
            field=field,
        )


def check_dimensions(dimensions: int | None, card: ModelCard) -> None:
    """Refuse another length than the model's own."""
    if dimensions is not None and dimensions != card.dimension:
        raise InvalidInput(
            f"dimensions must be {card.dimension}: {card.name}'s vectors are not shortened",
            field="dimensions",
        )


def check_prompt_name(name: str | None, card: ModelCard) -> None:
    """Refuse a prompt that the model does not have."""
    if name is not None and name not in card.prompts:
        known = ", ".join(sorted(card.prompts)) or "none"
        raise InvalidInput(
            f"{card.name} has no prompt of this name; it has {known}", field="prompt_name"
        )
