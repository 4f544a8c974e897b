"""Settings, requests and responses. OpenAI's route has those of serving.openai_chat."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from serving.generation_fields import TOP_P, GenerationResponse, GenerationSettings, SamplingFields
from serving.openai_chat import (
    ADD_GENERATION_PROMPT,
    CONTINUE_FINAL_MESSAGE,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Messages,
)
from shared.errors import invalid
from shared.openai import ModelList, ModelsRequest
from shared.requests import Request
from shared.results import EVENTS, JSON

DEFAULT_MAX_TOKENS = 512
DEFAULT_PROMPT = "Describe this image."
MAX_IMAGES = 32
UNSERVED_HERE: dict[str, Any] = {
    "n": 1, "logprobs": False, "top_logprobs": 0, "tools": [], "chat_template_kwargs": {},
}  # fmt: skip
"""Fields that are refused beside UNSERVED, as there, on the OpenAI route."""


class Settings(GenerationSettings):
    model_name: str = Field(
        "llava-hf/llava-1.5-7b-hf", description="Model id on the Hugging Face Hub, or a folder"
    )
    max_batch_size: int = Field(32, ge=1, le=1024, description="Maximum number of sequences in a batch")


class PromptFields(Request):
    image: str | None = Field(None, description="An image: base64, a `data:` URI or an http(s) URL")
    images: list[str] = Field(
        default=[], max_length=MAX_IMAGES, description="Several images, instead of `image`"
    )
    prompt: str = Field(DEFAULT_PROMPT, max_length=200_000, description="The question or instruction")
    system: str | None = Field(None, max_length=200_000, description="The system message")
    messages: Messages | None = Field(
        None, description="A conversation in OpenAI's form, instead of `prompt`, `image`, `images`, `system`"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=32768,
        description="Maximum number of generated tokens; unset: 512, or as many as the model has left",
    )


class LlavaRequest(SamplingFields, PromptFields):
    temperature: float = Field(0.0, ge=0, le=2, description="Sampling temperature; 0: greedy decoding")
    top_p: float = Field(1.0, gt=0, le=1, description=TOP_P)
    add_generation_prompt: bool | None = Field(None, description=ADD_GENERATION_PROMPT)
    continue_final_message: bool | None = Field(None, description=CONTINUE_FINAL_MESSAGE)
    stream: bool = Field(False, description="Stream the answer while it is generated")

    @model_validator(mode="after")
    def _check_prompt(self) -> LlavaRequest:
        given = self.model_fields_set
        if self.messages is not None:
            for name in ("prompt", "image", "images", "system"):
                if name in given and getattr(self, name):
                    raise invalid(name, "cannot be combined with messages. Send one of them.")
        elif self.image is not None and self.images:
            raise invalid("images", "cannot be combined with image. Send one of them.")
        elif self.image is None and not self.images and "prompt" not in given:
            raise invalid("image", "no image. Send image, or images for several.", "missing_field")
        return self


class TextPart(BaseModel):
    """A part of a streamed answer. Its last part is a LlavaResponse."""

    response: str = Field(description="The text since the last part")


class LlavaResponse(GenerationResponse):
    pass


GenerationRequest = LlavaRequest | ChatCompletionRequest
Answer = LlavaResponse | ChatCompletion | ModelList
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/models": ModelsRequest,
}
ANSWERS: dict[type[BaseModel], dict[str, Any]] = {
    LlavaRequest: {JSON: LlavaResponse, EVENTS: TextPart | LlavaResponse},
    ChatCompletionRequest: {JSON: ChatCompletion, EVENTS: ChatCompletionChunk},
}
