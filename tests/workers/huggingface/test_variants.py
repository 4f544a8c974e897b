"""The huggingface worker with LoRA adapters, quantised weights, and a model in several places."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

from local import running
from shared import jobs
from shared.errors import JobError, StartError
from shared.generation import Generator, SamplingParams, _layers
from tools.models import local_env, tiny_causal
from tools.workers import load_handler

engine = pytest.mark.engine
PROMPTS = [
    "The river",
    "the old stone house and",
    "Name",
    "into the sea. Name three rivers",
    "more of the same",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are much slower on two threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def serving(**env: str) -> Iterator[ModuleType]:
    """The handler's module as `prepare()` leaves it, for a while.

    Without prewarm, which has an event loop of its own.
    """
    module = load_handler("huggingface")
    before = getattr(module, "engine", None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env("huggingface"), "PREWARM": "false", **env}.items():
            patch.setenv(name, value)
        module.prepare()
    try:
        yield module
    finally:
        module.engine.generator.close()
        module.engine = before


def refused(**env: str) -> StartError:
    """Why a worker with these settings does not start."""
    with pytest.raises(StartError) as caught, serving(**env):
        pass
    return caught.value


async def send(worker: ModuleType, **payload: Any) -> Any:
    (answer,) = [piece async for piece in worker.handler({"id": "job-1", "input": payload})]
    return answer


async def response(worker: ModuleType, prompt: str, **payload: Any) -> str:
    answer = await send(worker, prompt=prompt, max_tokens=24, temperature=0, **payload)
    assert "error" not in answer, answer
    return str(answer["response"])


def generated(model: Any, tokenizer: Any, prompt: str, max_tokens: int = 24) -> str:
    """What `model.generate` makes of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_tokens, pad_token_id=tokenizer.eos_token_id
    )
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


# ---- LoRA ----------------------------------------------------------------------------------------------


def make_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """A random adapter of peft's for the model in `base`, with weights large enough to change its answers."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an older name, and has remarks
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **targets)
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    weight.normal_(0, 0.3)
        model.save_pretrained(folder)
    return folder


def with_adapter(base: str | Path, adapter: Path) -> Any:
    """The model with one adapter, as peft loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three of different shapes; the second one's name has a dot, and it brings a layer of its own."""
    base, folder = Path(local_env("huggingface")["MODEL_NAME"]), tmp_path_factory.mktemp("adapters")
    return {
        "rivers": make_adapter(base, folder / "rivers", 1),
        "org/sea-v1.5": make_adapter(base, folder / "sea", 3, modules_to_save=["lm_head"]),
        "houses": make_adapter(base, folder / "houses", 2, r=8, target_modules="all-linear"),
    }


@pytest.fixture(scope="module")
def lora(adapters: dict[str, Path]) -> str:
    return ", ".join(f"{name}={folder}" for name, folder in adapters.items())


@pytest.fixture(scope="module")
def worker(lora: str) -> Iterator[ModuleType]:
    with serving(LORA=lora, PREWARM="true") as module:
        yield module


@pytest.fixture(scope="module")
def wanted(adapters: dict[str, Path], worker: ModuleType) -> dict[str | None, list[str]]:
    """What transformers and peft answer to PROMPTS, without an adapter and with each."""
    from transformers import AutoModelForCausalLM

    base = local_env("huggingface")["MODEL_NAME"]
    models: dict[str | None, Any] = {None: AutoModelForCausalLM.from_pretrained(base).eval()}
    models |= {name: with_adapter(base, folder) for name, folder in adapters.items()}
    tokenizer = worker.engine.tokenizer
    return {name: [generated(model, tokenizer, it) for it in PROMPTS] for name, model in models.items()}


