"""The cause of a failed start in an inference server's last log lines."""

from __future__ import annotations

import re
from collections.abc import Iterable

from shared.errors import StartError
from shared.logs import redact

# What an engine (vLLM 0.32, TGI 3.3) writes before it exits, the error's code, and what to do. Engines wrap a
# cause into others, so the patterns are tried in this order.
_CAUSES = (
    (
        r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|can't allocate memory"
        r"|[Nn]o available memory for the cache blocks|Free memory on device .* is less than desired"
        r"|Not enough memory to handle|larger than the available KV cache memory",
        "out_of_memory",
        "Use a larger GPU or more of them, a smaller or quantized model, or a shorter context.",
    ),
    (
        r"Insufficient space in /dev/shm",
        "no_shared_memory",
        "Give the container more shared memory (docker run --shm-size 2g), or run the model on one GPU.",
    ),
    (
        r"No space left on device|Disk quota exceeded",
        "no_space",
        "Give the endpoint a larger container disk.",
    ),
    (
        r"GatedRepoError|Cannot access gated repo|access to it is restricted",
        "gated",
        "Ask for access on the model's page and set HF_TOKEN to a token that has it.",
    ),
    (r"RevisionNotFoundError|is not a valid git identifier", "revision_not_found", "Check the revision."),
    (
        r"RepositoryNotFoundError|is not a valid model identifier|Repository Not Found",
        "model_not_found",
        "Check the model's id; a private one needs HF_TOKEN.",
    ),
    (
        r"`trust_remote_code=True`",  # without the backquotes it is among the settings that vLLM always logs
        "needs_remote_code",
        "Set TRUST_REMOTE_CODE=true if you trust the code in the model's repository.",
    ),
    (
        r"Model architectures .* are not supported|does not recognize this architecture"
        r"|[Uu]nsupported model type|model type .* is not supported",
        "unsupported_architecture",
        "Use a model that this image's engine knows, or a newer image.",
    ),
    (
        r"unrecognized arguments?:|invalid choice:|error: argument |unexpected argument"
        r"|invalid value .* for '--|required arguments were not provided|cannot be used multiple times"
        r"|greater than the derived max_model_len|Value error, |Unknown attention backend"
        r"|invalid (tool call|reasoning) parser|No adapter found for |ArgumentValidation\(",
        "bad_setting",
        "Correct or remove that setting.",
    ),
)
_LOG_PREFIX = re.compile(r"^(\(.*?\) )?((ERROR|WARNING|INFO)\b[\s\d:.-]*(\[.*?\] )?)?")


_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-f]+> ?")  # argparse names a function by its address
# An exception's last line; not vLLM's EngineDeadError, which follows from another one.
_EXCEPTION = re.compile(r"^(?!.*EngineDeadError)[\w.]*(Error|Exception): \S")


def classify_log(lines: Iterable[str]) -> StartError | None:
    """The permanent cause in an engine's last log lines; None when a new attempt may succeed."""
    texts = [_clean(line) for line in lines]
    for pattern, code, advice in _CAUSES:
        for text in reversed(texts):
            if re.search(pattern, text):
                return StartError(f"{text[:400].rstrip('.')}. {advice}", code=code)
    return None


def first_error(lines: Iterable[str]) -> str | None:
    """The first exception in an engine's last log lines: those after it are its consequences."""
    return next((text[:400] for text in map(_clean, lines) if _EXCEPTION.search(text)), None)


def _clean(line: str) -> str:
    # pydantic appends the whole input to its own lines
    text = _LOG_PREFIX.sub("", line).partition(" [type=")[0].strip()
    return redact(_OBJECT.sub("", text))
