"""What a request may ask of this worker: its fields on OpenAI's routes, and the model or adapter it names."""

from __future__ import annotations

from collections.abc import Sequence

from serving.generation_fields import UNSERVED, refuse_unserved
from shared.errors import invalid
from shared.openai import check_model

from .schemas import GenerateRequest, GenerationRequest, OpenAICall


def refuse_unsupported(request: OpenAICall) -> None:
    """Raise JobError for a field of OpenAI's that is not implemented and that would change the answer."""
    refuse_unserved(request, **UNSERVED)
    logprobs = (request.model_extra or {}).get("logprobs")  # 0 asks for those of the generated tokens alone
    if logprobs is not None and logprobs is not False:
        message = "this worker has none on /v1/completions, vllm has them. Use chat completions or vllm."
        raise invalid("logprobs", message, "unsupported")


def pick_adapter(request: GenerationRequest, served: Sequence[str], adapters: Sequence[str]) -> str | None:
    """The LoRA adapter that the request names: as `lora`, on OpenAI's routes as `model`.

    served: the names of the model itself. Raises JobError for a name that is not served.
    """
    names = {name.casefold(): name for name in adapters}
    if not isinstance(request, GenerateRequest):
        check_model(request.model, *served, *adapters)
        return names.get((request.model or "").casefold())
    if request.lora is not None and request.lora.casefold() not in names:
        known = f"Use {', '.join(adapters)}." if adapters else "LORA names no adapter."
        raise invalid("lora", f"{request.lora!r} is not served here. {known}", "lora_not_found")
    return names.get((request.lora or "").casefold())
