"""The Florence-2 worker as jobs meet it, on a tiny model that knows two images."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psutil
import pytest
from openai import OpenAI
from PIL import Image

from local import Platform, running
from tests import helpers
from tests.helpers import error_of, least_stall, runsync
from tests.workers.florence2.images import BLUE, BOX, CASES, RED, SIZE, encoded, fields_of
from tools.models import local_env
from tools.models import tiny_florence2 as tiny
from tools.workers import ROOT, load_handler

worker = load_handler("florence2")
pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engine")]


send, error = partial(helpers.send, worker.handler), partial(helpers.error, worker.handler)


def test_torchs_threads_do_not_spin_unless_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(worker.startup, "serve", lambda *_, **__: seen.append(os.environ["OMP_WAIT_POLICY"]))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    worker.main()
    monkeypatch.delenv("OMP_WAIT_POLICY")
    worker.main()
    assert seen == ["ACTIVE", "PASSIVE"]


# ---- the model -----------------------------------------------------------------------------------------


async def test_regions_are_in_pixels_of_the_image() -> None:
    async def about(image: str, task: str) -> Any:
        fields = fields_of(next(prompt for prompt in tiny.ANSWERS if f"<{task}>" in prompt))
        return (await send(image=image, **fields))["parsed"][f"<{task}>"]

    assert await about(RED, "OD") == {"bboxes": [BOX], "labels": ["car"]}
    boxes = [[0, 1, 192, 192], [6, 9, 19, 19], [320, 288, 448, 479]]
    assert await about(BLUE, "OD") == {"bboxes": boxes, "labels": ["café", "dog", "dog"]}
    quad = [6, 5, 57, 6, 57, 24, 6, 23]
    assert await about(RED, "OCR_WITH_REGION") == {"quad_boxes": [quad], "labels": ["STOP"]}
    assert await about(BLUE, "REFERRING_EXPRESSION_SEGMENTATION") == {"polygons": [[quad]], "labels": [""]}
    vocabulary = {"bboxes": [BOX], "bboxes_labels": ["car"], "polygons": [], "polygons_labels": []}
    assert await about(RED, "OPEN_VOCABULARY_DETECTION") == vocabulary
    large = await send(image=encoded(Image.new("RGB", (2000, 3000), "red")), task="OD")
    assert large["parsed"]["<OD>"]["bboxes"] == [[201, 601, 1001, 2401]]
    assert (large["width"], large["height"]) == (2000, 3000)


async def test_images_are_upright() -> None:
    """Turned by EXIF, the image is 480 wide and 640 high, and a box 600 high is inside it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", SIZE, "red"), exif=exif)
    answer = await send(image=turned, task="OD")
    assert (answer["width"], answer["height"]) == (480, 640)
    assert answer["parsed"]["<OD>"]["bboxes"] == [[48, 128, 240, 512]]
    assert "error" not in await send(image=turned, task="REGION_TO_OCR", region=[0, 0, 480, 600])
    assert (await error(image=RED, task="REGION_TO_OCR", region=[0, 0, 480, 600]))["param"] == "region"


async def test_a_truncated_answer_has_finish_reason_length_and_is_parsed() -> None:
    complete = await send(image=BLUE, task="OCR_WITH_REGION", num_beams=1)
    tokens = complete["usage"]["completion_tokens"]
    assert complete["finish_reason"] == "stop"
    assert len(complete["parsed"]["<OCR_WITH_REGION>"]["labels"]) == 2
    exact = await send(image=BLUE, task="OCR_WITH_REGION", num_beams=1, max_tokens=tokens)
    assert (exact["finish_reason"], exact["raw_output"]) == ("stop", complete["raw_output"])
    cut = await send(image=BLUE, task="OCR_WITH_REGION", num_beams=1, max_tokens=tokens - 2)
    assert cut["finish_reason"] == "length"
    assert complete["raw_output"].startswith(cut["raw_output"])
    assert cut["parsed"]["<OCR_WITH_REGION>"]["labels"] == ["Café"]
    assert cut["usage"]["completion_tokens"] == tokens - 2
    beams = await send(image=BLUE, task="OCR_WITH_REGION", max_tokens=tokens - 2)
    assert beams["finish_reason"] == "length"


async def test_several_tasks_on_several_images() -> None:
    prompts = list(tiny.ANSWERS)
    tasks = [fields_of(prompt)["task"] for prompt in prompts]
    answer = await send(images=[BLUE, RED], tasks=tasks, text=tiny.TEXT, region=BOX, num_beams=1)
    expected = [(image, tiny.ANSWERS[prompt][1 - image]) for image in (0, 1) for prompt in prompts]
    assert [(result["image"], result["raw_output"]) for result in answer["results"]] == expected
    assert [result["task"] for result in answer["results"]] == tasks * 2
    assert set(answer) == {"results", "model", "revision"}
    single = await send(image=RED, tasks=["OD"])
    assert [result["raw_output"] for result in single["results"]] == [tiny.ANSWERS["<OD>"][0]]
    assert len((await send(images=[RED, RED]))["results"]) == 2


