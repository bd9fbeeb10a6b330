"""The words that models expect around a text."""

from __future__ import annotations

DEFAULT_TASK = "Given a web search query, retrieve relevant passages that answer the query"

_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
QWEN3_PREFIX = f"<|im_start|>system\n{_JUDGE}<|im_end|>\n<|im_start|>user\n"
QWEN3_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QWEN3_YES, QWEN3_NO = "yes", "no"


def qwen3_question(instruction: str, query: str) -> str:
    """What comes between ``QWEN3_PREFIX`` and the document."""
    return f"<Instruct>: {instruction or DEFAULT_TASK}\n\n<Query>: {query}\n\n<Document>: "
