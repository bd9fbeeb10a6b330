"""The limits both doors check; the same numbers over HTTP and in the producer."""

from __future__ import annotations

BLOCK_DOCUMENTS = 256
BLOCK_BYTES = 1 << 20
MAX_BLOCKS = 1 << 24  # of a submission: 4 billion documents, and 2 MiB a bitmap in Redis
MAX_TEXT_BYTES = 256 << 10
MAX_ID_BYTES = 512
MAX_METADATA_BYTES = 16 << 10
MAX_INPUTS = 2048  # texts of one synchronous request
MAX_REQUEST_TOKENS = 300_000  # estimated tokens of one synchronous request
MAX_RERANK_DOCUMENTS = 1000
WINDOW_TOKENS = 65_536  # interactive ones that a worker holds at most
MAX_TOP_K = 1000
MAX_REPLY_BYTES = 16 << 20  # of the documents in one answer
MAX_BODY_BYTES = 32 << 20
MAX_COLLECTIONS = 1000  # of all tenants: each claim of merges asks Redis for as many queues

BYTES_PER_TOKEN = 4
_HITS_PER_TOKEN = 10
_EXACT_FACTOR = 10  # how much longer comparing with every document takes, roughly


def estimate_tokens(text_bytes: int, texts: int) -> int:
    """Tokens that ``texts`` texts of ``text_bytes`` bytes together come to, roughly.

    English text has about four bytes a token; the worker that tokenises counts exactly.
    """
    return text_bytes // BYTES_PER_TOKEN + 2 * texts


def search_tokens(queries: int, top_k: int, *, exact: bool = False) -> int:
    """What a search counts as where tokens are admitted, shared and claimed."""
    tokens = -(-queries * top_k // _HITS_PER_TOKEN)
    return tokens * _EXACT_FACTOR if exact else tokens
