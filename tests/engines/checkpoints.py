"""Tiny random checkpoints with real tokenizers, built in a moment, for tests of the engines."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

CORPUS = [
    "yes no the capital of China is Beijing gravity is a force that attracts two bodies",
    "Instruct Query Document Judge whether the Document meets the requirements",
    "system user assistant Given a web search query retrieve relevant passages",
] * 20
POISON = "[[poison]]"  # not in the model's vocabulary
NAN = "!"  # a token whose embedding is NaN
SPREAD = 0.08  # of the random weights: large enough that texts get different scores


def bert_cross_encoder(folder: Path) -> Path:
    """A BERT that scores pairs, one label."""
    return _save(folder, BertForSequenceClassification(_bert_config(1)), _word_tokenizer("bert"))


def bare_cross_encoder(folder: Path) -> Path:
    """The same, whose files ask for scores without an activation."""
    bert_cross_encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    bare = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    _write(folder / "config.json", {**config, **bare})
    return folder


def roberta_cross_encoder(folder: Path) -> Path:
    """A RoBERTa: another head, and positions that count from the padding's id."""
    tokenizer = _word_tokenizer("roberta")
    config = RobertaConfig(
        **_sizes(),
        vocab_size=len(tokenizer) + 7,
        max_position_embeddings=130,
        type_vocab_size=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, RobertaForSequenceClassification(config), tokenizer)


def qwen3_reranker(folder: Path) -> Path:
    """A Qwen3 that answers yes or no."""
    return _save(folder, _qwen3(), _byte_tokenizer(end_of_text=False))


def qwen3_embedding(folder: Path) -> Path:
    """A Qwen3 that embeds by its last token, with a query prompt."""
    _save(folder, _qwen3(), _byte_tokenizer(end_of_text=True))
    _write_pooling(folder)
    prompt = "Instruct: Given a web search query, retrieve relevant passages\nQuery:"
    _write(
        folder / "config_sentence_transformers.json", {"prompts": {"query": prompt, "document": ""}}
    )
    return folder


def bert_embedding(folder: Path) -> Path:
    """A BERT that embeds by its first token."""
    _save(folder, BertModel(_bert_config(1)), _word_tokenizer("bert"))
    _write_pooling(folder, "cls_token")
    return folder


def _write_pooling(folder: Path, mode: str = "lasttoken") -> None:
    types = "sentence_transformers.models"
    _write(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": f"{types}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{types}.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{types}.Normalize"},
        ],
    )
    (folder / "1_Pooling").mkdir()
    _write(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": 128, f"pooling_mode_{mode}": True},
    )


def fragile_embedding(folder: Path) -> Path:
    """The same, but ``POISON`` is no token of the model's, and ``NAN`` gives NaN."""
    tokenizer = _byte_tokenizer(end_of_text=True)
    model = _qwen3()
    tokenizer.add_tokens([f"[[{n}]]" for n in range(model.config.vocab_size - len(tokenizer))])
    tokenizer.add_tokens([POISON])
    assert tokenizer.convert_tokens_to_ids(POISON) == model.config.vocab_size
    _save(folder, model, tokenizer)
    broken = tokenizer.convert_tokens_to_ids(NAN)
    model.get_input_embeddings().weight.data[broken] = float("nan")
    model.save_pretrained(folder)
    _write_pooling(folder)
    return folder


def _sizes() -> dict[str, int]:
    return {
        "hidden_size": 128,  # heads of 32: vLLM's CPU attention takes no smaller ones
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }


def _bert_config(labels: int) -> BertConfig:
    return BertConfig(
        **_sizes(), vocab_size=400, max_position_embeddings=128, num_labels=labels, pad_token_id=0
    )


def _qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=640,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
        )
    )


def _word_tokenizer(family: str) -> PreTrainedTokenizerFast:
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=390, special_tokens=list(names))
    tokenizer.train_from_iterator(CORPUS, trainer)
    cls, sep = (
        ("[CLS]", tokenizer.token_to_id("[CLS]")),
        ("[SEP]", tokenizer.token_to_id("[SEP]")),
    )
    second = "1" if family == "bert" else "0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[cls, sep],
    )
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (family == "bert")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        model_input_names=inputs,
    )


def _byte_tokenizer(*, end_of_text: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if end_of_text:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>",
            special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def _save(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> Path:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, SPREAD, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), "utf-8")
