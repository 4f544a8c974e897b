"""Quantised weights, attention, and models on several devices."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.continuous_batching.generator import Generator
from serving.continuous_batching.kv_cache import cache_budget
from serving.continuous_batching.sampling import SamplingParams
from tests.helpers import error, send
from tests.workers.huggingface.in_process import (
    PROMPTS,
    generated,
    response,
    serving,
    start_error,
    tokenizer_of,
)
from tools.models import local_env, tiny_causal

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal.make(tmp_path_factory.mktemp("model"), hidden=128)


@pytest.mark.parametrize("method", ["bitsandbytes-8bit", "bitsandbytes-4bit"])
async def test_bitsandbytes_quantises_on_load(method: str, plain_model: Path) -> None:
    """The weights take less, and each answer is the one that `generate` gives with the same weights."""
    with serving(MODEL_NAME=str(plain_model), QUANTIZATION=method) as module:
        model = module.engine.generator.model
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, Linear8bitLt if method.endswith("8bit") else Linear4bit)
        assert layer.weight.nbytes == layer.in_features * layer.out_features / (1 if "8" in method else 2)
        answers = [await response(module, prompt) for prompt in PROMPTS]
        assert answers == [generated(model, tokenizer_of(module), prompt)[0] for prompt in PROMPTS]
        together = await asyncio.gather(*(response(module, prompt) for prompt in PROMPTS))
        assert together == answers or "8" in method, "8 bits round by what is in the batch"


@pytest.mark.parametrize(
    ("checkpoint", "setting", "code", "cause"),
    [
        (None, "awq", "bad_setting", "is not quantised"),
        (None, "gptq", "bad_setting", "is not quantised"),
        (None, "int3", "bad_setting", "bitsandbytes-8bit"),
        ("gptq", "awq", "bad_setting", "already quantised, with gptq"),
        ("awq", "bitsandbytes-4bit", "bad_setting", "already quantised, with awq"),
        # The packages are not installed here; an image that has them loads the checkpoint.
        ("awq", "awq", "missing_package", "gptqmodel"),
        ("awq", "", "missing_package", "gptqmodel"),
        ("gptq", "gptq", "missing_package", "optimum"),
    ],
)
def test_quantization_that_cannot_be_stops_the_start(
    plain_model: Path, tmp_path: Path, checkpoint: str | None, setting: str, code: str, cause: str
) -> None:
    for file in plain_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if checkpoint:
        config = json.loads((tmp_path / "config.json").read_text())
        own = {"zero_point": True} if checkpoint == "awq" else {"desc_act": False}
        config["quantization_config"] = {"quant_method": checkpoint, "bits": 4, "group_size": 32, **own}
        (tmp_path / "config.json").write_text(json.dumps(config))
    problem = start_error(MODEL_NAME=str(tmp_path), QUANTIZATION=setting)
    assert (problem.code, cause in problem.message) == (code, True), problem.message


@pytest.mark.parametrize(
    "env",
    [{"ATTN_IMPLEMENTATION": "eager"}, {"DEVICE_MAP": "auto"}, {"DEVICE_MAP": "sequential"}],
    ids=str,
)
async def test_how_the_weights_are_loaded_changes_no_answer(worker: ModuleType, env: dict[str, str]) -> None:
    expected = await asyncio.gather(*(response(worker, prompt) for prompt in PROMPTS))
    with serving(**env) as module:
        attention = module.engine.generator.model.config._attn_implementation
        assert attention == env.get("ATTN_IMPLEMENTATION", "sdpa")
        assert await asyncio.gather(*(response(module, prompt) for prompt in PROMPTS)) == expected


def test_an_attention_that_cannot_be_stops_the_start() -> None:
    problem = start_error(ATTN_IMPLEMENTATION="nonsense")
    assert problem.code == "bad_setting"
    assert problem.message.startswith("ATTN_IMPLEMENTATION=nonsense: ")
    assert start_error(ATTN_IMPLEMENTATION="flash_attention_2").code == "missing_package"


async def test_max_model_len_is_what_the_setting_says() -> None:
    with serving(MAX_MODEL_LEN="40") as module:
        answer = await send(module.handler, prompt="The river", temperature=0)
        assert answer["usage"]["total_tokens"] == 40
        problem = await error(module.handler, prompt="The river " * 40)
    assert problem["code"] == "too_long"
    assert "the model takes 40" in problem["message"]


def test_max_model_len_above_the_models_own_warns(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MAX_MODEL_LEN="1000000") as module:
        own = module.engine.generator.max_model_len
        assert f"max_model_len=1000000: the model takes {own} tokens" in capsys.readouterr().out
        assert own == module.engine.generator.model.config.max_position_embeddings


def test_encoder_decoders_are_refused(plain_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "model.safetensors").touch()
    assert start_error(MODEL_NAME=str(tmp_path)).code == "unsupported_architecture"


async def test_a_model_on_several_devices(tmp_path: Path) -> None:
    """accelerate's own dispatch, as with several GPUs: weights on the disk are read when they are needed."""
    folder = local_env("huggingface")["MODEL_NAME"]
    undivided = AutoModelForCausalLM.from_pretrained(folder).eval()
    parts = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=parts, offload_folder=tmp_path).eval()
    assert spread.device.type == "meta", "the model has no one device"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = Generator(spread, tokenizer)

    async def ask(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        async with aclosing(generator.stream(inputs, SamplingParams(24), each=False)) as deltas:
            return (await anext(deltas)).text

    answers = await asyncio.gather(*map(ask, PROMPTS))
    assert answers == [generated(undivided, tokenizer, prompt)[0] for prompt in PROMPTS]
    generator.close()


@pytest.mark.parametrize(
    ("device_map", "layers"),
    [
        ({"model.embed": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1}, {0: 1, 1: 2}),
        ({"model.embed": 1, "model.layers.0": 1, "model.layers.1": "cpu", "model.layers.2": "disk"}, {1: 3}),
        ({"": 1}, {1: 3}),
        ({"model": 0, "lm_head": 1}, {0: 3}),
    ],
)
def test_each_gpu_has_the_cache_of_its_own_layers(
    device_map: dict[str, Any], layers: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU 0 has 1 MB free, GPU 1 has 3 MB; a token takes 2 * 4 * 8 * 4 = 256 bytes a layer."""
    free = {0: 2**20, 1: 3 * 2**20}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 2**40))
    text = SimpleNamespace(num_hidden_layers=3, num_attention_heads=4, hidden_size=32)
    config = SimpleNamespace(get_text_config=lambda decoder: text)
    model: Any = SimpleNamespace(config=config, dtype=torch.float32, hf_device_map=device_map)
    expected = min(int(free[gpu] * 0.5 // (count * 256)) for gpu, count in layers.items())
    assert cache_budget(model, 0.5) == expected
