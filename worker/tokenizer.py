"""Text to token ids: single texts and pairs, cut to the model's length, with what was cut told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer

from vecfleet.common.errors import ConfigError, TextsTooLong
from vecfleet.worker.calls import Encoded
from vecfleet.worker.model_files import Kind, ModelFiles
from vecfleet.worker.prompts import QWEN3_PREFIX, QWEN3_SUFFIX, qwen3_question

# A very long text costs more to tokenise than to embed, and all but its beginning is cut off.
# So a prefix is tried first, and taken when it fills the model with tokens to spare.
PREFIX_CHARS_PER_TOKEN = 12
PREFIX_SPARE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text as the model reads it."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32] | None = None  # which text of a pair; None: all of the first


class TextTokenizer:
    """A fast tokenizer with a length limit; safe to call from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, max_tokens: int, *, pad_id: int = 0, reads_types: bool = False
    ) -> None:
        """``reads_types``: whether the model is told which text of a pair a token belongs to."""
        self.max_tokens = max_tokens
        self.pad_id = pad_id
        self.reads_types = reads_types
        self._whole = _copy(tokenizer)
        self._cut = _copy(tokenizer)
        self._cut.enable_truncation(max_tokens)
        self._pairs = _copy(tokenizer)
        self._pairs.enable_truncation(max_tokens, strategy="only_second")

    def texts(self, texts: Sequence[str], *, truncate: bool) -> list[Encoded[Tokens]]:
        """Each text with the model's special tokens; raises ``TextsTooLong``."""
        encodings = self._cut.encode_batch_fast([self._prefix(text) for text in texts])
        for place, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            if len(text) > self._prefix_chars and not self._fills(encoding):
                encodings[place] = self._cut.encode(text)
        cut = [bool(encoding.overflowing) for encoding in encodings]
        _check_cut(cut, truncate)
        return [
            Encoded(Tokens(np.array(encoding.ids, np.int32)), len(encoding), was_cut)
            for encoding, was_cut in zip(encodings, cut, strict=True)
        ]

    def question_pairs(
        self, pairs: Sequence[tuple[str, str]], *, kind: Kind, instruction: str, truncate: bool
    ) -> list[Encoded[Tokens]]:
        """Each (query, document) as a reranker of this kind reads it; raises ``TextsTooLong``."""
        if kind == "cross-encoder":
            return self.pairs(pairs, truncate=truncate)
        return self.qwen3_pairs(pairs, instruction, truncate=truncate)

    def pairs(self, pairs: Sequence[tuple[str, str]], *, truncate: bool) -> list[Encoded[Tokens]]:
        """Each (query, document) as one text of two parts; the document is cut.

        Raises ``TextsTooLong`` for queries that leave no room for a document.
        """
        specials = self._whole.num_special_tokens_to_add(is_pair=True)
        self._check_queries(pairs, self.max_tokens - specials)
        encodings = self._pairs.encode_batch(
            [(query, self._prefix(document)) for query, document in pairs]
        )
        for place, ((query, document), encoding) in enumerate(zip(pairs, encodings, strict=True)):
            if len(document) > self._prefix_chars and not self._fills(encoding):
                encodings[place] = self._pairs.encode(query, document)
        cut = [bool(encoding.overflowing) for encoding in encodings]
        _check_cut(cut, truncate)
        return [
            Encoded(
                Tokens(np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)),
                len(encoding),
                was_cut,
            )
            for encoding, was_cut in zip(encodings, cut, strict=True)
        ]

    def qwen3_pairs(
        self, pairs: Sequence[tuple[str, str]], instruction: str, *, truncate: bool
    ) -> list[Encoded[Tokens]]:
        """Each (query, document) as Qwen3-Reranker's prompt; the document is cut.

        Raises ``TextsTooLong`` for queries that leave no room for a document.
        """
        prefix, suffix = (self._plain_ids(part) for part in (QWEN3_PREFIX, QWEN3_SUFFIX))
        room = self.max_tokens - len(prefix) - len(suffix)
        questions = [qwen3_question(instruction, query) for query, _ in pairs]
        self._check_queries([(question, "") for question in questions], room)
        bodies = [
            question + self._prefix(document)
            for question, (_, document) in zip(questions, pairs, strict=True)
        ]
        encodings = self._whole.encode_batch_fast(bodies, add_special_tokens=False)
        for place, (_, document) in enumerate(pairs):
            spare = len(encodings[place]) - room
            if len(document) > self._prefix_chars and spare < PREFIX_SPARE_TOKENS:
                encodings[place] = self._whole.encode(
                    questions[place] + document, add_special_tokens=False
                )
        cut = [len(encoding) > room for encoding in encodings]
        _check_cut(cut, truncate)
        found = []
        for encoding, was_cut in zip(encodings, cut, strict=True):
            ids = np.array([*prefix, *encoding.ids[:room], *suffix], np.int32)
            found.append(Encoded(Tokens(ids), len(ids), was_cut))
        return found

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""
        found: int | None = self._whole.token_to_id(token)
        return found

    @property
    def _prefix_chars(self) -> int:
        return PREFIX_CHARS_PER_TOKEN * (self.max_tokens + PREFIX_SPARE_TOKENS)

    def _prefix(self, text: str) -> str:
        return text[: self._prefix_chars]

    def _fills(self, encoding: Encoding) -> bool:
        """Whether a prefix gave so many tokens that those before the cut are the text's own."""
        return sum(len(part) for part in encoding.overflowing) >= PREFIX_SPARE_TOKENS

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._whole.encode(text, add_special_tokens=False).ids
        return ids

    def _check_queries(self, pairs: Sequence[tuple[str, str]], room: int) -> None:
        """Raise ``TextsTooLong`` where the query of a pair has ``room`` tokens or more."""
        lengths: dict[str, int] = {}
        for query, _ in pairs:
            # A token has at least one byte, so most queries need not be counted.
            if query not in lengths:
                short = len(query.encode()) < room
                lengths[query] = 0 if short else len(self._plain_ids(query))
        long = [place for place, (query, _) in enumerate(pairs) if lengths[query] >= room]
        if long:
            raise TextsTooLong(
                f"the query leaves no room for a document in {self.max_tokens} tokens",
                indices=long,
                field="query",
            )


def load_tokenizer(files: ModelFiles) -> TextTokenizer:
    """The model's fast tokenizer; raises ``ConfigError`` for a model without one."""
    tokenizer = AutoTokenizer.from_pretrained(files.path, trust_remote_code=False, use_fast=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{files.name} has no fast tokenizer (tokenizer.json)", field="model")
    return TextTokenizer(
        backend,
        files.max_tokens,
        pad_id=tokenizer.pad_token_id or 0,
        reads_types="token_type_ids" in tokenizer.model_input_names,
    )


def _check_cut(cut: list[bool], truncate: bool) -> None:
    if not truncate and any(cut):
        raise TextsTooLong(indices=[place for place, was_cut in enumerate(cut) if was_cut])


def _copy(tokenizer: Any) -> Tokenizer:
    """A copy that neither cuts nor pads: those are settings of the object, not of a call."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
