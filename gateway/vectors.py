"""Vectors in the forms clients ask for."""

from __future__ import annotations

from binascii import b2a_base64

import numpy as np
import orjson
from starlette.responses import Response

from vecfleet.common.payloads import EmbedReply

_JSON = "application/json"


def openai_answer(reply: EmbedReply, encoding: str) -> Response:
    """``reply`` as the OpenAI API answers; ``encoding`` is float, base64 or bytes.

    bytes is the raw vectors as the body (row after row, little-endian float32), with what the
    JSON would say beside them in the header ``metadata``.
    """
    tokens = sum(reply.tokens)
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    model = orjson.dumps(reply.model)
    if encoding == "bytes":
        metadata = (
            b'{"object":"list","model":%b,"dtype":"float32","endianness":"little",'
            b'"shape":[%d,%d],"usage":%b}' % (model, len(reply), reply.dimension, usage)
        )
        headers = {"metadata": metadata.decode("ascii", "backslashreplace")}
        return Response(reply.vectors, 200, headers, "application/octet-stream")
    rows = _base64_rows(reply) if encoding == "base64" else _float_rows(reply)
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (i, row) for i, row in enumerate(rows)
    )
    body = b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, model, usage)
    return Response(body, media_type=_JSON)


def list_answer(reply: EmbedReply) -> Response:
    """``reply`` as a bare JSON array of arrays."""
    return Response(b"[%b]" % b",".join(_float_rows(reply)), media_type=_JSON)


def _base64_rows(reply: EmbedReply) -> list[bytes]:
    return [b'"%b"' % b2a_base64(reply.row(i), newline=False) for i in range(len(reply))]


def _float_rows(reply: EmbedReply) -> list[bytes]:
    # orjson writes a float32 with the fewest digits that read back as the same float32.
    matrix = np.frombuffer(reply.vectors, dtype="<f4").reshape(len(reply), reply.dimension)
    return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) for row in matrix]