@engine
async def test_each_job_has_its_own_adapter(worker: ModuleType, wanted: dict[str | None, list[str]]) -> None:
    """Alone and in one batch of 20, streamed or not: what peft gives with that adapter and no other."""
    assert len({tuple(answers) for answers in wanted.values()}) == 4, "the adapters make a difference"
    asked = [(name, number) for number in range(len(PROMPTS)) for name in wanted]
    for name, number in asked[:8]:
        assert await response(worker, PROMPTS[number], lora=name) == wanted[name][number]
    together = await asyncio.gather(*(response(worker, PROMPTS[number], lora=name) for name, number in asked))
    assert together == [wanted[name][number] for name, number in asked]
    assert await response(worker, PROMPTS[0]) == wanted[None][0], "nothing of them stays"
    searched = [await response(worker, PROMPTS[0], lora=name, num_beams=3) for name in wanted]
    assert len(set(searched)) == 4
    beside = [response(worker, PROMPTS[number], lora=name) for name, number in asked]
    both = await asyncio.gather(
        *(response(worker, PROMPTS[0], lora=name, num_beams=3) for name in wanted), *beside
    )
    assert both == searched + together
    payload = {"prompt": PROMPTS[1], "max_tokens": 24, "temperature": 0, "lora": "Rivers", "stream": True}
    *pieces, end = [piece async for piece in worker.handler({"id": "1", "input": payload})]
    assert "".join(piece["response"] for piece in pieces) == wanted["rivers"][1]
    assert end["lora"] == "rivers"


