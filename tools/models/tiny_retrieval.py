"""Tiny embedding models and rerankers of the real architectures, with random weights.

Each is made in about a second, without a hub, in the layout of the real files: for `make run-bge` and the
tests. What they say means nothing; how it is computed is what the real ones do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Pooling = Literal["cls", "mean", "lasttoken"]

CORPUS = [
    "what is the capital of france? paris is the capital and largest city of france.",
    "the giant panda is a bear that lives in the mountains of china and eats bamboo.",
    "represent this sentence for searching relevant passages: query: passage: retrieve",
]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# With weights this large, unlike a trained model's first ones, texts that differ get vectors that do.
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.3,
}  # fmt: skip


def bert_tokenizer() -> Any:
    """WordPiece with [CLS] and [SEP], as BERT, BGE and E5 have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106, no password
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=WORDS))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], WORDS, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=128, model_input_names=inputs, **names
    )


def byte_tokenizer(*, padding_side: Literal["left", "right"]) -> Any:
    """Byte pairs: as XLM-RoBERTa puts its special tokens when padded right, as Qwen3-Embedding when left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=special)
    )
    single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
    if padding_side == "left":
        single, pair = "$A </s>", "$A $B </s>"
    made.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side=padding_side, model_max_length=128, **names
    )


def write_modules(folder: Path, pooling: Pooling, prompts: dict[str, str] | None = None) -> None:
    """The files that tell sentence-transformers how to pool, and with `prompts` what to put before texts."""

    def write(name: str, content: object) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))

    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write(
        "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ],
    )
    modes = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()}
    write("1_Pooling/config.json", {"word_embedding_dimension": 32, **flags})
    write("sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    if prompts is not None:
        write("config_sentence_transformers.json", {"prompts": prompts})


def bert(folder: Path, *, seed: int = 0) -> Path:
    """BERT as BGE and E5 are built, without the files of sentence-transformers."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    tokenizer = bert_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **SIZES)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def xlm_roberta(folder: Path) -> Path:
    """XLM-RoBERTa as bge-m3 and multilingual-e5 are built."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(padding_side="right")
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=130, pad_token_id=1, type_vocab_size=1, **SIZES
    )
    XLMRobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def qwen3(folder: Path) -> Path:
    """Qwen3 as Qwen3-Embedding is built: causal, padded on the left."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(padding_side="left")
    config = Qwen3Config(
        vocab_size=len(tokenizer), max_position_embeddings=256, num_key_value_heads=2, head_dim=8,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reranker(folder: Path, *, architecture: Literal["bert", "xlm-roberta"] = "bert", labels: int = 1) -> Path:
    """A cross-encoder as ms-marco-MiniLM (BERT) or bge-reranker (XLM-RoBERTa) is built."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        XLMRobertaConfig,
        XLMRobertaForSequenceClassification,
    )

    torch.manual_seed(0)
    model: Any
    if architecture == "bert":
        tokenizer = bert_tokenizer()
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
        model = BertForSequenceClassification(BertConfig(num_labels=labels, **size, **SIZES))
    else:
        tokenizer = byte_tokenizer(padding_side="right")
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": 130, "pad_token_id": 1}
        model = XLMRobertaForSequenceClassification(XLMRobertaConfig(num_labels=labels, **size, **SIZES))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_bge(folder: Path) -> Path:
    """bge-small-en's files and the way it is computed, with random weights."""
    write_modules(bert(folder), "cls")
    return folder
