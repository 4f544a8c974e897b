"""The models that load without sentence_transformers embed as it does; the others are left to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel

from serving.embedding.encoder import load_encoder
from serving.embedding.plain_model import MODEL_TYPES, PlainModel, load_plain, read_plan
from tools.models import minilm
from tools.models import tiny_retrieval as tiny

TEXTS = ["a", "what is the capital of france?", "", "panda " * 400, "ünïcödé 漢字 🤗", "query: eats bamboo"]
SIZES = {
    "hidden_size": 32, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 130, "pad_token_id": 1,
}  # fmt: skip


def make(folder: Path, model_type: str, pooling: tiny.Pooling = "mean", prompts: Any = None) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny.byte_tokenizer(padding_side="right")
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **SIZES)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.write_modules(folder, pooling, prompts)
    return folder


async def assert_equal(folder: Path) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    ours = load_encoder(folder, device="cpu", dtype="float32")
    assert isinstance(ours.model, PlainModel)
    assert ours.prompts == theirs.prompts
    assert ours.default_prompt == theirs.prompts.get(theirs.default_prompt_name or "")
    assert ours.max_tokens == theirs.max_seq_length
    assert ours.dimensions == theirs.get_embedding_dimension()
    for prompt in ["", *ours.prompts.values()]:
        found = await ours.encode(ours.tokenize(TEXTS, prompt=prompt))
        np.testing.assert_allclose(found, theirs.encode(TEXTS, prompt=prompt), atol=1e-6)


@pytest.mark.engine
@pytest.mark.parametrize("model_type", MODEL_TYPES)
async def test_each_architecture(tmp_path: Path, model_type: str) -> None:
    await assert_equal(make(tmp_path, model_type))


@pytest.mark.engine
@pytest.mark.parametrize("pooling", ["cls", "lasttoken"])
async def test_each_pooling_with_prompts(tmp_path: Path, pooling: tiny.Pooling) -> None:
    await assert_equal(
        make(tmp_path, "bert", pooling, {"query": "find: ", "passage": "text: ", "document": None})
    )


@pytest.mark.engine
async def test_real_weights_as_published_and_as_saved_today(tmp_path: Path) -> None:
    await assert_equal(minilm())
    SentenceTransformer(str(minilm()), similarity_fn_name="dot").save(str(tmp_path))
    await assert_equal(tmp_path)


@pytest.mark.engine
async def test_length_of_the_tokenizer_and_the_model_without_max_seq_length(tmp_path: Path) -> None:
    make(tmp_path, "bert")
    (tmp_path / "sentence_bert_config.json").unlink()
    await assert_equal(tmp_path)


def _edit(name: str, **values: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: (folder / "modules.json").unlink(),
        lambda folder: (folder / "modules.json").write_text(
            (folder / "modules.json").read_text().replace("Normalize", "LayerNorm")
        ),
        lambda folder: (folder / "modules.json").write_text(
            (folder / "modules.json")
            .read_text()
            .replace("sentence_transformers.models.Pool", "own_code.Pool")
        ),
        _edit("config.json", model_type="t5"),
        _edit("config.json", auto_map={"AutoModel": "own_code.Model"}),
        _edit("adapter_config.json", peft_type="LORA"),
        _edit("sentence_bert_config.json", do_lower_case=True),
        _edit("sentence_bert_config.json", model_args={"attn_implementation": "eager"}),
        _edit("sentence_roberta_config.json", max_seq_length=20),
        _edit("config_sentence_transformers.json", model_type="SparseEncoder"),
        _edit("config_sentence_transformers.json", default_prompt_name="unknown"),
        _edit("config_sentence_transformers.json", requirements={"transformers": ">=99"}),
        _edit("1_Pooling/config.json", include_prompt=False),
        _edit("1_Pooling/config.json", pooling_mode_max_tokens=True),
        _edit("1_Pooling/config.json", a_new_field=True),
        _edit("2_Normalize/config.json", module_input_name="token_embeddings"),
    ],
)
def test_a_field_that_is_not_known_leaves_the_model_to_the_library(
    tmp_path: Path, edit: Callable[[Path], object]
) -> None:
    files = ("modules.json", "config.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    for name in files:
        shutil.copy(minilm() / name, tmp_path)
    shutil.copytree(minilm() / "1_Pooling", tmp_path / "1_Pooling")
    (tmp_path / "2_Normalize").mkdir()
    assert read_plan(tmp_path)
    edit(tmp_path)
    assert load_plain(tmp_path, device=torch.device("cpu"), dtype=torch.float32) is None
