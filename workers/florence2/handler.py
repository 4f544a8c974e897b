"""Florence-2: captions, text, boxes, quads and polygons of a picture, by the name of a task.

Request:  {"input": {"image": "<base64, data: URI or http(s) URL>", "task": "OD"}}
Response: {"task": "OD", "raw_output": "car<loc_53><loc_334><loc_933><loc_775>",
           "parsed": {"<OD>": {"bboxes": [[34, 160, 597, 372]], "labels": ["car"]}}, "finish_reason": "stop",
           "width": 640, "height": 480, "annotated": null,
           "usage": {"prompt_tokens": 592, "completion_tokens": 8, "total_tokens": 600},
           "model": "florence-community/Florence-2-large", "revision": "4271c6..."}

With `images` or `tasks`, lists, the answers come as `results`, picture by picture.

OpenAI:   /v1/models, as {"openai_route": ..., "openai_input": ...} or through the endpoint's /openai/v1.

The model runs on transformers' own classes, never on code from a model's repository. Answers that wait
together are generated together, whatever their tasks.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from shared import openai_api, prewarm, startup
from shared.batching import DynamicBatcher
from shared.errors import JobError, StartError
from shared.hardware import pick_device
from shared.jobs import Request, job_handler, start_config
from shared.logs import log
from shared.media import encode_image, load_bytes, load_image
from shared.openai_api import ModelList, ModelsRequest
from shared.settings import WorkerSettings, read_settings
from shared.volume import resolve_model

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MAX_IMAGES = 32
MAX_TOKENS = 1024
ANNOTATED_SIDE = 1536  # pixels: the PNG of any such picture fits into a job's result
# The vision tower needs the most memory: at 768 x 768 pixels many times what an answer needs.
VISION_BATCH = 8

# ---- tasks ---------------------------------------------------------------------------------------------

TaskName = Literal[
    "OCR", "OCR_WITH_REGION", "CAPTION", "DETAILED_CAPTION", "MORE_DETAILED_CAPTION", "OD",
    "DENSE_REGION_CAPTION", "REGION_PROPOSAL", "CAPTION_TO_PHRASE_GROUNDING",
    "REFERRING_EXPRESSION_SEGMENTATION", "OPEN_VOCABULARY_DETECTION", "REGION_TO_SEGMENTATION",
    "REGION_TO_CATEGORY", "REGION_TO_DESCRIPTION", "REGION_TO_OCR",
]  # fmt: skip
TASKS: tuple[str, ...] = get_args(TaskName)
TEXT_TASKS, REGION_TASKS = TASKS[8:11], TASKS[11:]


def _bare(task: Any) -> Any:
    """`<OD>` and `od` are OD too: the model's documentation writes them so."""
    return task.strip().strip("<>").upper() if isinstance(task, str) else task


Task = Annotated[TaskName, BeforeValidator(_bare)]

# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    model_name: str = Field(
        "florence-community/Florence-2-large",
        description="Model id on the Hugging Face Hub, or a folder; microsoft/Florence-2-* is taken from "
        "florence-community, which has the same weights for transformers' own classes",
    )
    trust_remote_code: bool = Field(False, description="Must stay false: transformers has this model itself")
    max_batch_rows: int = Field(
        96, ge=1, le=4096, description="Sequences generated side by side; an answer has num_beams of them"
    )

    @field_validator("trust_remote_code")
    @classmethod
    def _never(cls, value: bool) -> bool:
        if value:
            raise ValueError("this worker runs no code from a model's repository. Unset it")
        return value


# ---- requests and responses ----------------------------------------------------------------------------


