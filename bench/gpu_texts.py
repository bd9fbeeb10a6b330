"""Texts of a known length in tokens, and the tokenizer that counts them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from vecfleet.common.errors import ConfigError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END)
WORDS = ("yes", "no")  # what the reranker answers: one token each

# How the tokenizers of Qwen2 and Qwen3 cut a text before they look for tokens.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PASSAGES_A_TEXT = 200
_WORD_REPEATS = 5_000


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of Qwen's kind with at most ``vocabulary`` tokens; takes seconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *(WORDS * _WORD_REPEATS)], trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    if any(tokenizer.token_to_id(word) is None for word in WORDS):
        raise ConfigError("the tokenizer learnt no token for yes and no")
    return tokenizer


def ends_with(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """A copy that puts ``token`` behind each text, as embedding models want it."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"$A {token}", special_tokens=[(token, copy.token_to_id(token))]
            ),
        ]
    )
    return copy


@dataclass(frozen=True, slots=True)
class _Whole:
    """A long text and where its tokens begin."""

    text: str
    starts: list[int]  # of each token, in characters; one more for the end
    begins_piece: list[bool]  # where a cut changes no token


def texts_of_length(
    tokenizer: Tokenizer, passages: Sequence[str], tokens: int, count: int, seed: int = 1
) -> list[str]:
    """``count`` different pieces of running text that have exactly ``tokens`` tokens each.

    ``tokenizer`` adds no special tokens. Raises ``ConfigError`` when the passages are too few.
    """
    candidates = _pieces(tokenizer, passages, tokens, random.Random(seed))
    found: dict[str, None] = {}
    while len(found) < count:
        wanted = min(8192, (count - len(found)) * 9 // 8 + 16)
        tried = [text for text, _ in zip(candidates, range(wanted), strict=False)]
        if not tried:
            raise ConfigError(f"the passages hold only {len(found)} texts of {tokens} tokens")
        # A few change at their ends when they stand alone.
        encoded = tokenizer.encode_batch_fast(tried)
        right = (text for text, ids in zip(tried, encoded, strict=True) if len(ids) == tokens)
        found.update(dict.fromkeys(right))
    return list(found)[:count]


def _pieces(
    tokenizer: Tokenizer, passages: Sequence[str], tokens: int, chance: random.Random
) -> Iterator[str]:
    wholes = list(_wholes(tokenizer, passages))
    places = [
        (number, start)
        for number, whole in enumerate(wholes)
        for start in range(len(whole.begins_piece) - tokens)
        if whole.begins_piece[start] and whole.begins_piece[start + tokens]
    ]
    chance.shuffle(places)
    for number, start in places:
        whole = wholes[number]
        yield whole.text[whole.starts[start] : whole.starts[start + tokens]].strip()


def _wholes(tokenizer: Tokenizer, passages: Sequence[str]) -> Iterator[_Whole]:
    joined = [
        "\n\n".join(passages[first : first + _PASSAGES_A_TEXT])
        for first in range(0, len(passages), _PASSAGES_A_TEXT)
    ]
    for text, encoding in zip(joined, tokenizer.encode_batch(joined), strict=True):
        pieces = encoding.word_ids
        before = [None, *pieces[:-1]]
        yield _Whole(
            text,
            [begin for begin, _ in encoding.offsets],
            [here != last for here, last in zip(pieces, before, strict=True)],
        )
