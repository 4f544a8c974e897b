"""What a first vLLM handler looks like: the engine in the handler's own process, one job at a time.

Run by vLLM's Python. The SDK's packages come after vLLM's (SDK_PACKAGES), as their pins do not go together.
The file is not called vllm.py, as `import vllm` would find it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.append(os.environ["SDK_PACKAGES"])
sys.modules["torchcodec"] = None  # type: ignore[assignment]  # beside the SDK; does not load with this torch

import runpod  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

NAME = os.environ["MODEL_NAME"]


def format_chat_messages(messages: list[dict[str, str]]) -> str:
    turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages]
    return "".join([*turns, "<|im_start|>assistant\n"])


def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    prompt = format_chat_messages(wanted["messages"]) if "messages" in wanted else wanted.get("prompt", "")
    sampling = SamplingParams(
        max_tokens=wanted.get("max_tokens", 512),
        temperature=wanted.get("temperature", 0.7),
        top_p=wanted.get("top_p", 0.95),
        top_k=wanted.get("top_k", -1),
        presence_penalty=wanted.get("presence_penalty", 0),
        frequency_penalty=wanted.get("frequency_penalty", 0),
        stop=wanted.get("stop"),
        ignore_eos=wanted.get("ignore_eos", False),
    )
    output = llm.generate([prompt], sampling, use_tqdm=False)[0]
    made = output.outputs[0]
    return {
        "id": f"chatcmpl-{job['id']}",
        "object": "chat.completion",
        "model": NAME,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": made.text},
                "finish_reason": made.finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(made.token_ids),
            "total_tokens": len(output.prompt_token_ids) + len(made.token_ids),
        },
    }


if __name__ == "__main__":
    llm = LLM(model=NAME, dtype="float32", enforce_eager=True, max_model_len=2048)
    runpod.serverless.start({"handler": handler})
