"""The sampling fields of a request as the generator's parameters."""

from __future__ import annotations

from serving.continuous_batching.generator import Generator
from serving.continuous_batching.sampling import SamplingParams
from serving.generation_fields import SamplingFields
from shared.errors import invalid


def sampling_params(
    request: SamplingFields,
    generator: Generator,
    *,
    prompt_tokens: int,
    default_max_tokens: int,
    default_temperature: float,
    prompt_param: str,
    logprobs: int | None = None,
) -> SamplingParams:
    """The parameters of one answer. Raises JobError for values that this model cannot take.

    default_max_tokens: see `Generator.fit_max_tokens`. prompt_param: the field that has the prompt.
    """
    max_tokens, max_tokens_param = getattr(request, "max_tokens", None), "max_tokens"
    if (newer := getattr(request, "max_completion_tokens", None)) is not None:
        max_tokens, max_tokens_param = newer, "max_completion_tokens"
    fitting = generator.fit_max_tokens(
        prompt_tokens,
        max_tokens,
        default=default_max_tokens,
        param=prompt_param,
        max_tokens_param=max_tokens_param,
    )
    if (request.min_tokens or 0) > fitting:
        raise invalid("min_tokens", f"is more than {max_tokens_param}, {fitting}. Lower it.")
    bias = tuple((int(token_id), value) for token_id, value in (request.logit_bias or {}).items())
    stop_token_ids = tuple(request.stop_token_ids or ())
    for name, token_ids in (("logit_bias", [each for each, _ in bias]), ("stop_token_ids", stop_token_ids)):
        if max(token_ids, default=0) >= generator.vocab_size:
            raise invalid(name, f"token ids range from 0 to {generator.vocab_size - 1}.")
    return SamplingParams(
        fitting,
        default_temperature if request.temperature is None else request.temperature,
        request.top_p or 1.0,
        request.seed,
        tuple(request.stop),
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        min_tokens=request.min_tokens or 0,
        skip_special_tokens=request.skip_special_tokens is not False,
        logprobs=logprobs,
    )
