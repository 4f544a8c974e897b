"""A stand-in for text-generation-launcher 3.3.7: TGI's HTTP API as the worker uses it, without a model.

TGI is a Rust program for GPUs and is not on PyPI, so tests and `make run-tgi` run this in its place, under
its name (tools.models). It follows TGI's published source at the tag v3.3.7 (launcher/src/main.rs,
router/src/server.rs, lib.rs, validation.rs, chat.rs, infer/mod.rs), and tests/workers/tgi/test_stand_in.py
holds it to the official client. It has the tokenizer and the chat template of a model; the text is drawn
from a hash of the prompt's token ids and, where TGI would sample, of the sampling parameters and the seed.

Faults, for tests. In a prompt, where `n` counts tokens: [[fail n]] the generation fails, [[die n]] the router
process is killed, [[hang n]] nothing answers any more, [[stop n]] a stream stops without its end, [[slow ms]]
each token takes so long. In the environment: TGI_STAND_IN_START=oom.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

VERSION = "3.3.6-dev0"  # what 3.3.7 calls itself: its Cargo.toml was not raised
WORDS = [
    "the", "river", "runs", "past", "an", "old", "stone", "house", "and", "into", "sea", "again", "more",
    "words", "Gr\u00fcne", "Wiese", "caf\u00e9", "\u4f60\u597d", "\U0001f33f", "\U0001f469\u200d\U0001f680",
]  # fmt: skip
END = 1 / 64  # probability of the end token after each word
SAMPLING = ("temperature", "top_k", "top_p", "typical_p")
Event = dict[str, Any]

# ---- the launcher --------------------------------------------------------------------------------------


# Its arguments, each of which is a variable, too, and their defaults.
ARGUMENTS: dict[str, Any] = {
    "model_id": "bigscience/bloom-560m", "hostname": "0.0.0.0", "port": 3000, "payload_limit": 2_000_000,  # noqa: S104
    "max_concurrent_requests": 128, "max_best_of": 2, "max_stop_sequences": 4, "max_top_n_tokens": 5,
    "max_client_batch_size": 4, "graceful_termination_timeout": 90,
    **dict.fromkeys(("max_input_tokens", "max_total_tokens", "max_batch_total_tokens"), 0),
    **dict.fromkeys(("revision", "dtype", "lora_adapters", "tokenizer_config_path"), ""),
    "api_key": "", "usage_stats": "on",
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """Exits with status 2 on an argument that is unknown or of another type, as TGI's clap does."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"text-generation-launcher {VERSION}")
    parser.add_argument("--trust-remote-code", action="store_true")
    for name, default in ARGUMENTS.items():
        flag, kind = f"--{name.replace('_', '-')}", type(default)
        parser.add_argument(flag, type=kind, default=os.environ.get(name.upper(), default))
    return parser.parse_args(argv)


def say(text: str) -> None:
    print(text, flush=True)


def launch(argv: list[str]) -> int:
    """The launcher: the status with which it exits."""
    args = parse(argv)
    say("INFO stand_in: This is a stand-in for TGI, without a model: its answers are random words.")
    say(f"INFO text_generation_launcher: Args {vars(args)}")  # as TGI does it, with the API key
    total, batch = args.max_total_tokens, args.max_batch_total_tokens
    if total and batch and total > batch:
        text = f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {batch}"
        say(f'Error: ArgumentValidation("{text}")')
        return 1
    if not (Path(args.model_id) / "tokenizer.json").is_file():
        say(f"ERROR download: Repository Not Found for url: https://hub/api/models/{args.model_id}.")
        return 1
    if os.environ.get("TGI_STAND_IN_START") == "oom":
        cause = "torch.OutOfMemoryError: CUDA out of memory."
        say(f"ERROR shard-manager: Shard complete standard error output:\nRuntimeError: {cause}")
        say("Error: ShardCannotStart")
        return 1
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    router = subprocess.Popen([sys.executable, __file__, "router", json.dumps(vars(args))], process_group=0)
    while not stopping.wait(0.05):
        if router.poll() is not None:
            say("ERROR text_generation_launcher: Webserver Crashed")
            return 1
    router.terminate()
    router.wait(args.graceful_termination_timeout)
    return 0


