"""serving.engine_server.log_causes: lines that vLLM and TGI write before they exit."""

from __future__ import annotations

import pytest

from serving.engine_server.log_causes import classify_log


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("(EngineCore pid=7) ERROR 11-25 00:10:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. "
         "Tried to allocate 2.00 GiB.", "out_of_memory"),
        ("ValueError: Free memory on device cuda:0 (3.1/23.6 GiB) on startup is less than desired GPU memory "
         "utilization (0.92, 21.7 GiB).", "out_of_memory"),
        ("OSError: You are trying to access a gated repo.\nAccess to model m/x is restricted: Cannot access "
         "gated repo", "gated"),
        ("OSError: m/x is not a local folder and is not a valid model identifier listed on 'https://h'",
         "model_not_found"),
        ("pydantic_core.ValidationError: Value error, Model architectures ['X'] are not supported for now.",
         "unsupported_architecture"),
        ("OSError: [Errno 28] No space left on device", "no_space"),
        ("RuntimeError: Insufficient space in /dev/shm: 64.0 MiB free", "no_shared_memory"),
        ("vllm: error: argument --dtype: invalid choice: 'int3'", "bad_setting"),
        ("vllm: error: argument --max-model-len: invalid <function human_readable_int at 0x7f3a> value: 'x'",
         "bad_setting"),
        ("ValueError: User-specified max_model_len (9999) is greater than the derived max_model_len "
         "(max_position_embeddings=2048). To allow it, set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", "bad_setting"),
        ('Error: ArgumentValidation("`max_input_tokens`(9) must be < `max_total_tokens`(9)")', "bad_setting"),
        ("error: unexpected argument '--max-model-len' found", "bad_setting"),
        ("error: the argument '--quantize <QUANTIZE>' cannot be used multiple times", "bad_setting"),
        ("ValueError: Please pass the argument `trust_remote_code=True` to allow custom code to be run.",
         "needs_remote_code"),
        ("vllm: error: unrecognized arguments: --no-such-flag", "bad_setting"),
        ("ValueError: Unknown attention backend: 'XFORMERS'. Valid options are: FLASH_ATTN", "bad_setting"),
        ("KeyError: 'invalid tool call parser: nope (chose from { hermes })'", "bad_setting"),
        ("ValueError: Loading lora a failed: No adapter found for /nowhere", "bad_setting"),
        ("  Value error, Total number of attention heads (4) must be divisible by tensor parallel size (3). "
         "[type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]", "bad_setting"),
    ],
)  # fmt: skip
def test_a_permanent_cause_becomes_one_line(line: str, code: str) -> None:
    cause = classify_log(["loading", *line.split("\n"), "see the trace above"])
    assert cause is not None
    assert cause.code == code
    assert "\n" not in cause.message
    assert not cause.message.startswith("(EngineCore")
    assert "input_value" not in cause.message
    assert "0x" not in cause.message


@pytest.mark.parametrize(
    "line",
    [
        "INFO 11-25 all is well",
        "Segmentation fault",
        # vLLM logs its settings at every start, whatever ends it afterwards
        "INFO 11-25 Initializing a V1 LLM engine: trust_remote_code=True, dtype=torch.bfloat16",
    ],
)
def test_another_line_is_no_permanent_cause(line: str) -> None:
    assert classify_log([line]) is None
