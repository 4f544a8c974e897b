"""The variables of the engine's flags: `--max-model-len` is MAX_MODEL_LEN."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from .schemas import Settings, engine_table

# Older names, the reference's and the official worker's, of existing flags.
ALIASES = {
    "TOKENIZER_NAME": "tokenizer",
    "CUSTOM_CHAT_TEMPLATE": "chat-template",
    "OPENAI_RESPONSE_ROLE": "response-role",
}
# Variables of older versions, and what replaces them.
REMOVED = {
    "CUDA_GRAPH_SIZES": "CUDAGRAPH_CAPTURE_SIZES or MAX_CUDAGRAPH_CAPTURE_SIZE",
    "MAX_SEQ_LEN_TO_CAPTURE": "nothing: graphs no longer depend on the context's length",
    "MAX_CONTEXT_LEN_TO_CAPTURE": "nothing: graphs no longer depend on the context's length",
    "SWAP_SPACE": "nothing: this vLLM swaps nothing out",
    "NUM_SCHEDULER_STEPS": "nothing: scheduling is asynchronous",
    "TASK": "RUNNER and CONVERT",
    "ENABLE_REASONING": "REASONING_PARSER, which enables it",
    "ROPE_SCALING": "HF_OVERRIDES",
    "ROPE_THETA": "HF_OVERRIDES",
    "GUIDED_DECODING_BACKEND": "STRUCTURED_OUTPUTS_CONFIG",
    "DISABLE_LOG_REQUESTS": "ENABLE_LOG_REQUESTS (requests are not logged by default)",
    "ENABLE_LORA_BIAS": "nothing",
    "LORA_EXTRA_VOCAB_SIZE": "nothing",
    "LONG_LORA_SCALING_FACTORS": "nothing",
    "OVERRIDE_ATTENTION_DTYPE": "nothing",
    "CALCULATE_KV_SCALES": "nothing: scales come with the checkpoint",
    "SCHEDULER_DELAY_FACTOR": "nothing",
    "PREEMPTION_MODE": "nothing",
    "USE_V2_BLOCK_MANAGER": "nothing",
    "NUM_LOOKAHEAD_SLOTS": "SPECULATIVE_CONFIG",
    "SPECULATIVE_MODEL": "SPECULATIVE_CONFIG",
    "NUM_SPECULATIVE_TOKENS": "SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MAX": "SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MIN": "SPECULATIVE_CONFIG",
    "ENGINE_USE_RAY": "DISTRIBUTED_EXECUTOR_BACKEND",
    "WORKER_USE_RAY": "DISTRIBUTED_EXECUTOR_BACKEND",
    "DISABLE_LOGGING_REQUEST": "ENABLE_LOG_REQUESTS (requests are not logged by default)",
    "DEFAULT_BATCH_SIZE": "nothing: a stream sends what has come",
    "DEFAULT_MIN_BATCH_SIZE": "nothing: a stream sends what has come",
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": "nothing: a stream sends what has come",
    "RAW_OPENAI_OUTPUT": "nothing: answers are always OpenAI's",
    "VLLM_USE_V1": "nothing: there is no other engine",
    "HF_HUB_ENABLE_HF_TRANSFER": "HF_XET_HIGH_PERFORMANCE",
    "TRANSFORMERS_CACHE": "HF_HOME",
}
# Flags that are not read from the environment: the worker sets them, or the name means something else there.
RESERVED = {
    "api-key", "config", "data-parallel-supervisor-port", "dtype", "grpc", "grpc-port", "headless", "host",
    "hf-token", "log-config-file", "log-level", "master-addr", "master-port", "middleware", "model", "nnodes",
    "node-rank", "port", "revision", "root-path", "served-model-name", "ssl-ca-certs", "ssl-cert-reqs",
    "ssl-certfile", "ssl-ciphers", "ssl-keyfile", "trust-remote-code", "uds", "watermark",
}  # fmt: skip
# Set by the worker alone: with another value the worker would not reach its engine, or the log would show a
# secret. The worker's host and port, which come last, win over a file's.
OWN = {"api-key", "hf-token", "ssl-certfile", "ssl-keyfile", "uds"}
ZERO_IS_UNSET = {"max-model-len", "max-num-batched-tokens", "max-num-seqs"}
# Flags that may name another repository on the hub.
FETCHING = {
    "tokenizer",
    "hf-config-path",
    "lora-modules",
    "default-mm-loras",
    "speculative-config",
    "spec-model",
}
# Variables of other programs that may look like a misspelt flag.
FOREIGN = re.compile(r"(RUNPOD|CUDA|NVIDIA|NCCL|PYTHON|PIP|TORCH|HF|LC|LD|XDG|OMP|MKL|SSH|GIT|AWS|BUCKET)_")


def variable(flag: str) -> str:
    return flag.upper().replace("-", "_")


def flags_by_variable() -> dict[str, str]:
    """The flag that each variable gives."""
    return {variable(flag): flag for flag in engine_table()["flags"] if flag not in RESERVED} | ALIASES


def advice(environ: Iterable[str]) -> list[str]:
    """A line for each variable that has no effect any more, or is probably misspelt."""
    own = {name.upper() for name in Settings.model_fields} | {"BASE_PATH"}
    known = own | flags_by_variable().keys() | set(engine_table()["environment"])
    lines = []
    for name in sorted(environ):
        if name in REMOVED:
            lines.append(f"{name} has no effect any more. Instead: {REMOVED[name]}.")
        elif name not in known and not FOREIGN.match(name):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.86)
            if close and len(name) >= 6:
                lines.append(f"{name} is not a setting. Did you mean {close[0]}?")
    return lines
