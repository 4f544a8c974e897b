"""Tasks, settings, requests and responses of this worker."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from shared.errors import invalid
from shared.openai import Usage
from shared.requests import Request
from shared.settings import WorkerSettings

MAX_IMAGES = 32

TaskName = Literal[
    "OCR",
    "OCR_WITH_REGION",
    "CAPTION",
    "DETAILED_CAPTION",
    "MORE_DETAILED_CAPTION",
    "OD",
    "DENSE_REGION_CAPTION",
    "REGION_PROPOSAL",
    "CAPTION_TO_PHRASE_GROUNDING",
    "REFERRING_EXPRESSION_SEGMENTATION",
    "OPEN_VOCABULARY_DETECTION",
    "REGION_TO_SEGMENTATION",
    "REGION_TO_CATEGORY",
    "REGION_TO_DESCRIPTION",
    "REGION_TO_OCR",
]
TASKS: tuple[str, ...] = get_args(TaskName)
TEXT_TASKS, REGION_TASKS = TASKS[8:11], TASKS[11:]


def _plain_name(task: Any) -> Any:
    """`<OD>` and `od` are OD too: the model's documentation writes them so."""
    return task.strip().strip("<>").upper() if isinstance(task, str) else task


Task = Annotated[TaskName, BeforeValidator(_plain_name)]


class Settings(WorkerSettings):
    model_name: str = Field(
        "florence-community/Florence-2-large",
        description="Model id on the Hugging Face Hub, or a folder; microsoft/Florence-2-* is taken from "
        "florence-community, which has the same weights for transformers' own classes",
    )
    trust_remote_code: bool = Field(False, description="Must stay false: transformers has this model itself")
    max_batch_rows: int = Field(
        96, ge=1, le=4096, description="Sequences generated in one batch; an answer takes num_beams of them"
    )

    @field_validator("trust_remote_code")
    @classmethod
    def _never(cls, value: bool) -> bool:
        if value:
            raise ValueError("this worker runs no code from a model's repository. Unset it")
        return value


class Florence2Request(Request):
    image: str | None = Field(None, description="The image: base64, a `data:` URI or an http(s) URL")
    images: list[str] | None = Field(
        None, min_length=1, max_length=MAX_IMAGES, description="Several images, instead of `image`"
    )
    task: Task = Field("OCR", description="What to do")
    tasks: list[Task] | None = Field(
        None,
        min_length=1,
        max_length=len(TASKS),
        description="Several tasks for each image, instead of `task`",
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
    max_tokens: int | None = Field(None, ge=1, le=4096, description="Most tokens in an answer; unset: 1024")
    annotate: bool = Field(False, description="Also return the image with the detected regions drawn onto it")

    @property
    def all_tasks(self) -> list[str]:
        return list(self.tasks or [self.task])

    @model_validator(mode="after")
    def _fits_together(self) -> Florence2Request:
        if self.image is None and self.images is None:
            raise invalid("image", "no image. Give image, or images for several.", "missing_field")
        for one, several in (("image", "images"), ("task", "tasks")):
            if one in self.model_fields_set and getattr(self, one) and getattr(self, several):
                raise invalid(several, f"give either {one} or {several}.")
        for name, takers in (("text", TEXT_TASKS), ("region", REGION_TASKS)):
            value = getattr(self, name)
            taking = [task for task in self.all_tasks if task in takers]
            if value is None and taking:
                raise invalid(name, f"{taking[0]} needs it.", "missing_field")
            if name == "text" and value is not None and not value.strip():
                raise invalid(name, "it is blank.")
            if value is not None and not taking:
                raise invalid(name, f"only {', '.join(takers)} take it. Leave it out.")
        return self


class Answer(BaseModel):
    task: str = Field(description="The task")
    raw_output: str = Field(
        description="The generated text; its location tokens are thousandths of width and height"
    )
    parsed: dict[str, Any] = Field(description="The same under the task's prompt, in pixels of the image")
    finish_reason: Literal["stop", "length"] = Field(description="`length`: cut off at `max_tokens`")
    width: int = Field(description="Pixels of the image, upright by its EXIF orientation")
    height: int = Field(description="Height of the image in pixels")
    annotated: str | None = Field(
        description="PNG in base64, its longer side at most 1536 pixels; null without `annotate`, and "
        "for answers without regions"
    )
    usage: Usage = Field(description="Counts of tokens")


class Florence2Response(Answer):
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


class ImageAnswer(Answer):
    image: int = Field(description="Which of the images, from 0")


class Florence2Responses(BaseModel):
    results: list[ImageAnswer] = Field(description="One for each image and task, image by image")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")
