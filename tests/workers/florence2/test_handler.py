"""The Florence-2 worker: every task, answers that reach their own jobs, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image

from local import Platform, running
from shared.errors import JobError, StartError
from shared.jobs import validate
from shared.settings import read_settings
from tools.models import local_env
from tools.models import tiny_florence2 as tiny
from tools.workers import ROOT, load_handler

worker = load_handler("florence2")

SIZE = (640, 480)
BOX = [64, 96, 320, 384]  # tiny.REGION in a picture of SIZE
engine_test = pytest.mark.engine


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


RED, BLUE = (encoded(Image.new("RGB", SIZE, colour)) for colour in tiny.COLOURS)


def asked(prompt: str) -> dict[str, Any]:
    """The fields of a request that makes the prompt of one of tiny.ANSWERS."""
    task = prompt[1 : prompt.index(">")]
    if task in worker.TEXT_TASKS:
        return {"task": task, "text": tiny.TEXT}
    return {"task": task, "region": BOX} if task in worker.REGION_TASKS else {"task": task}


CASES = [
    ({"image": image, **asked(prompt)}, answer)
    for prompt, pair in tiny.ANSWERS.items()
    for image, answer in zip((RED, BLUE), pair, strict=True)
]


async def send(**payload: Any) -> Any:
    return await worker.handler({"id": "job", "input": payload})


async def error(**payload: Any) -> dict[str, Any]:
    problem: dict[str, Any] = json.loads((await send(**payload))["error"])
    return problem


# ---- no model: requests, settings, checkpoints, drawing ------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "image", "missing_field"),
        ({"image": None}, "image", "missing_field"),
        ({"image": RED, "images": [RED]}, "images", "invalid_value"),
        ({"images": []}, "images", "invalid_value"),
        ({"images": [RED] * 33}, "images", "invalid_value"),
        ({"image": 1}, "image", "invalid_value"),
        ({"image": RED, "task": "READ"}, "task", "invalid_value"),
        ({"image": RED, "tasks": ["OD", "READ"]}, "tasks.1", "invalid_value"),
        ({"image": RED, "tasks": []}, "tasks", "invalid_value"),
        ({"image": RED, "task": "OD", "tasks": ["OCR"]}, "tasks", "invalid_value"),
        ({"image": RED, "task": "OPEN_VOCABULARY_DETECTION"}, "text", "missing_field"),
        ({"image": RED, "tasks": ["OD", "REFERRING_EXPRESSION_SEGMENTATION"]}, "text", "missing_field"),
        ({"image": RED, "task": "OPEN_VOCABULARY_DETECTION", "text": ""}, "text", "invalid_value"),
        ({"image": RED, "task": "OPEN_VOCABULARY_DETECTION", "text": " \n"}, "text", "invalid_value"),
        ({"image": RED, "task": "OD", "text": "a car"}, "text", "invalid_value"),
        ({"image": RED, "task": "REGION_TO_OCR"}, "region", "missing_field"),
        ({"image": RED, "task": "REGION_TO_OCR", "text": "a", "region": BOX}, "text", "invalid_value"),
        ({"image": RED, "task": "OCR", "region": BOX}, "region", "invalid_value"),
        ({"image": RED, "task": "REGION_TO_OCR", "region": BOX[:3]}, "region", "invalid_value"),
        ({"image": RED, "task": "REGION_TO_OCR", "region": ["a"] * 4}, "region.0", "invalid_value"),
        ({"image": RED, "num_beams": 0}, "num_beams", "invalid_value"),
        ({"image": RED, "num_beams": 9}, "num_beams", "invalid_value"),
        ({"image": RED, "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"image": RED, "max_tokens": 4097}, "max_tokens", "invalid_value"),
        ({"image": RED, "annotate": "yes"}, "annotate", "invalid_value"),
        ({"image": RED, "imgae": RED}, "imgae", "unknown_field"),
    ],
)
async def test_a_wrong_field_is_named(payload: dict[str, Any], param: str, code: str) -> None:
    problem = await error(**payload)
    assert (problem["param"], problem["code"], problem["type"]) == (param, code, "invalid_request_error")
    assert param in problem["message"]


async def test_an_unknown_task_is_answered_with_all_fifteen() -> None:
    message = (await error(image=RED, task="READ"))["message"]
    assert len(worker.TASKS) == 15
    assert all(f"'{task}'" in message for task in worker.TASKS)


@pytest.mark.parametrize("spelled", ["OD", "<OD>", "od", " <od> "])
def test_tasks_may_be_written_as_the_model_writes_them(spelled: str) -> None:
    request = validate(worker.Florence2Request, {"image": RED, "task": spelled})
    assert request.all_tasks == ["OD"]  # type: ignore[attr-defined]


def test_the_reference_request_needs_nothing_but_the_image() -> None:
    request = validate(worker.Florence2Request, {"image": RED})
    assert request.all_tasks == ["OCR"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "served"),
    [
        ("microsoft/Florence-2-large", "florence-community/Florence-2-large"),
        ("microsoft/Florence-2-base-ft", "florence-community/Florence-2-base-ft"),
        ("Microsoft/florence-2-base", "florence-community/florence-2-base"),
        ("microsoft/Florence-2-huge", "microsoft/Florence-2-huge"),
        ("someone/Florence-2-large", "someone/Florence-2-large"),
        ("/models/microsoft/Florence-2-large", "/models/microsoft/Florence-2-large"),
    ],
)
def test_microsofts_names_stand_for_the_native_checkpoints(given: str, served: str) -> None:
    assert worker.native_name(given) == served


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (
            {"model_type": "florence2", "text_config": {"model_type": "florence2_language"}},
            "needs_remote_code",
        ),
        ({"model_type": "florence2", "vision_config": {"model_type": "davit"}}, "needs_remote_code"),
        ({"model_type": "llava"}, "unsupported_architecture"),
        ({}, "unsupported_architecture"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartError, match="some/model") as caught:
        worker.check_native(tmp_path, "some/model")
    assert caught.value.code == code


def test_remote_code_cannot_be_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "false")
    assert read_settings(worker.Settings).trust_remote_code is False
    monkeypatch.setenv("TRUST_REMOTE_CODE", "true")
    with pytest.raises(StartError, match=r"TRUST_REMOTE_CODE='true': .* runs no code"):
        read_settings(worker.Settings)


def test_torchs_threads_do_not_spin_unless_they_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(prepare: object, worker: str) -> None:
        seen.append(os.environ["OMP_WAIT_POLICY"])
        raise SystemExit

    monkeypatch.setattr(worker.startup, "run", run)
    for given in ("ACTIVE", None):
        monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
        if given is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        with pytest.raises(SystemExit):
            worker.main()
    assert seen == ["ACTIVE", "PASSIVE"]


def picture(width: int, height: int, small: Image.Image | None = None) -> Any:
    return worker.Picture(None, width, height, small)


@pytest.mark.parametrize(
    ("region", "size", "tokens"),
    [
        ([0, 0, 640, 480], (640, 480), (0, 0, 999, 999)),
        ([64, 96, 320, 384], (640, 480), (100, 200, 500, 800)),
        ([0.5, 0.5, 1.99, 2.0], (1000, 2000), (0, 0, 1, 1)),
        ([0, 0, 1, 1], (1, 1), (0, 0, 999, 999)),
        ([4999, 0, 5000, 1], (5000, 1), (999, 0, 999, 999)),
    ],
)
def test_a_box_in_pixels_becomes_thousandths(
    region: list[float], size: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    assert worker.locations(region, picture(*size)) == tiny.locations(*tokens)


@pytest.mark.parametrize(
    "region",
    [[0, 0, 641, 480], [0, 0, 640, 481], [-1, 0, 5, 5], [5, 5, 5, 6], [6, 5, 5, 6], [0, 0, float("nan"), 1]],
)
def test_a_box_outside_the_picture_is_refused(region: list[float]) -> None:
    with pytest.raises(JobError, match="640 x 480") as caught:
        worker.locations(region, picture(640, 480))
    assert caught.value.param == "region"


DRAWN = [
    {"bboxes": [[20, 40, 120, 160]], "labels": ["car"]},
    {"quad_boxes": [[20, 40, 120, 40, 120, 160, 20, 160]], "labels": ["line of text"]},
    {"polygons": [[[20, 40, 120, 40, 120, 160, 20, 160]]], "labels": [""]},
    {"bboxes": [[20, 40, 120, 160]], "bboxes_labels": ["a"], "polygons": [], "polygons_labels": []},
    {"bboxes": [], "bboxes_labels": [], "polygons": [[[20, 40, 120, 160]]], "polygons_labels": ["é漢\nx"]},
]


@pytest.mark.parametrize("found", DRAWN)
def test_what_was_found_is_drawn_where_it_is(found: dict[str, Any]) -> None:
    """The picture to draw on is half the size of the picture that the places are in."""
    small = Image.new("RGB", (200, 200), "white")
    drawn = worker.draw(picture(400, 400, small), found)
    image = Image.open(io.BytesIO(base64.b64decode(drawn)))
    assert (image.format, image.size) == ("PNG", (200, 200))
    changed = [at for at in ((10, 20), (60, 80)) if image.getpixel(at) != (255, 255, 255)]
    assert changed == [(10, 20), (60, 80)], "two corners, or the ends of a line"
    assert image.getpixel((100, 150)) == (255, 255, 255)
    assert small.getpixel((60, 80)) == (255, 255, 255), "the original is left as it was"


def test_texts_have_nothing_to_draw() -> None:
    assert worker.draw(picture(4, 4, Image.new("RGB", (4, 4))), "a caption") is None
    assert worker.draw(picture(4, 4), DRAWN[0]) is None


# ---- the model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    """The handler's module with the tiny model, as `prepare()` leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local_env("florence2").items():
            patch.setenv(name, value)
        worker.prepare()
        yield worker.engine
        del worker.engine


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110, the engine has no event for it
            await asyncio.sleep(0.01)