async def test_the_answer_has_model_and_usage() -> None:
    answer = await send(image=RED)
    usage = answer.pop("usage")
    assert answer == {
        "task": "OCR", "raw_output": "STOP", "parsed": {"<OCR>": "STOP"}, "finish_reason": "stop",
        "width": SIZE[0], "height": SIZE[1], "annotated": None, "model": "tiny/Florence-2", "revision": None,
    }  # fmt: skip
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    models = await send(openai_route="/v1/models")
    assert [model["id"] for model in models["data"]] == ["tiny/Florence-2"]


async def test_annotated_images() -> None:
    image = encoded(Image.new("RGB", (3000, 1500), "red"), "JPEG")
    answer = await send(image=image, tasks=["OD", "CAPTION"], annotate=True)
    boxes, caption = answer["results"]
    drawn = Image.open(io.BytesIO(base64.b64decode(boxes["annotated"])))
    assert (drawn.format, drawn.size) == ("PNG", (1536, 768))
    assert drawn.getpixel((round(0.1 * 1536), 400)) != drawn.getpixel((800, 700))
    assert caption["annotated"] is None
    noise = Image.merge("RGB", [Image.effect_noise((1536, 1536), 120) for _ in range(3)])
    largest = await send(image=encoded(noise, "JPEG"), task="OD", annotate=True, max_tokens=2)
    assert 5_000_000 < largest.size < 10_000_000, "fits even where nothing can be compressed"


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
async def test_odd_sizes(size: tuple[int, int]) -> None:
    image = encoded(Image.new("RGB", size, "red"))
    answer = await send(image=image, task="OD", annotate=True)
    assert answer["parsed"]["<OD>"]["labels"] == ["car"]
    x1, y1, x2, y2 = answer["parsed"]["<OD>"]["bboxes"][0]
    assert 0 <= x1 <= x2 < size[0]
    assert 0 <= y1 <= y2 < size[1]


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("not base64!", "bad_base64"),
        (base64.b64encode(b"%PDF-1.7 renamed to .png").decode(), "bad_image"),
    ],
)
async def test_other_files_are_errors_of_their_own_job(source: str, code: str) -> None:
    good, bad = await asyncio.gather(send(image=RED), send(image=source))
    assert good["raw_output"] == "STOP"
    problem = error_of(bad)
    assert (problem["param"], problem["code"]) == ("image", code)
    problem = await error(images=[RED, source])
    assert (problem["param"], problem["code"]) == ("images.1", code)


@pytest.mark.parametrize("token", ["<loc_10>", "<image>", "</s>", "<pad>", "<s>"])
async def test_the_models_own_tokens_are_refused_in_a_text(token: str) -> None:
    problem = await error(image=RED, task="CAPTION_TO_PHRASE_GROUNDING", text=f"a {token} car")
    assert (problem["param"], problem["code"]) == ("text", "invalid_value")
    assert token in problem["message"]
    fields = {"task": "CAPTION_TO_PHRASE_GROUNDING", "text": "a <b> {input} <OD> %s", "max_tokens": 3}
    assert "error" not in await send(image=RED, **fields)


async def test_too_long_is_an_error_with_both_lengths() -> None:
    problem = await error(image=RED, task="CAPTION_TO_PHRASE_GROUNDING", text="car , " * 600)
    assert (problem["param"], problem["code"]) == ("text", "too_long")
    assert "1024" in problem["message"]
    assert "image's 5" in problem["message"]
    problem = await error(image=RED, max_tokens=1025)
    assert (problem["param"], problem["code"]) == ("max_tokens", "too_long")
    assert "1024" in problem["message"]


async def test_large_images_do_not_block_the_event_loop() -> None:
    """24 megapixels of noise, drawn onto."""
    image = encoded(Image.effect_noise((6000, 4000), 60).convert("RGB"), "JPEG")

    async def ask() -> None:
        assert (await send(image=image, task="OD", annotate=True, max_tokens=2))["annotated"]

    assert await least_stall(ask) < 0.1


# ---- under the local platform --------------------------------------------------------------------------


# Full batches, 12 answers of 8 beams with two candidates each, are slow: they do not end during a test.
@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with running("florence2", env=local_env("florence2")) as platform:
        yield platform


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


@pytest.mark.soak
def test_a_thousand_jobs_leave_no_memory_behind(platform: Platform) -> None:
    def job(number: int) -> None:
        answer = runsync(platform, image=(RED, BLUE)[number % 2], num_beams=1, max_tokens=2)
        assert answer["output"]["usage"]["completion_tokens"] == 2

    worker = psutil.Process(platform.workers[0].pid)
    with ThreadPoolExecutor(32) as clients:
        list(clients.map(job, range(200)))
        before = worker.memory_info().rss
        list(clients.map(job, range(1000)))
    grown = worker.memory_info().rss - before
    assert grown < 30 * 2**20, "pictures that stayed would be 900 MiB, prepared ones 47"