# ---- requests, as serde reads them ---------------------------------------------------------------------


class Refused(Exception):
    """An error answer: its status, its text and its `error_type`; without a type it is axum's plain text."""

    def __init__(self, status: int, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.status, self.text, self.kind = status, text, kind


# The type and the default of each field; only one without a default may be null.
Fields = dict[str, tuple[Any, Any]]
PARAMETERS: Fields = {
    **dict.fromkeys(("best_of", "max_new_tokens", "truncate", "seed", "top_n_tokens", "top_k"), (int, None)),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty"), (float, None)),
    **dict.fromkeys(("do_sample", "watermark", "details", "decoder_input_details"), (bool, False)),
    "frequency_penalty": (float, None), "return_full_text": (bool, None), "stop": (list, []),
    "grammar": (dict, None), "adapter_id": (str, None),
}  # fmt: skip
GENERATE: Fields = {"inputs": (str, ...), "parameters": (dict, {"do_sample": True})}
OPENAI: Fields = {
    **dict.fromkeys(("temperature", "top_p", "frequency_penalty"), (float, None)),
    **dict.fromkeys(("max_tokens", "seed"), (int, None)),
    "model": (str, None), "stop": (list, None), "stream": (bool, False),
}  # fmt: skip
CHAT: Fields = OPENAI | {
    "messages": (list, ...), "presence_penalty": (float, None), "logprobs": (bool, None),
    "top_logprobs": (int, None), "tools": (list, None), "tool_choice": (object, None),
    "response_format": (dict, None), "stream_options": (dict, {}),
}  # fmt: skip
COMPLETION: Fields = OPENAI | {"prompt": (object, ...), "repetition_penalty": (float, None)}


def read(body: Any, fields: Fields) -> Event:
    """The known fields, with their defaults; serde ignores the others."""
    values = {}
    for name, (kind, default) in fields.items():
        value = values[name] = body.get(name, default)
        kinds = (int, float) if kind is float else (str, list, dict) if kind is object else (kind,)
        if value is ...:
            raise malformed(f"missing field `{name}`")
        if type(value) not in kinds and not (value is None and default is None):
            raise malformed(f"{name}: invalid value: `{json.dumps(value)[:40]}`, expected {kind.__name__}")
    return values


def malformed(text: str) -> Refused:
    return Refused(
        422, f"Failed to deserialize the JSON body into the target type: {text} at line 1 column 9"
    )


def read_generate(body: Any) -> tuple[str, Event]:
    values = read(body, GENERATE)
    return values["inputs"], read(values["parameters"], PARAMETERS)


def openai_parameters(values: Event, **more: Any) -> Event:
    sampling = {"top_p": values["top_p"], "seed": values["seed"]}
    if values["temperature"] != 0:
        sampling |= {"do_sample": True, "temperature": values["temperature"]}
    return {name: default for name, (_, default) in PARAMETERS.items()} | sampling | more | {
        "max_new_tokens": values["max_tokens"], "stop": values["stop"] or [],
        "frequency_penalty": values["frequency_penalty"],
    }  # fmt: skip


def samples(p: Event) -> bool:
    return p["do_sample"] or any(p[name] is not None for name in SAMPLING)


# ---- in place of a model -------------------------------------------------------------------------------


class Model:
    """The tokenizer, the chat template, and random words."""

    def __init__(self, args: dict[str, Any]) -> None:
        folder = Path(args["model_id"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads(
            Path(args["tokenizer_config_path"] or folder / "tokenizer_config.json").read_text()
        )
        self.tokens = {name: config.get(name) for name in ("bos_token", "eos_token")}
        self.template = config.get("chat_template")  # TGI does not look for chat_template.jinja
        self.end: Any = self.tokenizer.token_to_id(self.tokens["eos_token"])
        limit = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
        self.max_total = args["max_total_tokens"] or limit
        self.max_input = args["max_input_tokens"] or self.max_total - 1
        self.words = [self.encode(f" {word}", special=False).ids for word in WORDS]

    def encode(self, text: str, *, special: bool) -> Any:
        return self.tokenizer.encode(text, add_special_tokens=special)

    def apply_template(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        for number, message in enumerate(messages):
            if None in message.values() or not {"content", "tool_calls"} & message.keys():
                raise malformed(f"messages[{number}]: no variant of enum MessageBody matches")
        if self.template is None:
            raise Refused(422, "Template error: template not found", "template_error")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        messages = [{**m, "content": m.get("content") or json.dumps(m.get("tool_calls"))} for m in messages]
        try:
            return environment.from_string(self.template).render(
                messages=messages, tools=tools, add_generation_prompt=True, **self.tokens
            )
        except TemplateError as error:
            raise Refused(422, f"Template error: syntax error: {error}", "template_error") from None

    async def generate(self, prompt: str, ids: list[int], count: int, p: Event) -> AsyncIterator[Event]:
        """TGI's tokens, one after another."""
        key: list[Any] = [ids]
        seed = random.getrandbits(63) if p["seed"] is None else p["seed"]
        if samples(p):
            key += [seed, *(p[name] for name in SAMPLING)]
        key += [p["repetition_penalty"] or 1.0, p["frequency_penalty"] or 0.0]
        rng = random.Random(hashlib.sha256(json.dumps(key).encode()).digest())  # noqa: S311
        faults = {kind: int(n) for kind, n in re.findall(r"\[\[(\w+) (\d+)\]\]", prompt)}
        new: list[int] = []
        word: list[int] = []
        given, end = 0, ""
        while not end:
            if faults.get("stop") == len(new):
                return
            _break({kind for kind, n in faults.items() if n == len(new)})
            await asyncio.sleep(faults.get("slow", 0) / 1000)
            if not word:
                is_over = new and not faults and rng.random() < END
                word = [self.end] if is_over else list(rng.choice(self.words))
            token = word.pop(0)
            new.append(token)
            text = self.tokenizer.decode(new, skip_special_tokens=False)
            # A token within a character has no text: the character comes with its last token.
            added, given = ("", given) if text.endswith("\ufffd") else (text[given:], len(text))
            if len(new) >= count:
                end = "length"
            elif token == self.end:
                end = "eos_token"
            elif text.endswith(tuple(p["stop"])):
                end = "stop_sequence"
            made = {"id": token, "text": added, "logprob": -rng.random(), "special": token == self.end}
            yield {
                "token": made, "top": [dict(made, special=False)] * (p["top_n_tokens"] or 0),
                "end": end or None,
                "count": len(new), "seed": seed if samples(p) else None, "input_length": len(ids),
                "text": self.tokenizer.decode(new, skip_special_tokens=True) if end else None,
            }  # fmt: skip


def _break(faults: set[str]) -> None:
    if "fail" in faults:
        raise Refused(424, "Request failed during generation: Server error: CUDA error", "generation")
    if "die" in faults:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in faults:
        time.sleep(3600)


# ---- the router ----------------------------------------------------------------------------------------


class Router:
    """TGI's HTTP side: validation, a limit of requests, and answers."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.args = args
        self.model = Model(args)
        self.running = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self.args["payload_limit"], middlewares=[self.errors])
        posts = (self.generate, self.generate_stream, self.tokenize, self.chat_tokenize)
        app.router.add_routes([web.post(f"/{route.__name__}", route) for route in posts])
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.completions)
        gets = (self.health, self.info, self.metrics)
        app.router.add_routes([web.get(f"/{route.__name__}", route) for route in gets])
        return app

    @web.middleware
    async def errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.method == "POST" and self.args["api_key"]:  # the worker has no key
            return web.Response(status=401)
        try:
            return await handler(request)
        except Refused as error:
            if not error.kind:
                return web.Response(text=error.text, status=error.status)
            return web.json_response({"error": error.text, "error_type": error.kind}, status=error.status)
        except web.HTTPRequestEntityTooLarge:
            return web.Response(text="Failed to buffer the request body: length limit exceeded", status=413)

    def admit(self, prompt: str, p: Event, special: bool) -> tuple[list[int], int]:
        """The prompt's token ids and the most new tokens, validated as TGI does it. Raises Refused."""
        most, total, stops = self.model.max_input, self.model.max_total, self.args["max_stop_sequences"]
        best_of, top, top_n = p["best_of"] or 1, p["top_n_tokens"] or 0, self.args["max_top_n_tokens"]
        ids = self.model.encode(prompt, special=special).ids[-(p["truncate"] or 0) :]
        room = max(0, total - len(ids))
        wanted = room if p["max_new_tokens"] is None else p["max_new_tokens"]
        first = min(wanted, 1024)  # after which TGI queues a request anew
        schema = p["grammar"] or {"type": "regex"}
        for valid, text in (
            (best_of <= self.args["max_best_of"], f"`best_of` must be <= {self.args['max_best_of']}."),
            (best_of == 1 or samples(p), "you must use sampling when `best_of` is > 1"),
            *((p[name] is None or p[name] > 0, f"`{name}` must be strictly positive") for name in SAMPLING),
            *((p[name] is None or p[name] < 1, f"`{name}` must be < 1.0") for name in ("top_p", "typical_p")),
            (len(p["stop"]) <= stops, f"`stop` supports up to {stops} stop sequences."),
            (top <= top_n, f"`top_n_tokens` must be >= 0 and <= {top_n}. Given: {top}"),
            ((p["truncate"] or 0) <= most, f"`truncate` must be less than {most}. Given: {p['truncate']}"),
            (
                len(ids) + first <= total,
                f"`inputs` tokens + `max_new_tokens` must be <= {total}. Given: {len(ids)} `inputs` tokens "
                f"and {first} `max_new_tokens`",
            ),
            (len(ids) <= most, f"`inputs` must have less than {most} tokens. Given: {len(ids)}"),
            (
                schema["type"] != "json" or "properties" in schema["value"],
                "grammar is not valid: Grammar must have a 'properties' field",
            ),
        ):
            if not valid:
                raise Refused(422, f"Input validation error: {text}", "validation")
        return ids, min(wanted, max(room, 1))

    async def tokens(self, prompt: str, p: Event, *, special: bool = True) -> AsyncIterator[Event]:
        """The tokens of a request, which counts against the limit until its end, whatever that is."""
        if self.running >= self.args["max_concurrent_requests"]:
            raise Refused(429, "Model is overloaded", "overloaded")
        self.running += 1
        try:
            ids, count = self.admit(prompt, p, special)
            async for token in self.model.generate(prompt, ids, count, p):
                yield token
        finally:
            self.running -= 1

    async def complete(self, prompt: str, p: Event, *, special: bool = True) -> tuple[Event, Event]:
        """TGI's `details`, and the last token."""
        tokens = [token async for token in self.tokens(prompt, p, special=special)]
        last = tokens[-1]
        details = {
            "finish_reason": last["end"], "generated_tokens": last["count"], "seed": last["seed"],
            "prefill": [], "tokens": [token["token"] for token in tokens],
        }  # fmt: skip
        if p["top_n_tokens"]:
            details["top_tokens"] = [token["top"] for token in tokens]
        return details, last

    # ---- TGI's own routes ----

    async def generate(self, request: web.Request) -> web.StreamResponse:
        prompt, p = read_generate(await request.json())
        (details, last), *others = await asyncio.gather(
            *(self.complete(prompt, p) for _ in range(p["best_of"] or 1))
        )
        if others:
            details["best_of_sequences"] = [{"generated_text": end["text"], **d} for d, end in others]
        headers = {"x-prompt-tokens": str(last["input_length"]), "x-generated-tokens": str(last["count"])}
        answer = {"generated_text": last["text"], **({"details": details} if p["details"] else {})}
        return web.json_response(answer, headers=headers)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        prompt, p = read_generate(await request.json())

        async def events() -> AsyncIterator[Event]:
            async for token in self.tokens(prompt, p):
                details = {
                    "finish_reason": token["end"], "generated_tokens": token["count"],
                    "seed": token["seed"], "input_length": token["input_length"],
                }  # fmt: skip
                yield {
                    "index": token["count"], "token": token["token"], "top_tokens": token["top"],
                    "generated_text": token["text"], "details": details if token["end"] else None,
                }  # fmt: skip

        return await self.sse(request, events())

    async def sse(
        self, request: web.Request, events: AsyncIterator[Event], *, openai: bool = False
    ) -> web.StreamResponse:
        """Server-sent events as axum writes them, without a blank after `data:`, and comments in between."""
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            async for event in events:
                data = json.dumps(event, ensure_ascii=False)
                await response.write(f"data:{data}\n\n:\n\n".encode())
        except Refused as error:
            body: Event = {"error": error.text, "error_type": error.kind}
            if openai:
                body = {"error": {"message": error.text, "http_status_code": 422}}
            await response.write(f"data:{json.dumps(body)}\n\n".encode())
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        if openai:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        text, _ = read_generate(await request.json())
        return web.json_response(self.tokens_of(text, special=True))

    async def chat_tokenize(self, request: web.Request) -> web.StreamResponse:
        text = self.model.apply_template(read(await request.json(), CHAT)["messages"])
        return web.json_response(
            {"tokenize_response": self.tokens_of(text, special=False), "templated_text": text}
        )

    def tokens_of(self, text: str, *, special: bool) -> list[Event]:
        encoded = self.model.encode(text, special=special)
        pairs = zip(encoded.ids, encoded.offsets, strict=True)
        return [{"id": id, "text": text[a:b], "start": a, "stop": b} for id, (a, b) in pairs]

    async def health(self, _: web.Request) -> web.StreamResponse:
        return web.Response()

    async def info(self, _: web.Request) -> web.StreamResponse:
        limits = {"max_input_tokens": self.model.max_input, "max_total_tokens": self.model.max_total}
        names = ("model_id", "max_concurrent_requests", "max_best_of", "max_client_batch_size")
        args = {name: self.args[name] for name in names}
        return web.json_response({**args, **limits, "model_sha": None, "version": VERSION})

    async def metrics(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text=f"tgi_batch_current_size {self.running}\n")

    # ---- OpenAI's routes ----

    def head(self, kind: str, model: str | None = None) -> Event:
        name = self.args["model_id"] if model in (None, "tgi") else model
        return {"object": kind, "id": "", "created": int(time.time()), "model": name}

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = read(await request.json(), CHAT)
        prompt = self.model.apply_template(body["messages"], body["tools"])
        penalty = None if body["presence_penalty"] is None else body["presence_penalty"] + 2.0
        more = {"repetition_penalty": penalty, "grammar": body["response_format"]}
        p = openai_parameters(body, top_n_tokens=body["top_logprobs"], **more)
        if body["stream"]:
            return await self.sse(request, self.chat_chunks(body, prompt, p), openai=True)
        details, last = await self.complete(prompt, p, special=False)
        message: Event = {"role": "assistant", "content": last["text"]}
        if tool := _called_tool(body):
            call = {"id": "0", "type": "function", "function": {"name": tool, "arguments": "{}"}}
            message = {"role": "assistant", "tool_calls": [call]}
        tokens = details["tokens"]
        logprobs = list(map(_logprob, tokens, details.get("top_tokens", [[]] * len(tokens))))
        choice = {
            "index": 0, "message": message, "logprobs": {"content": logprobs} if body["logprobs"] else None,
            "finish_reason": _reason(last),
        }  # fmt: skip
        head = self.head("chat.completion", body["model"])
        return web.json_response({**head, "choices": [choice], "usage": _usage(last)})

    async def chat_chunks(self, body: Event, prompt: str, p: Event) -> AsyncIterator[Event]:
        head, tool = self.head("chat.completion.chunk", body["model"]), _called_tool(body)
        async for token in self.tokens(prompt, p, special=False):
            text = "" if token["token"]["special"] else token["token"]["text"]
            delta: Event = {"role": "assistant", "content": text}
            if tool:
                function = {"name": tool if token["count"] == 1 else None, "arguments": text}
                call = {"index": 0, "id": "0", "type": "function", "function": function}
                delta = {"role": "assistant", "tool_calls": [call]}
            logprobs = {"content": [_logprob(token["token"], token["top"])]} if body["logprobs"] else None
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": _reason(token)}
            yield {**head, "choices": [choice], "usage": None}
            if token["end"] and body["stream_options"].get("include_usage"):
                yield {**head, "choices": [], "usage": _usage(token)}

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = read(await request.json(), COMPLETION)
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        most = self.args["max_client_batch_size"]
        if len(prompts) > most:
            text = f"Number of prompts exceeds the maximum allowed batch size of {most}"
            raise Refused(422, text, "batch size exceeded")
        p = openai_parameters(body, repetition_penalty=body["repetition_penalty"])
        if body["stream"]:
            return await self.sse(request, self.completion_chunks(prompts, p), openai=True)
        ends = [last for _, last in await asyncio.gather(*(self.complete(prompt, p) for prompt in prompts))]
        choices = [
            {"index": index, "text": end["text"], "logprobs": None, "finish_reason": _reason(end)}
            for index, end in enumerate(ends)
        ]
        usage = {name: sum(_usage(end)[name] for end in ends) for name in _usage(ends[0])}
        return web.json_response({**self.head("text_completion"), "choices": choices, "usage": usage})

    async def completion_chunks(self, prompts: list[str], p: Event) -> AsyncIterator[Event]:
        """A token of each prompt in turn. The last of each has its text even if that is the end token's."""
        streams = dict(enumerate(self.tokens(prompt, p) for prompt in prompts))
        try:
            while streams:
                for index, stream in list(streams.items()):
                    token = await anext(stream)
                    reason, text = token["end"] or "", token["token"]["text"]
                    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
                    usage = {"usage": _usage(token)} if reason else {}
                    yield {**self.head("text_completion"), "choices": [choice], **usage}
                    if reason:
                        await streams.pop(index).aclose()  # type: ignore[attr-defined]
        finally:
            for stream in streams.values():
                await stream.aclose()  # type: ignore[attr-defined]


def _called_tool(body: Event) -> str | None:
    """TGI forces a tool where it is `required` or named."""
    choice = body["tool_choice"]
    if not body["tools"] or choice in (None, "auto", "none"):
        return None
    return str((choice if isinstance(choice, dict) else body["tools"][0])["function"]["name"])


def _reason(token: Event) -> str | None:
    return "stop" if token["end"] == "eos_token" else token["end"]


def _usage(token: Event) -> dict[str, int]:
    prompt, count = token["input_length"], token["count"]
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def _logprob(token: Event, top: list[Event]) -> Event:
    tops = [{"token": other["text"], "logprob": other["logprob"]} for other in top]
    return {"token": token["text"], "logprob": token["logprob"], "top_logprobs": tops}


def main(argv: list[str]) -> int:
    if argv[:1] != ["router"]:
        return launch(argv)
    args = json.loads(argv[1])
    web.run_app(
        Router(args).app(), host=args["hostname"], port=args["port"], handler_cancellation=True,
        access_log=None, print=None, shutdown_timeout=args["graceful_termination_timeout"],
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