@engine
async def test_models_that_answer_in_groups_have_adapters_too(
    worker: ModuleType, wanted: dict[str | None, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.engine.generator, "_joins", False)
    asked = [(name, number) for number in range(len(PROMPTS)) for name in wanted]
    together = await asyncio.gather(*(response(worker, PROMPTS[number], lora=name) for name, number in asked))
    assert together == [wanted[name][number] for name, number in asked]


@engine
@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt2", ["c_attn"]), ("llama", ["embed_tokens", "q_proj"]), ("opt", ["fc1", "fc2", "q_proj"])],
)
async def test_layers_of_other_kinds_have_adapters_too(tmp_path: Path, family: str, targets: Any) -> None:
    base = tiny_causal.make(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", 1, target_modules=targets)
    with serving(MODEL_NAME=str(base), LORA=f"one={adapter}") as module:
        asked = [(prompt, name) for prompt in PROMPTS for name in ("one", None)]
        answers = await asyncio.gather(*(response(module, prompt, lora=name) for prompt, name in asked))
        tokenizer = module.engine.tokenizer
    from transformers import AutoModelForCausalLM

    plain, adapted = AutoModelForCausalLM.from_pretrained(base).eval(), with_adapter(base, adapter)
    assert answers[::2] == [generated(adapted, tokenizer, it) for it in PROMPTS]
    assert answers[1::2] == [generated(plain, tokenizer, it) for it in PROMPTS]
    assert answers[::2] != answers[1::2]


@engine
async def test_answers_say_which_adapter_made_them(worker: ModuleType) -> None:
    answer = await send(worker, prompt="The river", max_tokens=2, lora="rivers")
    assert (answer["model"], answer["lora"]) == ("tiny-random/llama", "rivers")
    assert "lora" not in await send(worker, prompt="The river", max_tokens=2)
    problem = json.loads((await send(worker, prompt="The river", lora="lakes"))["error"])
    assert (problem["param"], problem["code"]) == ("lora", "lora_not_found")
    assert "rivers, org/sea-v1.5, houses" in problem["message"]


@engine
def test_openai_clients_name_an_adapter_as_the_model(lora: str, wanted: dict[str | None, list[str]]) -> None:
    with (
        running("huggingface", env={**local_env("huggingface"), "LORA": lora}) as platform,
        openai.OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0) as client,
    ):
        names = [model.id for model in client.models.list().data]
        assert names == ["tiny-random/llama", "rivers", "org/sea-v1.5", "houses"]
        for name, answers in zip(names, wanted.values(), strict=True):
            asked: dict[str, Any] = {"model": name, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
            plain = client.completions.create(**asked)
            assert (plain.choices[0].text, plain.model) == (answers[0], name)
            chunks = list(client.completions.create(**asked, stream=True))
            assert "".join(chunk.choices[0].text for chunk in chunks) == answers[0]
            assert {chunk.model for chunk in chunks} == {name}
        answer = client.completions.with_raw_response.create(model="lakes", prompt="The river")
        assert "model_not_found" in answer.text


def test_what_lora_may_be() -> None:
    module = load_handler("huggingface")
    assert module.adapter_sources(None) == {}
    named = module.adapter_sources("a=org/one, b.c = org/two@v1 ,d=/models/x@y,")
    assert named == {"a": ("org/one", None), "b.c": ("org/two", "v1"), "d": ("/models/x@y", None)}
    request = jobs.validate(module.GenerateRequest, {"prompt": "a", "lora": "b.c"})
    assert request.lora == "b.c"  # type: ignore[attr-defined]
    with pytest.raises(JobError):
        jobs.validate(module.GenerateRequest, {"prompt": "a", "lora": 1})


@pytest.mark.parametrize(
    ("lora", "said"),
    [("org/one", "name=repository"), ("=org/one", "name=repository"), ("a=", "name=repository"),
     ("a=org/one,A=org/two", "same name"), ("a=x,b", "name=repository")],
)  # fmt: skip
def test_a_wrong_lora_stops_the_start_in_one_line(lora: str, said: str) -> None:
    problem = refused(LORA=lora)
    assert problem.code == "bad_setting"
    assert problem.message.startswith(f"LORA={lora!r}")
    assert said in problem.message


@engine
def test_adapters_that_cannot_be_served_are_named(adapters: dict[str, Path], tmp_path: Path) -> None:
    base = Path(local_env("huggingface")["MODEL_NAME"])
    problem = refused(LORA="tiny-random/llama=org/x")
    assert problem.code == "bad_setting"
    problem = refused(LORA=f"lost={tmp_path / 'nowhere'}")
    assert problem.code == "model_not_found"
    assert problem.message.startswith("LORA, lost: ")
    larger = make_adapter(tiny_causal.make(tmp_path / "larger", hidden=128), tmp_path / "misfit", 1)
    deeper = make_adapter(tiny_causal.make(tmp_path / "deeper", layers=3), tmp_path / "deep", 1)
    dora = make_adapter(base, tmp_path / "dora", 1, use_dora=True)
    biased = make_adapter(base, tmp_path / "biased", 1, bias="all")
    prompted = tmp_path / "prompted"
    prompted.mkdir()
    for file in adapters["rivers"].iterdir():
        (prompted / file.name).write_bytes(file.read_bytes())
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (prompted / "adapter_config.json").write_text(json.dumps(config))
    for folder, said in (
        (larger, "does not go into this LlamaForCausalLM"), (deeper, "made for another model"),
        (dora, "Merge it"), (biased, "Merge it"), (prompted, "PROMPT_TUNING"),
    ):  # fmt: skip
        problem = refused(LORA=f"good={adapters['rivers']}, bad={folder}")
        assert problem.code == "bad_adapter"
        assert problem.message.startswith("LORA, bad: ")
        assert said in problem.message


# ---- quantised weights ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal.make(tmp_path_factory.mktemp("model"), hidden=128)


@engine
@pytest.mark.parametrize("how", ["bitsandbytes-8bit", "bitsandbytes-4bit"])
async def test_bitsandbytes_quantises_on_load(how: str, smooth: Path) -> None:
    """The weights take less, and each answer is the one that `generate` gives with the same weights."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    with serving(MODEL_NAME=str(smooth), QUANTIZATION=how) as module:
        model = module.engine.generator.model
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, Linear8bitLt if how.endswith("8bit") else Linear4bit)
        assert layer.weight.nbytes == layer.in_features * layer.out_features / (1 if "8" in how else 2)
        answers = [await response(module, prompt) for prompt in PROMPTS]
        assert answers == [generated(model, module.engine.tokenizer, prompt) for prompt in PROMPTS]
        together = await asyncio.gather(*(response(module, prompt) for prompt in PROMPTS))
        assert together == answers or "8" in how, "8 bits round by what is in the batch"


@engine
async def test_adapters_go_with_quantised_weights(adapters: dict[str, Path]) -> None:
    with serving(QUANTIZATION="bitsandbytes-4bit", LORA=f"rivers={adapters['rivers']}") as module:
        plain, other = await asyncio.gather(
            response(module, PROMPTS[0]), response(module, PROMPTS[0], lora="rivers")
        )
        assert plain != other
        assert await response(module, PROMPTS[0]) == plain
        assert await response(module, PROMPTS[0], lora="rivers") == other


def marked(model: Path, folder: Path, **how: Any) -> Path:
    """A copy of `model` whose configuration says that it is quantised."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    return folder


@engine
def test_quantization_that_cannot_be_stops_the_start(smooth: Path, tmp_path: Path) -> None:
    awq = marked(smooth, tmp_path / "awq", quant_method="awq", bits=4, group_size=32, zero_point=True)
    gptq = marked(smooth, tmp_path / "gptq", quant_method="gptq", bits=4, group_size=32, desc_act=False)
    for model, asked, code, said in (
        (smooth, "awq", "bad_setting", "is not quantised"),
        (smooth, "gptq", "bad_setting", "is not quantised"),
        (smooth, "int3", "bad_setting", "bitsandbytes-8bit"),
        (gptq, "awq", "bad_setting", "already, with gptq"),
        (awq, "bitsandbytes-4bit", "bad_setting", "already, with awq"),
        # What it takes is not installed here; an image that has it loads the checkpoint.
        (awq, "awq", "missing_package", "gptqmodel"),
        (awq, "", "missing_package", "gptqmodel"),
        (gptq, "gptq", "missing_package", "optimum"),
    ):
        problem = refused(MODEL_NAME=str(model), QUANTIZATION=asked)
        assert problem.code == code, problem.message
        assert said in problem.message


# ---- attention and devices -----------------------------------------------------------------------------


@engine
async def test_attention_is_as_the_setting_says() -> None:
    answers = []
    for attention in ("sdpa", "eager"):
        with serving(ATTN_IMPLEMENTATION=attention) as module:
            assert module.engine.generator.model.config._attn_implementation == attention
            answers.append(await asyncio.gather(*(response(module, prompt) for prompt in PROMPTS)))
    assert answers[0] == answers[1]
    problem = refused(ATTN_IMPLEMENTATION="nonsense")
    assert problem.code == "bad_setting"
    assert problem.message.startswith("ATTN_IMPLEMENTATION=nonsense: ")
    problem = refused(ATTN_IMPLEMENTATION="flash_attention_2")
    assert problem.code == "missing_package"


@engine
async def test_the_length_is_what_the_setting_says() -> None:
    with serving(MAX_MODEL_LEN="40") as module:
        answer = await send(module, prompt="The river", temperature=0)
        assert answer["usage"]["total_tokens"] == 40
        problem = json.loads((await send(module, prompt="The river " * 40))["error"])
    assert problem["code"] == "too_long"
    assert "the model takes 40" in problem["message"]


@engine
@pytest.mark.parametrize("how", ["auto", "balanced", "sequential"])
async def test_device_map_loads_through_accelerate(how: str) -> None:
    answers = []
    for env in ({"DEVICE_MAP": how}, {}):
        with serving(**env) as module:
            answers.append(await asyncio.gather(*(response(module, prompt) for prompt in PROMPTS)))
    assert answers[0] == answers[1]


@engine
async def test_a_model_in_several_places(tmp_path: Path) -> None:
    """accelerate's own dispatch, as with several GPUs: what is on the disk is fetched when it is needed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = local_env("huggingface")["MODEL_NAME"]
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    parts = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=parts, offload_folder=tmp_path).eval()
    assert spread.device.type == "meta", "there is no one device to ask it for"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = Generator(spread, tokenizer)
    assert sum(_layers(spread, 2).values()) == 2

    async def ask(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        async with aclosing(generator.stream(inputs, SamplingParams(24), each=False)) as pieces:
            return (await anext(pieces)).text

    assert await asyncio.gather(*map(ask, PROMPTS)) == [generated(whole, tokenizer, it) for it in PROMPTS]
    generator.close()


@pytest.mark.parametrize(
    ("placed", "layers"),
    [
        ({"model.embed": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1}, {0: 1, 1: 2}),
        ({"model.embed": 1, "model.layers.0": 1, "model.layers.1": "cpu", "model.layers.2": "disk"}, {1: 3}),
        ({"": 1}, {1: 3}),
        ({"model": 0, "lm_head": 1}, {0: 3}),
    ],
)
def test_each_gpu_has_the_cache_of_its_own_layers(placed: dict[str, Any], layers: dict[int, int]) -> None:
    import torch

    class Placed:
        hf_device_map = placed

    found: Sequence[Any] = list(_layers(Placed(), 3).items())  # type: ignore[arg-type]
    assert dict(found) == {torch.device("cuda", index): count for index, count in layers.items()}
