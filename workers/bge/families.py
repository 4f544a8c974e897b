"""How families of models were trained: pooling and prompts, and which kind of model a folder holds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import StartError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from serving.embedding.plain_model import PlainModel


@dataclass(frozen=True)
class Family:
    """Models that were trained alike. What a model's own files say takes precedence."""

    names: str  # pattern of a part of the model's id or path
    pooling: str
    query: str = ""  # prompt before a query
    document: str = ""  # prompt before a document


WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"

# The first match counts. From the models' own pages and code (FlagOpen/FlagEmbedding, intfloat, Alibaba-NLP,
# QwenLM/Qwen3-Embedding). The published BGE and E5 have their pooling in their files, but no prompts.
FAMILIES = (
    Family(r"bge-(small|base|large)-zh", "cls", query="为这个句子生成表示以用于检索相关文章："),
    Family(
        r"bge-(small|base|large)-en", "cls", query="Represent this sentence for searching relevant passages: "
    ),
    Family(r"bge-m3", "cls"),
    Family(r"e5-mistral", "lasttoken", query=WEB_SEARCH + " "),
    Family(r"e5-(small|base|large)-instruct", "mean", query=WEB_SEARCH + " "),
    Family(r"e5-(small|base|large)", "mean", query="query: ", document="passage: "),
    Family(r"gte-qwen", "lasttoken", query=WEB_SEARCH + " "),
    Family(r"gte-(multilingual|modernbert|(base|large)-en-v1\.5)", "cls"),
    Family(r"gte-(small|base|large)", "mean"),
    Family(r"qwen3-embedding", "lasttoken", query=WEB_SEARCH),
)


def find_family(*names: str | None) -> Family | None:
    """The family of the first of `names` (ids or paths) that has one; a path's last parts count first."""
    for name in names:
        for part in reversed((name or "").casefold().split("/")):
            for family in FAMILIES:
                if re.search(family.names, part):
                    return family
    return None


def choose_prompts(own: dict[str, str], default: str | None, family: Family | None) -> dict[str, str]:
    """The prompts for `query` and for `document`.

    own: the prompts of the model's files, where an empty one counts as none: the library adds those itself.
    default: the one of them that goes before every text, if there is one.
    """
    given = {name: prompt for name, prompt in own.items() if prompt}
    documents = [given[name] for name in ("document", "passage", "corpus") if name in given]
    if documents or "query" in given:
        return {"query": given.get("query", ""), "document": documents[0] if documents else ""}
    if given or family is None:
        return {"query": default or "", "document": default or ""}
    return {"query": family.query, "document": family.document}


def set_pooling(model: SentenceTransformer | PlainModel, family: Family | None, *, own: bool) -> str | None:
    """The model's pooling, which becomes the family's unless its files define their own."""
    poolings = [module for module in model if hasattr(module, "pooling_mode")]
    if not poolings:
        return None
    if family and not own:
        poolings[0].pooling_mode = family.pooling
    mode = poolings[0].pooling_mode
    return mode if isinstance(mode, str) else "+".join(mode)


def is_cross_encoder(folder: Path, name: str) -> bool:
    """Whether config.json describes a classifier with one label.

    Raises StartError(code="unsupported_model") for other classifiers, and for rerankers of another kind: they
    would load as an embedding model and give meaningless results.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    architecture = (config.get("architectures") or [""])[0]
    if architecture.endswith("ForCausalLM") and "rerank" in name.casefold():
        raise StartError(
            f"{name} ranks by a language model's next token, which is not supported here. Use a reranker "
            "that is a classifier with one label, such as BAAI/bge-reranker-v2-m3.",
            code="unsupported_model",
        )
    if not architecture.endswith("ForSequenceClassification"):
        return False
    labels = config.get("num_labels") or len(config.get("id2label") or (0, 1))
    if labels != 1:
        raise StartError(
            f"{name}: a classifier with {labels} labels neither embeds nor ranks. A reranker has one.",
            code="unsupported_model",
        )
    return True
