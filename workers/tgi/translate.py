"""Requests as TGI takes them, and TGI's errors as this worker's."""

from __future__ import annotations

import re
from typing import Any

from serving.generation_fields import refuse_unserved
from shared.errors import JobError, invalid

from .schemas import ChatRequest, GenerateRequest, OpenAICall

# ---- requests ------------------------------------------------------------------------------------------


def parameters(request: GenerateRequest, max_tokens: int) -> dict[str, Any]:
    """TGI's `parameters`. Greedy decoding has no sampling field at all: TGI refuses temperature 0."""
    body: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "details": True,
        "stop": request.stop,
        **request.model_dump(
            include={
                "repetition_penalty", "frequency_penalty", "seed", "best_of", "truncate",
                "decoder_input_details", "top_n_tokens", "grammar", "adapter_id", "watermark",
            },
            exclude_none=True,
        ),
    }  # fmt: skip
    body["do_sample"] = request.temperature > 0 and request.do_sample is not False
    if body["do_sample"]:
        body["temperature"] = request.temperature
        for name, neutral in (("top_p", 1), ("top_k", 0), ("typical_p", 1)):
            if (value := getattr(request, name)) not in (None, neutral):
                body[name] = value
    return body


def openai_body(request: OpenAICall, adapter: str | None) -> dict[str, Any]:
    """An OpenAI request as TGI takes it. Raises JobError for fields that TGI would ignore.

    Several fields of TGI have no null, top_p must be below 1, `stop` is a list, a JSON schema has another
    name, and presence_penalty plus 2 becomes the repetition penalty.
    """
    refuse_unserved(
        request, n=1, presence_penalty=0, logit_bias={}, functions=[], modalities=["text"], audio=None,
        logprobs=0, suffix="", echo=False, best_of=1, chat_template_kwargs={}, top_k=0, min_p=0, typical_p=1,
    )  # fmt: skip
    body = request.model_dump(exclude_none=True, exclude={"model", "max_completion_tokens"})
    for name in ("n", "presence_penalty", "logit_bias", "suffix"):  # TGI may misread their neutral values
        body.pop(name, None)
    if adapter:
        body["model"] = adapter
    if body.get("top_p") == 1:
        del body["top_p"]
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens:
            body["max_tokens"] = request.max_completion_tokens
        if "repetition_penalty" in body:
            body["presence_penalty"] = body.pop("repetition_penalty") - 2
        body["messages"] = without_nulls(request.messages)
        body |= _response_format(body.pop("response_format", {"type": "text"}))
        if not body.get("tools"):
            body.pop("tools", None)
    return body


def without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without their null fields, which clients send back as they received them."""
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _response_format(value: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's response_format as TGI's: the field, or nothing for plain text."""
    if value.get("type") == "text":
        return {}
    if isinstance(schema := value.get("json_schema"), dict):
        return {"response_format": {"type": "json", "value": schema.get("schema")}}
    if "value" not in value:
        message = "TGI needs a schema. Use the type json_schema, with one."
        raise invalid("response_format", message, "unsupported")
    return {"response_format": value}


# ---- errors --------------------------------------------------------------------------------------------

_TOO_LONG = re.compile(r"must be <= (\d+)\. Given: (\d+) \S+ tokens and")
_JSON_PATH = re.compile(r"into the target type: ([\w.\[\]]+): (.*?)( at line \d+ column \d+)?$", re.DOTALL)


def is_overloaded(error: JobError) -> bool:
    return error.message.startswith("Model is overloaded")


def tokens_left(error: JobError) -> int:
    """The tokens that the context length leaves for an answer that TGI refuses as too long; else 0."""
    match = _TOO_LONG.search(error.message)
    return max(0, int(match[1]) - int(match[2])) if match else 0


def explain(error: JobError, names: dict[str, str]) -> JobError:
    """TGI's error as this worker's, with the name that the field has here, and what to do.

    names: of TGI's fields in the request; `inputs` is what the text came from. Errors are recognised by their
    text: a stream has no status, and the OpenAI routes give all errors the same one.
    """
    text = error.message
    if error.code == 413:
        message = "the request is larger than TGI takes. Shorten it, or raise PAYLOAD_LIMIT."
        return invalid(names["inputs"], message, "too_large")
    if is_overloaded(error):
        message = "TGI has MAX_CONCURRENT_REQUESTS already. Send the job again, or raise that setting."
        return JobError(message, code="overloaded", type="server_error")
    if text.startswith("Request failed during generation"):
        cause = text.rpartition(": ")[2][:300]
        message = f"The model failed on this job ({cause}). Send the job again, perhaps shorter."
        return JobError(message, code="generation_failed", type="server_error")
    if text.startswith("Incomplete generation"):
        return broken_off()
    if text.startswith("Template error"):
        if "template not found" in text:
            message = "the model has no chat template. Send prompt, or serve a model that is made for chat."
            return invalid("messages", message, "no_chat_template")
        cause = text.removeprefix("Template error: ")[:300].rstrip(".")
        return invalid("messages", f"the model's chat template refuses them: {cause}.", "bad_prompt")
    if text.startswith("Tool error: "):
        return invalid("tools", f"{text.removeprefix('Tool error: ')[:300].rstrip('.')}.")
    if text.startswith("Number of prompts exceeds"):
        return invalid("prompt", f"{text}. Send fewer, or raise MAX_CLIENT_BATCH_SIZE.")
    if match := _JSON_PATH.search(text):
        return invalid(match[1], f"{match[2][:300].rstrip('.')}.")
    if text.startswith("Input validation error: "):
        return _explain_validation(text.removeprefix("Input validation error: "), names)
    return error


def _explain_validation(text: str, names: dict[str, str]) -> JobError:
    quoted = re.findall(r"`(\w+)`", text)
    field = quoted[0] if quoted else "grammar" if "grammar" in text else "inputs"
    param = names.get(field, field)
    too_long = _TOO_LONG.search(text) or text.startswith("`inputs` must have less")
    if tokens_left(JobError(text)):
        param = names["max_new_tokens"]
    message = re.sub(r"`(\w+)`", lambda match: names.get(match[1], match[1]), text)[:400].rstrip(".")
    return invalid(param, f"{message}.", "too_long" if too_long else "invalid_value")


def broken_off() -> JobError:
    message = "The answer ended before it was complete. Send the job again."
    return JobError(message, code="incomplete", type="server_error")
