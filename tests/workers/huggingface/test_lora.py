"""LoRA adapters: every sequence of a batch gets the tokens that peft gives with its adapter alone."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers import error, openai, send, stream
from tests.workers.huggingface.in_process import (
    PROMPTS,
    generated,
    make_adapter,
    response,
    serving,
    start_error,
    tokenizer_of,
)
from tools.models import local_env, tiny_causal

pytestmark = pytest.mark.engine
BASE = Path(local_env("huggingface")["MODEL_NAME"])


def by_peft(base: Path, adapter: Path | None, tokenizer: Any) -> list[str]:
    """What peft's own model with this adapter answers to PROMPTS."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, str(adapter))
    return [generated(model.eval(), tokenizer, prompt)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three of different shapes; the second one's name has a dot, and it brings a layer of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "rivers": make_adapter(BASE, folder / "rivers", 1),
        "org/sea-v1.5": make_adapter(BASE, folder / "sea", 3, modules_to_save=["lm_head"]),
        "houses": make_adapter(BASE, folder / "houses", 2, r=8, target_modules="all-linear"),
    }


@pytest.fixture(scope="module")
def lora(adapters: dict[str, Path]) -> str:
    return ", ".join(f"{name}={folder}" for name, folder in adapters.items())


@pytest.fixture(scope="module")
def worker(lora: str) -> Iterator[ModuleType]:
    with serving(LORA=lora, PREWARM="true") as module:
        yield module


@pytest.fixture(scope="module")
def expected(adapters: dict[str, Path], worker: ModuleType) -> dict[str | None, list[str]]:
    """The answers to PROMPTS without an adapter and with each."""
    return {name: by_peft(BASE, adapters.get(name or ""), tokenizer_of(worker)) for name in (None, *adapters)}


async def together(worker: ModuleType, names: Any) -> dict[Any, list[str]]:
    """The answers to PROMPTS with each adapter, all in one batch."""
    requests = [(name, prompt) for prompt in PROMPTS for name in names]
    answers = await asyncio.gather(*(response(worker, prompt, lora=name) for name, prompt in requests))
    return {name: answers[number :: len(names)] for number, name in enumerate(names)}


@pytest.mark.parametrize("joins", [True, False], ids=["joining", "through generate"])
async def test_each_sequence_of_a_batch_has_its_own_adapter(
    worker: ModuleType, expected: dict[str | None, list[str]], joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({tuple(answers) for answers in expected.values()}) == 4, "the adapters make a difference"
    monkeypatch.setattr(worker.engine.generator, "joins", joins)
    assert await together(worker, list(expected)) == expected
    for name, answers in expected.items():  # alone, after the others
        assert await response(worker, PROMPTS[0], lora=name) == answers[0]
    *parts, end = await stream(
        worker.handler, prompt=PROMPTS[1], max_tokens=24, temperature=0, lora="Rivers", stream=True
    )
    assert "".join(part["response"] for part in parts) == expected["rivers"][1]
    assert (end["model"], end["lora"]) == ("tiny-random/llama", "rivers")
    assert "lora" not in await send(worker.handler, prompt="The river", max_tokens=2)


async def test_openai_clients_name_an_adapter_as_the_model(
    worker: ModuleType, expected: dict[str | None, list[str]]
) -> None:
    models = await openai(worker.handler, "/v1/models")
    names = [model["id"] for model in models["data"]]
    assert names == ["tiny-random/llama", "rivers", "org/sea-v1.5", "houses"]
    for name, answers in zip(names, expected.values(), strict=True):
        body = {"model": name.swapcase(), "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
        answer = await openai(worker.handler, "/v1/completions", **body)
        assert (answer["choices"][0]["text"], answer["model"]) == (answers[0], name)


async def test_unknown_adapters_are_refused(worker: ModuleType) -> None:
    body = {"model": "lakes", "prompt": "a"}
    unknown_model = await error(worker.handler, openai_route="/v1/completions", openai_input=body)
    unknown_adapter = await error(worker.handler, prompt="a", lora="lakes")
    assert (unknown_model["param"], unknown_model["code"]) == ("model", "model_not_found")
    assert (unknown_adapter["param"], unknown_adapter["code"]) == ("lora", "lora_not_found")
    assert "'lakes'" in unknown_model["message"]
    assert "'lakes'" in unknown_adapter["message"]


@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt2", ["c_attn"]), ("llama", ["embed_tokens", "q_proj"]), ("opt", ["fc1", "fc2", "q_proj"])],
)
async def test_layers_of_all_types(tmp_path: Path, family: str, targets: Any) -> None:
    """Conv1D, an embedding, and OPT's layers, whose inputs have all tokens of a batch in one dimension."""
    base = tiny_causal.make(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", 1, target_modules=targets)
    with serving(MODEL_NAME=str(base), LORA=f"one={adapter}") as module:
        answers = await together(module, ["one", None])
        tokenizer = tokenizer_of(module)
    assert answers == {"one": by_peft(base, adapter, tokenizer), None: by_peft(base, None, tokenizer)}
    assert answers["one"] != answers[None]


async def test_adapters_go_with_quantised_weights(adapters: dict[str, Path]) -> None:
    with serving(QUANTIZATION="bitsandbytes-4bit", LORA=f"rivers={adapters['rivers']}") as module:
        answers = await together(module, ["rivers", None])
        assert answers["rivers"] != answers[None]
        for name, wanted in answers.items():
            assert await response(module, PROMPTS[0], lora=name) == wanted[0]


def test_adapters_that_are_not_there() -> None:
    problem = start_error(LORA="tiny-random/llama=org/x")
    assert problem.code == "bad_setting"
    problem = start_error(LORA="lost=/no/such/folder")
    assert problem.code == "model_not_found"
    assert problem.message.startswith("LORA, lost: ")


@pytest.mark.parametrize(
    ("adapter", "cause"),
    [
        ("larger", "does not fit this LlamaForCausalLM"),
        ("deeper", "made for another model"),
        ("dora", "Merge it"),
        ("biased", "Merge it"),
        ("prompted", "PROMPT_TUNING"),
    ],
)
def test_adapters_that_cannot_be_served_stop_the_start(
    adapters: dict[str, Path], tmp_path: Path, adapter: str, cause: str
) -> None:
    folder = tmp_path / "adapter"
    if adapter == "larger":
        make_adapter(tiny_causal.make(tmp_path / "base", hidden=128), folder, 1)
    elif adapter == "deeper":
        make_adapter(tiny_causal.make(tmp_path / "base", layers=3), folder, 1)
    elif adapter == "prompted":
        folder.mkdir()
        for file in adapters["rivers"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    else:
        make_adapter(BASE, folder, 1, **({"use_dora": True} if adapter == "dora" else {"bias": "all"}))
    problem = start_error(LORA=f"good={adapters['rivers']}, bad={folder}")
    assert problem.code == "bad_adapter"
    assert problem.message.startswith("LORA, bad: ")
    assert cause in problem.message