@engine_test
@pytest.mark.parametrize("beams", [1, 3])
async def test_mixed_tasks_share_a_batch_and_each_job_gets_its_own_answer(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    batches: list[int] = []
    run = loaded._batcher._run

    def held(questions: list[Any]) -> Any:
        """The first batch takes until all the others wait."""
        batches.append(len(questions))
        begin = time.monotonic()
        while len(batches) == 1 and len(questions) + len(loaded._batcher._waiting) < len(CASES):
            assert time.monotonic() - begin < 120
            time.sleep(0.01)
        return run(questions)

    monkeypatch.setattr(loaded._batcher, "_run", held)
    answers = await asyncio.gather(*(send(**payload, num_beams=beams) for payload, _ in CASES))
    for (payload, expected), answer in zip(CASES, answers, strict=True):
        assert answer["raw_output"] == expected, payload["task"]
        assert answer["task"] == payload["task"]
        assert answer["finish_reason"] == "stop"
    assert sum(batches) == len(CASES)
    assert len(batches) <= 2, "jobs that wait together run together"


@engine_test
@pytest.mark.parametrize(("beams", "early"), [(1, False), (3, False), (3, True)])
async def test_an_answer_does_not_depend_on_its_neighbours(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, beams: int, early: bool
) -> None:
    """Pictures that the model does not know: its answers ramble, and some go on to their limits."""
    monkeypatch.setattr(loaded.model.generation_config, "early_stopping", early)
    rng = random.Random(beams)
    payloads = []
    for number in range(8):
        image = Image.effect_noise((40 + 9 * number, 50), 80).convert("RGB")
        prompt = rng.choice(list(tiny.ANSWERS))
        fields = {**asked(prompt), "num_beams": beams, "max_tokens": rng.choice([3, 9, 30])}
        if "region" in fields:
            fields["region"] = [1, 2, 20 + number, 40]
        payloads.append({"image": encoded(image), **fields})
    alone = [await send(**payload) for payload in payloads]
    together = await asyncio.gather(*(send(**payload) for payload in payloads))
    assert [dict(answer) for answer in together] == [dict(answer) for answer in alone]
    assert {answer["finish_reason"] for answer in alone} == {"stop", "length"}
    for payload, answer in zip(payloads, alone, strict=True):
        assert answer["usage"]["completion_tokens"] <= payload["max_tokens"]
        assert "<pad>" not in answer["raw_output"]


@engine_test
async def test_alone_is_what_the_library_says(loaded: Any) -> None:
    """The processor and generate() as their documentation uses them."""
    for prompt in tiny.ANSWERS:
        for image in (Image.new("RGB", SIZE, "red"), Image.effect_noise((90, 70), 90).convert("RGB")):
            region = [] if image.size == SIZE else [9, 14, 45, 56]
            fields = asked(prompt) | ({"region": region} if region and "region" in asked(prompt) else {})
            inputs = loaded.processor(text=prompt, images=image, return_tensors="pt")
            rows = loaded.model.generate(**inputs, max_new_tokens=20, num_beams=3, do_sample=False)
            said = loaded.processor.batch_decode(rows, skip_special_tokens=False)[0]
            answer = await send(image=encoded(image), max_tokens=20, **fields)
            assert answer["raw_output"] == said.replace("</s>", "").replace("<s>", "").strip()
            assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
            request = validate(worker.Florence2Request, {"image": "-", **fields})
            data = base64.b64decode(encoded(image))
            (question,) = loaded.ask(data, "image", request)
            assert question.prompt == inputs["input_ids"][0].tolist()
            assert question.picture.pixels.equal(inputs["pixel_values"][0])


@engine_test
async def test_places_are_in_pixels_of_the_picture(loaded: Any) -> None:
    def parsed(answer: Any) -> Any:
        ((prompt, value),) = answer["parsed"].items()
        assert prompt == f"<{answer['task']}>"
        return value

    async def about(image: str, task: str) -> Any:
        return parsed(await send(image=image, **asked(next(p for p in tiny.ANSWERS if f"<{task}>" in p))))

    assert await about(RED, "OD") == {"bboxes": [BOX], "labels": ["car"]}
    boxes = [[0, 1, 192, 192], [6, 9, 19, 19], [320, 288, 448, 479]]
    assert await about(BLUE, "OD") == {"bboxes": boxes, "labels": ["café", "dog", "dog"]}
    quad = [6, 5, 57, 6, 57, 24, 6, 23]
    assert await about(RED, "OCR_WITH_REGION") == {"quad_boxes": [quad], "labels": ["STOP"]}
    assert (await about(BLUE, "OCR_WITH_REGION"))["labels"] == ["Café", "5 €"]
    assert await about(RED, "OCR") == "STOP"
    assert await about(BLUE, "REGION_PROPOSAL") == {"bboxes": [[0, 0, 639, 479]], "labels": [""]}
    assert await about(RED, "CAPTION_TO_PHRASE_GROUNDING") == {"bboxes": [BOX], "labels": ["a red car"]}
    assert await about(BLUE, "REFERRING_EXPRESSION_SEGMENTATION") == {"polygons": [[quad]], "labels": [""]}
    triangle = [178, 182, 180, 182, 185, 323]
    assert await about(BLUE, "REGION_TO_SEGMENTATION") == {"polygons": [[triangle]], "labels": [""]}
    nothing = {"bboxes": [], "bboxes_labels": [], "polygons": [], "polygons_labels": []}
    vocabulary = nothing | {"bboxes": [BOX], "bboxes_labels": ["car"]}
    assert await about(RED, "OPEN_VOCABULARY_DETECTION") == vocabulary
    vocabulary = nothing | {"polygons": [[triangle]], "polygons_labels": ["car"]}
    assert await about(BLUE, "OPEN_VOCABULARY_DETECTION") == vocabulary
    large = await send(image=encoded(Image.new("RGB", (2000, 3000), "red")), task="OD")
    assert parsed(large)["bboxes"] == [[201, 601, 1001, 2401]]
    assert (large["width"], large["height"]) == (2000, 3000)


@engine_test
async def test_pictures_are_upright(loaded: Any) -> None:
    """Turned by EXIF, the picture is 480 wide and 640 high, and a box 600 high is inside it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", SIZE, "red"), exif=exif)
    answer = await send(image=turned, task="OD")
    assert (answer["width"], answer["height"]) == (480, 640)
    assert answer["parsed"]["<OD>"]["bboxes"] == [[48, 128, 240, 512]]
    assert "error" not in await send(image=turned, task="REGION_TO_OCR", region=[0, 0, 480, 600])
    assert (await error(image=RED, task="REGION_TO_OCR", region=[0, 0, 480, 600]))["param"] == "region"


@engine_test
async def test_a_dense_page_that_is_cut_says_so_and_is_parsed_as_far_as_it_goes(loaded: Any) -> None:
    whole = await send(image=BLUE, task="OCR_WITH_REGION", num_beams=1)
    tokens = whole["usage"]["completion_tokens"]
    assert whole["finish_reason"] == "stop"
    assert len(whole["parsed"]["<OCR_WITH_REGION>"]["labels"]) == 2
    exact = await send(image=BLUE, task="OCR_WITH_REGION", num_beams=1, max_tokens=tokens)
    assert (exact["finish_reason"], exact["raw_output"]) == ("stop", whole["raw_output"])
    cut = await send(image=BLUE, task="OCR_WITH_REGION", num_beams=1, max_tokens=tokens - 2)
    assert cut["finish_reason"] == "length"
    assert whole["raw_output"].startswith(cut["raw_output"])
    assert cut["parsed"]["<OCR_WITH_REGION>"]["labels"] == ["Café"]
    assert cut["usage"]["completion_tokens"] == tokens - 2
    assert (await send(image=BLUE, task="OCR_WITH_REGION", max_tokens=tokens - 2))[
        "finish_reason"
    ] == "length"


@engine_test
async def test_several_tasks_on_several_pictures(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    look = loaded.model.get_image_features
    monkeypatch.setattr(
        loaded.model, "get_image_features", lambda pixels: seen.append(len(pixels)) or look(pixels)
    )
    prompts = list(tiny.ANSWERS)
    tasks = [asked(prompt)["task"] for prompt in prompts]
    answer = await send(images=[BLUE, RED], tasks=tasks, text=tiny.TEXT, region=BOX, num_beams=1)
    expected = [(image, p, tiny.ANSWERS[p][1 - image]) for image in (0, 1) for p in prompts]
    assert [(r["image"], r["raw_output"]) for r in answer["results"]] == [(i, a) for i, _, a in expected]
    assert [r["task"] for r in answer["results"]] == tasks * 2
    assert set(answer) == {"results", "model", "revision"}
    assert sum(seen) == 2, "a picture is looked at once, whatever the number of tasks"
    single = await send(image=RED, tasks=["OD"])
    assert [r["raw_output"] for r in single["results"]] == [tiny.ANSWERS["<OD>"][0]]
    assert len((await send(images=[RED, RED]))["results"]) == 2


@engine_test
async def test_the_answer_says_what_was_used(loaded: Any) -> None:
    answer = await send(image=RED)
    assert set(answer) == {
        "task", "raw_output", "parsed", "finish_reason", "width", "height", "annotated", "usage", "model",
        "revision",
    }  # fmt: skip
    assert (answer["task"], answer["parsed"], answer["annotated"]) == ("OCR", {"<OCR>": "STOP"}, None)
    assert (answer["model"], answer["revision"]) == ("tiny/Florence-2", None)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    models = await send(openai_route="/v1/models")
    assert [model["id"] for model in models["data"]] == ["tiny/Florence-2"]


@engine_test
async def test_annotated_pictures(loaded: Any) -> None:
    image = encoded(Image.new("RGB", (3000, 1500), "red"), "JPEG")
    answer = await send(image=image, tasks=["OD", "CAPTION"], annotate=True)
    boxes, caption = answer["results"]
    drawn = Image.open(io.BytesIO(base64.b64decode(boxes["annotated"])))
    assert (drawn.format, drawn.size) == ("PNG", (1536, 768))
    assert drawn.getpixel((round(0.1 * 1536), 400)) != drawn.getpixel((800, 700))
    assert caption["annotated"] is None
    noise = Image.effect_noise((1536, 1536), 120).convert("RGB")
    noise = Image.merge("RGB", [Image.effect_noise(noise.size, 120) for _ in range(3)])
    largest = await send(image=encoded(noise, "JPEG"), task="OD", annotate=True, max_tokens=2)
    assert 5_000_000 < largest.size < 10_000_000, "fits even where nothing can be compressed"


@engine_test
@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "LA", "I;16", "CMYK"])
async def test_colour_modes(loaded: Any, mode: str) -> None:
    image = Image.new("I;16", (30, 20), 40000) if mode == "I;16" else Image.new("RGB", (30, 20)).convert(mode)
    answer = await send(image=encoded(image, "TIFF"), max_tokens=2)
    assert (answer["width"], answer["height"]) == (30, 20)


@engine_test
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
async def test_odd_sizes(loaded: Any, size: tuple[int, int]) -> None:
    image = encoded(Image.new("RGB", size, "red"))
    answer = await send(image=image, task="OD", annotate=True)
    assert answer["parsed"]["<OD>"]["labels"] == ["car"]
    x1, y1, x2, y2 = answer["parsed"]["<OD>"]["bboxes"][0]
    assert 0 <= x1 <= x2 < size[0]
    assert 0 <= y1 <= y2 < size[1]


@engine_test
@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("", "empty"),
        ("not base64!", "bad_base64"),
        (base64.b64encode(b"%PDF-1.7 renamed to .png").decode(), "bad_image"),
        (RED[: len(RED) // 8 * 4], "bad_image"),
        ("http://127.0.0.1:9/a.png", "download_failed"),
        ("file:///etc/passwd", "bad_url"),
    ],
)
async def test_what_is_no_picture_is_an_error_of_its_own_job(loaded: Any, source: str, code: str) -> None:
    good, bad = await asyncio.gather(send(image=RED), send(image=source))
    assert good["raw_output"] == "STOP"
    problem = json.loads(bad["error"])
    assert (problem["param"], problem["code"]) == ("image", code)
    problem = await error(images=[RED, source])
    assert (problem["param"], problem["code"]) == ("images.1", code)


@engine_test
@pytest.mark.parametrize("token", ["<loc_10>", "<image>", "</s>", "<pad>", "<s>"])
async def test_the_models_own_tokens_are_refused_in_a_text(loaded: Any, token: str) -> None:
    problem = await error(image=RED, task="CAPTION_TO_PHRASE_GROUNDING", text=f"a {token} car")
    assert (problem["param"], problem["code"]) == ("text", "invalid_value")
    assert token in problem["message"]
    fine = await send(
        image=RED, task="CAPTION_TO_PHRASE_GROUNDING", text="a <b> {input} <OD> %s", max_tokens=3
    )
    assert "error" not in fine


@engine_test
async def test_too_long_is_an_error_with_both_numbers(loaded: Any) -> None:
    problem = await error(image=RED, task="CAPTION_TO_PHRASE_GROUNDING", text="car , " * 600)
    assert (problem["param"], problem["code"]) == ("text", "too_long")
    assert "1024" in problem["message"]
    assert "picture's 5" in problem["message"]
    problem = await error(image=RED, max_tokens=1025)
    assert (problem["param"], problem["code"]) == ("max_tokens", "too_long")
    assert "1024" in problem["message"]


@engine_test
async def test_what_breaks_the_model_fails_alone(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that comes out of its preparation misshapen, which the model finds in the batch."""
    import torch

    prepare = loaded.processor.image_processor.preprocess

    def misshape(image: Any, **options: Any) -> Any:
        made = prepare(image, **options)
        if image.size == (13, 13):
            made["pixel_values"] = torch.zeros(1, 3, 8, 8)
        return made

    monkeypatch.setattr(
        type(loaded.processor.image_processor), "__call__", lambda _, *a, **k: misshape(*a, **k)
    )
    poisoned = encoded(Image.new("RGB", (13, 13)))
    payloads = [{"image": RED}] * 5 + [{"image": poisoned}] + [{"image": BLUE}] * 6
    answers = await asyncio.gather(*(send(**payload) for payload in payloads))
    assert json.loads(answers.pop(5)["error"])["code"] == "internal_error"
    assert [answer["raw_output"] for answer in answers] == ["STOP"] * 5 + ["Café 5 €"] * 6


@engine_test
@pytest.mark.parametrize("beams", [1, 3])
async def test_a_cancelled_job_stops_the_engine(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    """An answer of a thousand tokens, which takes half a minute here, is left in the middle."""
    from transformers import StoppingCriteriaList

    whole, steps = StoppingCriteriaList.__call__, 0

    def slow(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.03)
        return whole(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loaded.model.generation_config, "min_new_tokens", 1000)
        patch.setattr(StoppingCriteriaList, "__call__", slow)
        jobs = [asyncio.create_task(send(image=RED, num_beams=beams)) for _ in range(3)]
        await until(lambda: steps > 2)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await until(lambda: not loaded._batcher.running)
    assert steps < 500
    assert (await send(image=RED))["raw_output"] == "STOP"


# ---- the parser ----------------------------------------------------------------------------------------


@engine_test
def test_the_parser_gives_what_the_librarys_gives(loaded: Any) -> None:
    for payload, raw in CASES:
        if raw.isascii():
            prompt = f"<{payload['task']}>"
            expected = loaded.processor.post_process_generation(text=raw, task=prompt, image_size=SIZE)
            assert worker.parse(loaded.processor, raw, payload["task"], SIZE) == expected


@engine_test
@pytest.mark.parametrize("label", ["café", "漢字", "a\\b", "back\\\\n", "\\u0041", "🤗 ok", "x\ny"])
def test_labels_come_back_as_they_were(loaded: Any, label: str) -> None:
    quad = "".join(f"<loc_{number}>" for number in range(8))
    for task in ("OD", "OCR_WITH_REGION", "CAPTION_TO_PHRASE_GROUNDING", "OPEN_VOCABULARY_DETECTION"):
        raw = label + (quad if task == "OCR_WITH_REGION" else quad[: quad.index("<loc_4>")])
        found = worker.parse(loaded.processor, raw, task, SIZE)[f"<{task}>"]
        assert (found.get("labels") or found["bboxes_labels"]) == [label]
    assert worker.parse(loaded.processor, label, "CAPTION", SIZE) == {"<CAPTION>": label}


@engine_test
def test_whatever_the_model_says_can_be_parsed(loaded: Any) -> None:
    """A cut or muddled answer: half a point at the end of a polygon stops the library's own parser."""
    rng = random.Random(0)
    words = ["car", "é", "<sep>", "<poly>", "</poly>", "<and>", " ", "<", ">", "\\", "the", "<loc_5", "\n"]
    words += ["<loc_1>", "<loc_999>", "<loc_20>"] * 5
    for number in range(3000):
        task = worker.TASKS[number % 15]
        raw = "".join(rng.choices(words, k=rng.randrange(14)))
        found = worker.parse(loaded.processor, raw, task, (rng.randint(1, 50), 480))
        json.dumps(found)
        for outline, label in worker.shapes(found[f"<{task}>"]):
            assert all(0 <= x < 50 and 0 <= y < 480 for x, y in outline)
            assert isinstance(label, str)


# ---- start ---------------------------------------------------------------------------------------------


@engine_test
@pytest.mark.parametrize("lost", ["processor_config.json", "tokenizer.json", "weight"])
def test_a_checkpoint_that_lacks_something_is_refused(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(local_env("florence2")["MODEL_NAME"]).iterdir():
        if file.name != lost:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if lost == "weight":
        weights = load_file(tmp_path / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    monkeypatch.setenv("MODEL_NAME", str(tmp_path))
    with pytest.raises(StartError) as caught:
        worker.load(read_settings(worker.Settings))
    assert caught.value.code in ("incomplete", "no_weights")
    assert "\n" not in caught.value.message.strip()


# ---- under the local platform --------------------------------------------------------------------------


# Full batches, 12 answers of 8 beams with two candidates each, take their time, so that what is in them is
# far from its end on any machine.
SLOW = """
import os, sys, time
sys.argv = ["handler.py"]
from transformers import StoppingCriteriaList
whole = StoppingCriteriaList.__call__
def slow(self, ids, *args, **more):
    time.sleep(0.5 if len(ids) == 192 else 0)
    return whole(self, ids, *args, **more)
StoppingCriteriaList.__call__ = slow
exec(compile(open(os.environ["REAL_HANDLER"]).read(), "handler.py", "exec"))
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    script = tmp_path_factory.mktemp("slow") / "handler.py"
    script.write_text(SLOW)
    env = {**local_env("florence2"), "REAL_HANDLER": str(ROOT / "workers/florence2/handler.py")}
    with running(script, env=env) as platform:
        yield platform


def post(platform: Platform, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{platform.endpoint_url}/{path}",
        data=json.dumps({"input": payload}).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer local"},
    )
    with urllib.request.urlopen(request, timeout=150) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def runsync(platform: Platform, **payload: Any) -> dict[str, Any]:
    return post(platform, "runsync?wait=120000", payload)


@engine_test
def test_jobs_of_many_clients_are_answered(platform: Platform) -> None:
    example = json.loads((ROOT / "workers/florence2/test_input.json").read_text())["input"]
    answer = runsync(platform, **example)
    assert (answer["status"], answer["output"]["parsed"]["<OD>"]["labels"]) == ("COMPLETED", ["car"])
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda case: runsync(platform, **case[0]), CASES))
    assert [a["output"]["raw_output"] for a in answers] == [expected for _, expected in CASES]
    failed = runsync(platform, image="not base64!")
    assert (failed["status"], json.loads(failed["error"])["param"]) == ("FAILED", "image")
    client = OpenAI(base_url=platform.openai_url, api_key="local")
    assert [model.id for model in client.models.list().data] == ["tiny/Florence-2"]


@engine_test
def test_a_cancelled_job_leaves_its_place_to_the_next(platform: Platform) -> None:
    """480 answers of 8 beams are 40 batches, and each of their tokens takes half a second here: minutes."""
    tasks = [asked(prompt)["task"] for prompt in tiny.ANSWERS]
    long = {"images": [BLUE] * 32, "tasks": tasks, "text": tiny.TEXT, "region": BOX, "num_beams": 8}
    job = post(platform, "run", long)["id"]
    begin = time.monotonic()
    while post(platform, f"status/{job}")["status"] != "IN_PROGRESS":
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    assert post(platform, f"cancel/{job}")["status"] == "CANCELLED"
    begin = time.monotonic()
    assert runsync(platform, image=RED, num_beams=1)["output"]["raw_output"] == "STOP"
    assert time.monotonic() - begin < 60, "RunPod's word of it comes within a second or two"


@engine_test
def test_a_thousand_jobs_leave_no_memory_behind(platform: Platform) -> None:
    def resident() -> float:
        pages = int(Path(f"/proc/{platform.workers[0].pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def job(number: int) -> None:
        answer = runsync(platform, image=(RED, BLUE)[number % 2], num_beams=1, max_tokens=2)
        assert answer["output"]["usage"]["completion_tokens"] == 2

    with ThreadPoolExecutor(32) as clients:
        list(clients.map(job, range(200)))
        before = resident()
        list(clients.map(job, range(1000)))
    assert resident() - before < 30, "MiB; pictures that stayed would be 900, prepared ones 47"


@engine_test
def test_a_checkpoint_with_remote_code_is_answered_with_the_reason(tmp_path: Path) -> None:
    made = Path(local_env("florence2")["MODEL_NAME"])
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((made / "config.json").read_text())
    config["text_config"]["model_type"] = "florence2_language"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with running("florence2", env={"MODEL_NAME": str(tmp_path), "HF_HUB_OFFLINE": "1"}) as platform:
        failed = runsync(platform, image=RED)
    assert failed["status"] == "FAILED"
    assert json.loads(failed["error"])["code"] == "needs_remote_code"
