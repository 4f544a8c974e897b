"""Florence-2: captions, text, boxes, quads and polygons of an image, by the name of a task.

Request:  {"input": {"image": "<base64, data: URI or http(s) URL>", "task": "OD"}}
Response: {"task": "OD", "raw_output": "car<loc_53><loc_334><loc_933><loc_775>",
           "parsed": {"<OD>": {"bboxes": [[34, 160, 597, 372]], "labels": ["car"]}}, "finish_reason": "stop",
           "width": 640, "height": 480, "annotated": null,
           "usage": {"prompt_tokens": 592, "completion_tokens": 8, "total_tokens": 600},
           "model": "florence-community/Florence-2-large", "revision": "4271c6..."}

With `images` or `tasks`, lists, the answers come as `results`, image by image.

OpenAI:   /v1/models, as {"openai_route": ..., "openai_input": ...} or through the endpoint's /openai/v1.

The model runs on transformers' own classes, never on code from a model's repository. Answers that wait
together are generated together, whatever their tasks.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared import prewarm, startup
from shared.decoding import load_bytes
from shared.jobs import JSON, Job, job_handler
from shared.logs import log
from shared.openai import ModelList, ModelsRequest, model_list, usage
from shared.settings import read_settings

from .checkpoint import check_native, native_name
from .schemas import Answer, Florence2Request, Florence2Response, Florence2Responses, ImageAnswer, Settings

if TYPE_CHECKING:
    from .engine import DecodedAnswer, Engine, Generated, Prompt

# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The loaded model.

    slots: images that are prepared for the model or run in it. A prepared image takes megabytes; a job that
    waits for a slot holds only the bytes that it came with.
    """

    engine: Engine
    name: str
    revision: str | None
    slots: asyncio.Semaphore


loaded: Loaded


def load(settings: Settings) -> Loaded:
    name = native_name(settings.model_name)
    if name != settings.model_name:
        log.info("MODEL_NAME=%s is served from %s", settings.model_name, name)
    model = startup.resolve(settings, name)
    check_native(model.path, settings.model_name)
    with startup.phase("import"):
        from .engine import load_engine
    engine = load_engine(
        model.path,
        name,
        device=settings.device,
        dtype=settings.dtype,
        max_batch_size=settings.max_batch_rows,
    )
    slots = asyncio.Semaphore(settings.max_batch_rows)
    return Loaded(engine, settings.public_name, model.revision, slots)


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(
    Florence2Request,
    routes={"/v1/models": ModelsRequest},
    answers={Florence2Request: {JSON: Florence2Response | Florence2Responses}},
)
async def handler(
    request: Florence2Request | ModelsRequest, job: Job
) -> Florence2Response | Florence2Responses | ModelList:
    if isinstance(request, ModelsRequest):
        return model_list(loaded.name)
    sources = {f"images.{number}": source for number, source in enumerate(request.images or [])}
    sources = sources or {"image": request.image or ""}
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run_tasks(request, *item)) for item in sources.items()]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    served = {"model": loaded.name, "revision": loaded.revision}
    if request.images is None and request.tasks is None:
        (answer,) = tasks[0].result()
        return Florence2Response(**dict(answer), **served)
    results = [
        ImageAnswer(image=number, **dict(answer))
        for number, task in enumerate(tasks)
        for answer in task.result()
    ]
    return Florence2Responses(results=results, **served)


async def run_tasks(request: Florence2Request, param: str, source: str) -> list[Answer]:
    """The answers to the request's tasks about one of its images, which came in the field `param`."""
    engine = loaded.engine
    data = await load_bytes(source, param=param)
    async with loaded.slots:
        prompts = await asyncio.to_thread(
            engine.prepare,
            data,
            request.all_tasks,
            text=(request.text or "").strip(),
            region=request.region,
            num_beams=request.num_beams,
            max_tokens=request.max_tokens,
            annotate=request.annotate,
            param=param,
        )
        generated = await engine.generate(prompts)
    decoded = await asyncio.to_thread(lambda: list(map(engine.decode, prompts, generated)))
    return [to_answer(*parts) for parts in zip(prompts, generated, decoded, strict=True)]


def to_answer(prompt: Prompt, generated: Generated, decoded: DecodedAnswer) -> Answer:
    return Answer(
        task=prompt.task,
        raw_output=decoded.raw_output,
        parsed=decoded.parsed,
        finish_reason=generated.finish_reason,
        width=prompt.picture.width,
        height=prompt.picture.height,
        annotated=decoded.annotated,
        usage=usage(len(prompt.tokens), len(generated.tokens)),
    )


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> Settings:
    global loaded
    settings = read_settings(Settings)
    loaded = load(settings)
    if settings.prewarm:
        from PIL import Image

        from serving.image import encode_image

        # One answer, and a batch of several images and tasks.
        image = encode_image(Image.new("RGB", (768, 768), "gray"))
        several = {"images": [image] * 4, "tasks": ["OCR", "CAPTION", "OD"], "max_tokens": 8}
        prewarm.run(handler, [{"image": image, "max_tokens": 8}, several])
    return settings


def main() -> None:
    # torch's threads wait for each other by spinning, which takes the cores from the images that are decoded
    # beside the model: on a busy machine batches took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    startup.serve(handler, prepare, worker="florence2")


if __name__ == "__main__":
    main()
