"""What a model's name and files say about it: pooling, prompts, and whether it is a cross-encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import StartError
from tools.workers import load_module

families = load_module("bge", "families")

BGE_QUERY = "Represent this sentence for searching relevant passages: "
WEB_SEARCH = families.WEB_SEARCH


@pytest.mark.parametrize(
    ("name", "pooling", "query", "document"),
    [
        ("BAAI/bge-large-en-v1.5", "cls", BGE_QUERY, ""),
        ("BAAI/bge-small-en", "cls", BGE_QUERY, ""),
        ("BAAI/bge-base-zh-v1.5", "cls", "为这个句子生成表示以用于检索相关文章：", ""),
        ("BAAI/bge-m3", "cls", "", ""),
        ("intfloat/e5-base-v2", "mean", "query: ", "passage: "),
        ("intfloat/multilingual-e5-small", "mean", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large-instruct", "mean", WEB_SEARCH + " ", ""),
        ("intfloat/e5-mistral-7b-instruct", "lasttoken", WEB_SEARCH + " ", ""),
        ("thenlper/gte-large", "mean", "", ""),
        ("thenlper/gte-base-zh", "mean", "", ""),
        ("Alibaba-NLP/gte-large-en-v1.5", "cls", "", ""),
        ("Alibaba-NLP/gte-multilingual-base", "cls", "", ""),
        ("Alibaba-NLP/gte-modernbert-base", "cls", "", ""),
        ("Alibaba-NLP/gte-Qwen2-7B-instruct", "lasttoken", WEB_SEARCH + " ", ""),
        ("Qwen/Qwen3-Embedding-0.6B", "lasttoken", WEB_SEARCH, ""),
        ("/models/models--BAAI--bge-large-en-v1.5/snapshots/0f3a", "cls", BGE_QUERY, ""),
        ("/data/bge-small-en/my-e5-small", "mean", "query: ", "passage: "),
    ],
)
def test_families_are_known_by_the_models_name(name: str, pooling: str, query: str, document: str) -> None:
    family = families.find_family(None, name)
    assert (family.pooling, family.query, family.document) == (pooling, query, document)


def test_the_readme_has_each_familys_prompts() -> None:
    page = Path(families.__file__).with_name("README.md").read_text()
    for family in families.FAMILIES:
        for prompt in (family.query, family.document):
            shown = prompt.replace(WEB_SEARCH, "Instruct: <web search>\\nQuery:")
            assert f"`{shown}`" in page or not prompt
    assert WEB_SEARCH.removeprefix("Instruct: ").removesuffix("\nQuery:") in page


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-en-icl", "me/mine"])
def test_other_models_have_no_family(name: str) -> None:
    assert families.find_family(None, name) is None
    assert families.find_family("BAAI/bge-m3", name).pooling == "cls", "the served name counts first"


@pytest.mark.parametrize(
    ("own", "default", "query", "document"),
    [
        ({"query": "", "document": ""}, None, "query: ", "passage: "),
        ({}, None, "query: ", "passage: "),
        ({"query": "q: ", "document": ""}, None, "q: ", ""),
        ({"query": "q: ", "passage": "p: ", "document": ""}, None, "q: ", "p: "),
        ({"query": "", "document": "d: "}, None, "", "d: "),
        ({"query": "q: ", "document": ""}, "q: ", "q: ", ""),
        ({"query": "", "document": "", "both": "b: "}, "b: ", "b: ", "b: "),
        ({"query": "", "document": "", "topic": "t: "}, None, "", ""),
    ],
)
def test_the_models_own_prompts_take_precedence_over_the_family(
    own: dict[str, str], default: str | None, query: str, document: str
) -> None:
    family = families.find_family("intfloat/e5-base")
    assert families.choose_prompts(own, default, family) == {"query": query, "document": document}
    if not any(own.values()):
        assert families.choose_prompts(own, default, None) == {"query": "", "document": ""}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["BertModel"]}, False),
        ({"architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, True),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, True),
        ({"architectures": None}, False),
        (None, False),
    ],
)
def test_a_cross_encoder_is_known_before_it_is_loaded(tmp_path: Path, config: Any, expected: bool) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert families.is_cross_encoder(tmp_path, "some/model") is expected


@pytest.mark.parametrize(
    ("config", "mentions"),
    [
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
            "3",
        ),
        ({"architectures": ["BertForSequenceClassification"]}, "2 labels"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "bge-reranker-v2-m3"),
    ],
)
def test_other_classifiers_and_rerankers_are_refused_at_the_start(
    tmp_path: Path, config: Any, mentions: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartError, match=mentions) as caught:
        families.is_cross_encoder(tmp_path, "Qwen/Qwen3-Reranker-0.6B")
    assert caught.value.code == "unsupported_model"
