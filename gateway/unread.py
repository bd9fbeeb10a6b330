"""Large answers: sent in parts as fast as they are read, and bounded while they wait for that."""

from __future__ import annotations

from starlette.types import Message, Send

from vecfleet.common import limits
from vecfleet.common.errors import Unavailable
from vecfleet.gateway.config import GatewayLimits
from vecfleet.gateway.context import RequestContext
from vecfleet.gateway.shares import Shares

LARGE_BYTES = 64 << 10  # what has less goes out at once, and most of it into the system's buffers
_DOCUMENT_BYTES = limits.MAX_TEXT_BYTES + limits.MAX_METADATA_BYTES + limits.MAX_ID_BYTES
_NUMBER_BYTES = 13  # of a float in JSON


class Unread:
    """The large answers that clients of one gateway have not read yet, in bytes; tenants share.

    The protocol cuts off who reads nothing at all, so what is held here gets free again.
    """

    def __init__(self, bounds: GatewayLimits) -> None:
        self._held = Shares(bounds.max_unread_bytes)
        self._most_alone = bounds.max_unread_bytes // 2

    def check(self, context: RequestContext, most_bytes: int) -> None:
        """Raise ``Unavailable`` where an answer of ``most_bytes`` would have no room now.

        To be called before it is asked for.
        """
        if not self._held.has_room(context.caller.tenant, min(most_bytes, self._most_alone)):
            raise _too_many()

    def check_documents(self, context: RequestContext, documents: int) -> None:
        """``check`` for an answer with so many documents."""
        self.check(context, min(documents * _DOCUMENT_BYTES, limits.MAX_REPLY_BYTES))

    def check_vectors(self, context: RequestContext, texts: int, dimension: int) -> None:
        """``check`` for an answer with so many vectors."""
        self.check(context, texts * dimension * _NUMBER_BYTES)

    def take(self, context: RequestContext, size: int) -> None:
        """Hold an answer of ``size`` bytes until ``release``; raises ``Unavailable``."""
        if size < LARGE_BYTES:
            return
        if not self._held.take(context.caller.tenant, size):
            raise _too_many()
        context.unread_bytes += size

    def release(self, context: RequestContext) -> None:
        """The request is over: its answer has been read, or nobody is there any more."""
        if context.unread_bytes:
            self._held.give(context.caller.tenant, context.unread_bytes)
            context.unread_bytes = 0


async def send_in_parts(message: Message, send: Send) -> None:
    """ASGI's send of a large body: the next part goes out once the last one has been taken."""
    body = message["body"]
    for start in range(0, len(body), LARGE_BYTES):
        end = start + LARGE_BYTES
        more = end < len(body) or message.get("more_body", False)
        await send({**message, "body": body[start:end], "more_body": more})


def _too_many() -> Unavailable:
    return Unavailable(
        "this gateway holds too many large answers that have not been read; read them, or ask for "
        "less",
        retry_after_s=2.0,
    )
