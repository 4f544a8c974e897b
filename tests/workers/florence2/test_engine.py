"""The Engine without a job: batches, beam search, and what stops it."""

from __future__ import annotations

import asyncio
import base64
import random
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import StoppingCriteriaList

from shared.errors import StartError
from tests.helpers import until
from tests.workers.florence2.images import CASES, RED, encoded, fields_of
from tools.models import local_env
from tools.models import tiny_florence2 as tiny
from tools.workers import load_module

pytestmark = pytest.mark.engine


def prepare(engine: Any, *, image: str, task: str, **options: Any) -> Any:
    """The prompt for one task."""
    (prompt,) = engine.prepare(base64.b64decode(image), [task], **options)
    return prompt


async def answer(engine: Any, **fields: Any) -> tuple[str, Any]:
    """The raw output for one task, and what was generated."""
    prompt = prepare(engine, **fields)
    (generated,) = await engine.generate([prompt])
    return engine.decode(prompt, generated).raw_output, generated


@pytest.mark.parametrize("num_beams", [1, 3])
async def test_mixed_tasks_share_a_batch_and_each_call_gets_its_own_answer(
    engine: Any, monkeypatch: pytest.MonkeyPatch, num_beams: int
) -> None:
    batches: list[int] = []
    encoder = engine.model.get_encoder
    monkeypatch.setattr(engine.model, "get_encoder", lambda: batches.append(1) or encoder())
    calls = (answer(engine, **fields, num_beams=num_beams) for fields, _ in CASES)
    for (fields, expected), (raw, generated) in zip(CASES, await asyncio.gather(*calls), strict=True):
        assert (raw, generated.finish_reason) == (expected, "stop"), fields["task"]
    assert len(batches) == 1


@pytest.mark.parametrize(("num_beams", "early"), [(1, False), (3, False), (3, True)])
async def test_an_answer_does_not_depend_on_its_batch(
    engine: Any, monkeypatch: pytest.MonkeyPatch, num_beams: int, early: bool
) -> None:
    """Images that the model does not know: its answers are random, and some reach their limits."""
    monkeypatch.setattr(engine.model.generation_config, "early_stopping", early)
    rng = random.Random(num_beams)
    calls = []
    for number in range(8):
        image = encoded(Image.effect_noise((40 + 9 * number, 50), 80).convert("RGB"))
        fields = fields_of(rng.choice(list(tiny.ANSWERS)))
        if "region" in fields:
            fields["region"] = [1, 2, 20 + number, 40]
        calls.append({"image": image, **fields, "num_beams": num_beams, "max_tokens": rng.choice([3, 9, 30])})
    alone = [await answer(engine, **fields) for fields in calls]
    assert await asyncio.gather(*(answer(engine, **fields) for fields in calls)) == alone
    assert {generated.finish_reason for _, generated in alone} == {"stop", "length"}
    for fields, (raw, generated) in zip(calls, alone, strict=True):
        assert len(generated.tokens) <= fields["max_tokens"]
        assert "<pad>" not in raw


async def test_prompts_pixels_and_answers_are_the_librarys(engine: Any) -> None:
    """The processor and generate() as their documentation uses them."""
    image = Image.effect_noise((90, 70), 90).convert("RGB")
    for prompt in tiny.ANSWERS:
        fields = {"image": encoded(image), **fields_of(prompt)}
        if "region" in fields:
            fields["region"] = [9, 14, 45, 56]
        inputs = engine.processor(text=prompt, images=image, return_tensors="pt")
        prepared = prepare(engine, **fields)
        assert prepared.tokens == inputs["input_ids"][0].tolist()
        assert prepared.picture.pixels.equal(inputs["pixel_values"][0])
        ids = engine.model.generate(**inputs, max_new_tokens=20, num_beams=3, do_sample=False)
        text = engine.processor.batch_decode(ids, skip_special_tokens=False)[0]
        raw, _ = await answer(engine, max_tokens=20, **fields)
        assert raw == text.replace("</s>", "").replace("<s>", "").strip()


async def test_a_picture_of_several_tasks_runs_through_the_vision_tower_once(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    features = engine.model.get_image_features
    monkeypatch.setattr(
        engine.model, "get_image_features", lambda pixels: seen.append(len(pixels)) or features(pixels)
    )
    await engine.generate(engine.prepare(base64.b64decode(RED), ["OCR", "OD", "CAPTION"], num_beams=1))
    assert seen == [1]


@pytest.mark.parametrize("num_beams", [1, 3])
async def test_a_cancelled_call_stops_generation(
    engine: Any, monkeypatch: pytest.MonkeyPatch, num_beams: int
) -> None:
    """An answer of a thousand tokens, which takes half a minute here, is cancelled in the middle."""
    check, steps = StoppingCriteriaList.__call__, 0

    def slow(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.03)
        return check(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.generation_config, "min_new_tokens", 1000)
        patch.setattr(StoppingCriteriaList, "__call__", slow)
        fields = {"image": RED, "task": "OCR", "num_beams": num_beams}
        calls = [asyncio.create_task(answer(engine, **fields)) for _ in range(3)]
        await until(lambda: steps > 2)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: not engine.batcher.running)
    assert steps < 500
    assert (await answer(engine, image=RED, task="OCR"))[0] == "STOP"


@pytest.mark.parametrize("lost", ["processor_config.json", "tokenizer.json", "weight"])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, lost: str) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(local_env("florence2")["MODEL_NAME"]).iterdir():
        if file.name != lost:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if lost == "weight":
        weights = load_file(tmp_path / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StartError, match="some/model") as caught:
        load_module("florence2", "engine").load_engine(tmp_path, "some/model")
    assert caught.value.code == "incomplete"
    assert "\n" not in caught.value.message.strip()
