"""Streams, and answers OpenAI's routes for chat, embeddings and audio from the input alone.

With `gate`, the path of a file, a part is made when the file has as many characters as there are parts.
"""

import asyncio
import base64
import json
import os

import runpod


async def handler(job):
    order = job["input"]
    route, body = order.get("openai_route"), order.get("openai_input")
    if route == "/v1/models":
        yield {"object": "list", "data": [{"id": "tiny", "object": "model", "body": body}]}
    elif route == "/v1/audio/transcriptions":
        yield {"text": f"transcribed {body['file']}"}
    elif route == "/v1/audio/speech":
        yield {"audio": base64.b64encode(body["input"].encode()).decode()}
    elif route == "/v1/embeddings":
        vectors = [
            {"object": "embedding", "index": i, "embedding": [1.0, i]} for i in range(len(body["input"]))
        ]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        yield {"object": "list", "data": vectors, "model": "tiny", "usage": usage}
    elif route == "/v1/chat/completions":
        if body["model"] == "bad":
            yield {"error": json.dumps({"type": "invalid_request_error", "message": "no such model"})}
        elif body.get("stream"):
            for number, word in enumerate(body["messages"][0]["content"].split(" "), 1):
                yield f"data: {json.dumps(completion(word, 'delta', 'chat.completion.chunk'))}\n\n"
                await wait(job, float(body.get("user", "0")))
                await opened(body.get("gate"), number)
            if body["model"] == "breaks":
                yield {"error": json.dumps({"type": "server_error", "message": "it broke"})}
            yield "data: [DONE]\n\n"
        else:
            yield completion(body["messages"][0]["content"], "message", "chat.completion")
    else:
        for number in range(order.get("count", 3)):
            yield order.get("text", f"token {number}") * order.get("times", 1)
            await wait(job, order.get("sleep", 0))
            await opened(order.get("gate"), number + 1)


async def opened(gate, given):
    while gate and not (os.path.exists(gate) and os.path.getsize(gate) >= given):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def wait(job, seconds):
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        note(job)
        raise


def note(job):
    if path := os.environ.get("NOTES"):
        with open(path, "a") as notes:
            notes.write(f"cancelled {job['id']}\n")


def completion(text, key, kind):
    choice = {"index": 0, "finish_reason": None, key: {"role": "assistant", "content": text}}
    return {"id": "1", "object": kind, "created": 0, "model": "tiny", "choices": [choice]}


if __name__ == "__main__":
    runpod.serverless.start(
        {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda _: 8}
    )