class Florence2Request(Request):
    image: str | None = Field(None, description="The picture: base64, a `data:` URI or an http(s) URL")
    images: list[str] | None = Field(
        None, min_length=1, max_length=MAX_IMAGES, description="Several pictures, instead of `image`"
    )
    task: Task = Field("OCR", description="What to do")
    tasks: list[Task] | None = Field(
        None,
        min_length=1,
        max_length=len(TASKS),
        description="Several tasks for each picture, instead of `task`",
    )
    text: str | None = Field(
        None,
        min_length=1,
        max_length=4000,
        description="What to look for; only for CAPTION_TO_PHRASE_GROUNDING, "
        "REFERRING_EXPRESSION_SEGMENTATION and OPEN_VOCABULARY_DETECTION",
    )
    region: Annotated[list[float], Field(min_length=4, max_length=4)] | None = Field(
        None, description="A box in pixels, [x1, y1, x2, y2]; only for the REGION_TO_... tasks"
    )
    num_beams: int = Field(3, ge=1, le=8, description="Width of the beam search; 1 is fastest")
    max_tokens: int | None = Field(
        None, ge=1, le=4096, description="At most so many tokens in an answer; unset: 1024"
    )
    annotate: bool = Field(False, description="Also return the picture with what was found drawn onto it")

    @property
    def all_tasks(self) -> list[str]:
        return list(self.tasks or [self.task])

    @model_validator(mode="after")
    def _fits_together(self) -> Florence2Request:
        if self.image is None and self.images is None:
            raise _wrong("image", "missing_field", "no picture. Give image, or images for several.")
        for one, several in (("image", "images"), ("task", "tasks")):
            if one in self.model_fields_set and getattr(self, one) and getattr(self, several):
                raise _wrong(several, "invalid_value", f"give either {one} or {several}.")
        for name, takers in (("text", TEXT_TASKS), ("region", REGION_TASKS)):
            value = getattr(self, name)
            taking = [task for task in self.all_tasks if task in takers]
            if value is None and taking:
                raise _wrong(name, "missing_field", f"{taking[0]} needs it.")
            if name == "text" and value is not None and not value.strip():
                raise _wrong(name, "invalid_value", "it is blank.")
            if value is not None and not taking:
                raise _wrong(name, "invalid_value", f"only {', '.join(takers)} take it. Leave it out.")
        return self


def _wrong(param: str, code: str, message: str) -> JobError:
    return JobError(f"{param}: {message}", param=param, code=code)


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that the model read, the picture's included")
    completion_tokens: int = Field(description="Tokens that it made")
    total_tokens: int = Field(description="Both")


class Answer(BaseModel):
    task: str = Field(description="The task")
    raw_output: str = Field(
        description="What the model said; its tokens for places are thousandths of width and height"
    )
    parsed: dict[str, Any] = Field(description="The same by the name of the prompt, in pixels of the picture")
    finish_reason: Literal["stop", "length"] = Field(description="`length`: cut off at `max_tokens`")
    width: int = Field(description="Pixels of the picture, upright by its EXIF orientation")
    height: int = Field(description="The same")
    annotated: str | None = Field(
        description="PNG in base64, its longer side at most 1536 pixels; null without `annotate`, and "
        "for answers without places"
    )
    usage: Usage = Field(description="Counts of tokens")


class Florence2Response(Answer):
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


class ImageAnswer(Answer):
    image: int = Field(description="Which of the pictures, from 0")


class Florence2Responses(BaseModel):
    results: list[ImageAnswer] = Field(description="One for each picture and task, picture by picture")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Picture:
    pixels: torch.Tensor  # as the model takes them
    width: int
    height: int
    small: Image | None = None  # to draw on


@dataclass(eq=False)
class Question:
    picture: Picture
    task: str
    prompt: list[int]
    num_beams: int
    max_tokens: int
    over: bool = field(default=False)  # nobody waits for the answer


@dataclass(frozen=True)
class Said:
    tokens: list[int]
    finish_reason: Literal["stop", "length"]


class Engine:
    """Holds the model. Answers that wait together are generated together where `num_beams` is equal."""

    def __init__(self, model: Any, processor: Any, settings: Settings, *, revision: str | None) -> None:
        self.model, self.processor = model, processor
        self.name, self.revision = settings.public_name, revision
        self.max_positions: int = model.config.text_config.max_position_embeddings
        # A token forced onto the end of a cut answer would make it look whole.
        model.generation_config.forced_eos_token_id = None
        self._tokens = frozenset(processor.tokenizer.added_tokens_encoder)
        self._batcher: DynamicBatcher[Question, Said] = DynamicBatcher(
            self._generate,
            budget=settings.max_batch_rows,
            length=lambda question: question.num_beams,
            key=lambda question: question.num_beams,
        )
        # Pictures ready for the model take megabytes each; who waits for room has only its bytes.
        self.room = asyncio.Semaphore(settings.max_batch_rows)

    def ask(self, data: bytes, param: str, request: Florence2Request) -> list[Question]:
        """The request's questions about the picture in `data`, ready for the model.

        Raises JobError for data that is no picture, a region outside of it, a text or an answer too long.
        """
        image = load_image(data, param=param)
        width, height = image.size
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        if request.annotate:
            image.thumbnail((ANNOTATED_SIDE, ANNOTATED_SIDE))
        picture = Picture(pixels, width, height, image if request.annotate else None)

        limit = self.max_positions
        max_tokens = request.max_tokens or min(MAX_TOKENS, limit)
        if max_tokens > limit:
            raise _wrong("max_tokens", "too_long", f"{max_tokens}, and the model gives at most {limit}.")
        text = (request.text or "").strip()
        if alien := [token for token in self._tokens if token in text]:
            raise _wrong("text", "invalid_value", f"{alien[0]!r} is one of the model's own tokens.")
        questions = []
        for task in request.all_tasks:
            place = locations(request.region, picture) if request.region and task in REGION_TASKS else ""
            prompt = self.prompt(task, place or text)
            if len(prompt) > limit:
                length = f"{len(prompt)} tokens with the picture's {self.processor.num_image_tokens}"
                raise _wrong("text", "too_long", f"{length}, and the model takes {limit}. Shorten it.")
            questions.append(Question(picture, task, prompt, request.num_beams, max_tokens))
        return questions

    def prompt(self, task: str, found: str = "") -> list[int]:
        """Token ids as the processor makes them of `<TASK>` and what follows it."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        templates = processor.task_prompts_without_inputs | processor.task_prompts_with_input
        text = tokenizer.bos_token + templates[f"<{task}>"].format(input=found) + tokenizer.eos_token
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [processor.image_token_id] * processor.num_image_tokens + ids

    async def answer(self, questions: Sequence[Question]) -> list[Said]:
        try:
            return await self._batcher.submit(questions)
        finally:
            for question in questions:
                question.over = True

    def _generate(self, questions: list[Question]) -> list[Said]:
        """The answers to questions of one num_beams, on the engine's thread."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache, StoppingCriteriaList

        model = self.model
        config = copy.deepcopy(model.generation_config)
        beams = questions[0].num_beams
        config.update(
            do_sample=False, num_beams=beams, early_stopping=beams > 1 and config.early_stopping,
            max_length=None, max_new_tokens=max(question.max_tokens for question in questions),
        )  # fmt: skip
        limits = [question.max_tokens for question in questions]

        def over(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            made = ids.shape[1] - 1
            rows = [question.over or made >= limit for question, limit in zip(questions, limits, strict=True)]
            return torch.tensor(rows, device=ids.device).repeat_interleave(len(ids) // len(rows))

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # The beams of an answer see the same picture: to copy that at every step, as generate() would, took
        # more than half of the time.
        cache.cross_attention_cache.reorder_cache = lambda _: None
        with torch.inference_mode():
            embeddings, mask = self._embed(questions)
            rows = model.generate(
                encoder_outputs=model.get_encoder()(inputs_embeds=embeddings, attention_mask=mask),
                attention_mask=mask,
                past_key_values=cache,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([over]),
            ).tolist()
        end = config.eos_token_id
        said = []
        for row, limit in zip(rows, limits, strict=True):
            tokens = row[1 : 1 + limit]  # the first is the decoder's start
            whole = end in tokens
            said.append(
                Said(tokens[: tokens.index(end) + 1] if whole else tokens, "stop" if whole else "length")
            )
        return said

    def _embed(self, questions: list[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the encoder reads: the prompts, padded on the right, with the pictures in their places."""
        import torch

        model = self.model
        # A picture that several questions are about is looked at once.
        pictures = list({id(question.picture): question.picture for question in questions}.values())
        places = {id(picture): place for place, picture in enumerate(pictures)}
        features = []
        for start in range(0, len(pictures), VISION_BATCH):
            pixels = torch.stack([picture.pixels for picture in pictures[start : start + VISION_BATCH]])
            features.append(model.get_image_features(pixels.to(model.device, model.dtype)).pooler_output)
        width = max(len(question.prompt) for question in questions)
        ids = torch.full((len(questions), width), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(questions):
            ids[row, : len(question.prompt)] = torch.tensor(question.prompt)
            mask[row, : len(question.prompt)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        embeddings = model.get_input_embeddings()(ids)
        seen = torch.cat(features)[[places[id(question.picture)] for question in questions]]
        at = (ids == self.processor.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(at, seen.to(embeddings.dtype)), mask

    def read(self, question: Question, said: Said) -> Answer:
        """What was said, parsed and, if there is a picture to draw on, drawn."""
        picture, read, made = question.picture, len(question.prompt), len(said.tokens)
        raw = re.sub("</?s>|<pad>", "", self.processor.decode(said.tokens, skip_special_tokens=False)).strip()
        parsed = parse(self.processor, raw, question.task, (picture.width, picture.height))
        return Answer(
            task=question.task,
            raw_output=raw,
            parsed=parsed,
            finish_reason=said.finish_reason,
            width=picture.width,
            height=picture.height,
            annotated=draw(picture, parsed[f"<{question.task}>"]),
            usage=Usage(prompt_tokens=read, completion_tokens=made, total_tokens=read + made),
        )


def native_name(name: str) -> str:
    """The checkpoint for transformers' own classes with the weights of microsoft/Florence-2-*."""
    return re.sub(r"(?i)^microsoft/(?=florence-2-(base|large)(-ft)?$)", "florence-community/", name)


def check_native(folder: Path, name: str) -> None:
    """Raises StartError for a model that is none of Florence-2's, or needs code of its own."""
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type")
    if kind != "florence2":
        raise StartError(
            f"{name} is a model of the type {kind}. Set MODEL_NAME to a Florence-2 model.",
            code="unsupported_architecture",
        )
    # These are the parts' names in the remote code.
    parts = [config.get(part, {}).get("model_type") for part in ("text_config", "vision_config")]
    if "florence2_language" in parts or "davit" in parts:
        raise StartError(
            f"{name} needs Python code from its own repository, which this worker does not run. Convert it "
            "to transformers' Florence2ForConditionalGeneration, or use florence-community/Florence-2-large.",
            code="needs_remote_code",
        )


def load(settings: Settings) -> Engine:
    name = native_name(settings.model_name)
    if name != settings.model_name:
        log.info("MODEL_NAME=%s is served from %s", settings.model_name, name)
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    with prewarm.phase("resolve") as phase:
        found = resolve_model(name, settings.model_revision, token=token)
        phase.bytes = found.bytes
    check_native(found.path, settings.model_name)
    with prewarm.phase("import"):
        from transformers import Florence2ForConditionalGeneration, Florence2Processor
    with prewarm.phase("load") as phase:
        device, dtype = pick_device(settings)
        try:
            processor = Florence2Processor.from_pretrained(found.path, local_files_only=True)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            cause = str(error).strip().partition("\n")[0]
            raise StartError(f"{name} comes without a whole processor: {cause}", code="incomplete") from error
        if "<loc_999>" not in processor.tokenizer.get_vocab():
            raise StartError(f"{name} comes without Florence-2's vocabulary.", code="incomplete")
        model, report = Florence2ForConditionalGeneration.from_pretrained(
            found.path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise StartError(
                f"{name} lacks {len(report['missing_keys'])} weights, such as {min(report['missing_keys'])}. "
                "Convert it again, or use another checkpoint.",
                code="incomplete",
            )
        model.to(device).eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    return Engine(model, processor, settings, revision=found.revision)


engine: Engine


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(Florence2Request, routes={"/v1/models": ModelsRequest})
async def handler(
    request: Florence2Request | ModelsRequest,
) -> Florence2Response | Florence2Responses | ModelList:
    if isinstance(request, ModelsRequest):
        return openai_api.model_list(engine.name)
    return await answer(request, engine)


async def answer(request: Florence2Request, engine: Engine) -> Florence2Response | Florence2Responses:
    sources = {f"images.{number}": source for number, source in enumerate(request.images or [])}
    sources = sources or {"image": request.image or ""}
    try:
        async with asyncio.TaskGroup() as group:
            looks = [group.create_task(look(*item, request, engine)) for item in sources.items()]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    served = {"model": engine.name, "revision": engine.revision}
    if request.images is None and request.tasks is None:
        return Florence2Response(**looks[0].result()[0].model_dump(), **served)
    results = [
        ImageAnswer(image=number, **answer.model_dump())
        for number, done in enumerate(looks)
        for answer in done.result()
    ]
    return Florence2Responses(results=results, **served)


async def look(param: str, source: str, request: Florence2Request, engine: Engine) -> list[Answer]:
    """The request's tasks on one of its pictures, which came in the field `param`."""
    data = await load_bytes(source, param=param)
    async with engine.room:
        questions = await asyncio.to_thread(engine.ask, data, param, request)
        said = await engine.answer(questions)
    return await asyncio.to_thread(lambda: list(map(engine.read, questions, said)))


# ---- places --------------------------------------------------------------------------------------------


def locations(region: Sequence[float], picture: Picture) -> str:
    """The model's tokens for a box in pixels. Raises JobError when it is no box in the picture."""
    x1, y1, x2, y2 = region
    width, height = picture.width, picture.height
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        box = f"{list(region)} is no box [x1, y1, x2, y2] in a picture of {width} x {height} pixels."
        raise _wrong("region", "invalid_value", box)
    sizes = (width, height, width, height)
    bins = [min(999, int(value * 1000 / size)) for value, size in zip(region, sizes, strict=True)]
    return "".join(f"<loc_{number}>" for number in bins)


def parse(processor: Any, raw: str, task: str, size: tuple[int, int]) -> dict[str, Any]:
    """`{"<TASK>": ...}` as the library's parser makes it, in pixels of a picture of `size`."""
    # The parser drops what is not ASCII from labels, and stops at a polygon of half a point.
    text = raw.encode("unicode_escape").decode("ascii")
    text = re.sub(r"(?<!\d>)<loc_\d+>(?=<sep>|</poly>|$)", "", text)
    parsed: dict[str, Any] = processor.post_process_generation(text=text, task=f"<{task}>", image_size=size)
    restored: dict[str, Any] = _unescape(parsed)
    return restored


def _unescape(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("ascii").decode("unicode_escape").strip()
    if isinstance(value, dict):
        return {key: _unescape(item) for key, item in value.items()}
    return [_unescape(item) for item in value] if isinstance(value, list) else value


def shapes(found: Any) -> Iterator[tuple[list[tuple[float, float]], str]]:
    """The outlines in a parsed answer, corner by corner, each with its label."""
    if isinstance(found, str):
        return
    for places, labels in (
        ("bboxes", "labels"), ("bboxes", "bboxes_labels"), ("quad_boxes", "labels"),
        ("polygons", "labels"), ("polygons", "polygons_labels"),
    ):  # fmt: skip
        for place, label in zip(found.get(places, ()), found.get(labels, ()), strict=False):
            if places == "bboxes":
                x1, y1, x2, y2 = place
                place = [x1, y1, x2, y1, x2, y2, x1, y2]
            for outline in place if places == "polygons" else [place]:
                yield list(zip(outline[::2], outline[1::2], strict=True)), label


def draw(picture: Picture, found: Any) -> str | None:
    """The outlines and labels of `found` on the picture, as PNG in base64; None where there is nothing to."""
    if picture.small is None or isinstance(found, str):
        return None
    from PIL import ImageDraw, ImageFont

    image = picture.small.copy()
    pen = ImageDraw.Draw(image)
    unit = max(image.size) / 400
    font = ImageFont.load_default(size=max(10, round(5 * unit)))
    colours = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")
    across, down = image.width / picture.width, image.height / picture.height
    for number, (outline, label) in enumerate(shapes(found)):
        points = [(x * across, y * down) for x, y in outline]
        if not points:
            continue
        colour = colours[number % len(colours)]
        pen.line([*points, points[0]], fill=colour, width=max(1, round(unit)), joint="curve")
        if label:
            box = pen.textbbox(min(points, key=lambda point: point[1]), label, font=font)
            pen.rectangle(box, fill=colour)
            pen.text(min(points, key=lambda point: point[1]), label, fill="white", font=font)
    return encode_image(image)


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        from PIL import Image

        # A lone answer, and a batch of several pictures and tasks.
        picture = encode_image(Image.new("RGB", (768, 768), "gray"))
        several = {"images": [picture] * 4, "tasks": ["OCR", "CAPTION", "OD"], "max_tokens": 8}
        prewarm.run(handler, [{"image": picture, "max_tokens": 8}, several])
    return start_config(handler, settings)


def main() -> None:
    # torch's threads wait for each other by spinning, which takes the cores from the pictures that are
    # decoded beside the model, and so from each other: on a busy machine batches took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = startup.run(prepare, worker="florence2")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
