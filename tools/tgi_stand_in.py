"""A stand-in for text-generation-launcher 3.3.7: TGI's HTTP API and its launcher's habits, without a model.

TGI is a Rust program for GPUs and is not on PyPI, so tests and `make run-tgi` run this in its place, under
its name (tools.models). It is written from TGI's published source at the tag v3.3.7 (launcher/src/main.rs,
router/src/server.rs, lib.rs, validation.rs, chat.rs, infer/mod.rs), and tests/workers/tgi/test_stand_in.py
holds it to the official clients. What it has of a model is the tokenizer and the chat template: the text is drawn
word by word from a hash of the prompt's tokens and, where TGI would draw, of the sampling and the seed.

Faults, for tests. In a prompt, where `n` counts tokens: [[fail n]] the generation fails, [[die n]] the router
process is killed, [[hang n]] nothing answers any more, [[stop n]] a stream just stops, [[slow ms]] each token
takes so long. In the environment: TGI_STAND_IN_START=crash, oom or hang, TGI_STAND_IN_STEP (seconds a token
takes),
TGI_STAND_IN_KEEP_ALIVE (seconds of silence in a stream after which a comment is sent).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from aiohttp import web

VERSION = "3.3.6-dev0"  # what 3.3.7 calls itself: its Cargo.toml was not raised
DEFAULT_GENERATION = 1024  # tokens after which TGI queues a request anew
WORDS = [
    "the", "river", "runs", "past", "an", "old", "stone", "house", "and", "into", "sea", "again", "more",
    "words", "Gr\u00fcne", "Wiese", "caf\u00e9", "\u4f60\u597d", "\U0001f33f", "\U0001f469\u200d\U0001f680",
]  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p", "typical_p")
END = 1 / 64  # chance of the end after each word

# ---- the launcher --------------------------------------------------------------------------------------

_QUANTIZE = [
    "awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes", "bitsandbytes-nf4",
    "bitsandbytes-fp4", "fp8",
]  # fmt: skip
# Every argument: its type and default. A list is a choice, bool a switch, None unset.
ARGUMENTS: dict[str, tuple[Any, Any]] = {
    "model_id": (str, "bigscience/bloom-560m"), "revision": (str, None), "validation_workers": (int, 2),
    "sharded": (["true", "false"], None), "num_shard": (int, None), "quantize": (_QUANTIZE, None),
    "speculate": (int, None), "dtype": (["float16", "bfloat16"], None),
    "kv_cache_dtype": (["fp8_e4m3fn", "fp8_e5m2"], None), "trust_remote_code": (bool, False),
    "max_concurrent_requests": (int, 128), "max_best_of": (int, 2), "max_stop_sequences": (int, 4),
    "max_top_n_tokens": (int, 5), "max_input_tokens": (int, None), "max_input_length": (int, None),
    "max_total_tokens": (int, None), "waiting_served_ratio": (float, 0.3),
    "max_batch_prefill_tokens": (int, None), "max_batch_total_tokens": (int, None),
    "max_waiting_tokens": (int, 20), "max_batch_size": (int, None), "cuda_graphs": (str, None),
    "hostname": (str, "0.0.0.0"), "port": (int, 3000), "prometheus_port": (int, 9000),  # noqa: S104
    "shard_uds_path": (str, "/tmp/text-generation-server"), "master_addr": (str, "localhost"),  # noqa: S108
    "master_port": (int, 29500), "huggingface_hub_cache": (str, None), "weights_cache_override": (str, None),
    "disable_custom_kernels": (bool, False), "cuda_memory_fraction": (float, 1.0),
    "rope_scaling": (["linear", "dynamic"], None), "rope_factor": (float, None), "json_output": (bool, False),
    "otlp_endpoint": (str, None), "otlp_service_name": (str, "text-generation-inference.router"),
    "cors_allow_origin": (str, None), "api_key": (str, None), "watermark_gamma": (float, None),
    "watermark_delta": (float, None), "ngrok": (bool, False), "ngrok_authtoken": (str, None),
    "ngrok_edge": (str, None), "tokenizer_config_path": (str, None), "disable_grammar_support": (bool, False),
    "max_client_batch_size": (int, 4), "lora_adapters": (str, None),
    "usage_stats": (["on", "off", "no-stack"], "on"), "payload_limit": (int, 2_000_000),
    "enable_prefill_logprobs": (bool, False), "graceful_termination_timeout": (int, 90),
}  # fmt: skip
Args = dict[str, Any]


def say(text: str) -> None:
    print(text, flush=True)


def _stop(text: str, status: int) -> NoReturn:
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(status)


def _value(name: str, text: str) -> Any:
    """As clap reads it: an empty text is no number, no switch and no choice."""
    kind, _ = ARGUMENTS[name]
    flag = f"'--{name.replace('_', '-')} <{name.upper()}>'"
    choices = ["true", "false"] if kind is bool else kind if isinstance(kind, list) else None
    if choices is not None:
        if text not in choices:
            _stop(f"error: invalid value '{text}' for {flag}\n  [possible values: {', '.join(choices)}]", 2)
        return text == "true" if kind is bool else text
    try:
        return kind(text)
    except ValueError:
        why = "cannot parse integer from empty string" if text == "" else "invalid digit found in string"
        _stop(f"error: invalid value '{text}' for {flag}: {why}\n\nFor more information, try '--help'.", 2)


def parse(argv: list[str]) -> Args:
    """The command line's arguments, else the environment's, else the defaults. Exits with 2, as clap does."""
    given: Args = {}
    words = iter(argv)
    for word in words:
        flag, equals, text = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or name not in ARGUMENTS:
            _stop(
                f"error: unexpected argument '{word}' found\n\nUsage: text-generation-launcher [OPTIONS]", 2
            )
        if name in given:
            _stop(f"error: the argument '{flag}' cannot be used multiple times", 2)
        if ARGUMENTS[name][0] is bool:
            given[name] = True
            continue
        value = text if equals else next(words, "--")
        if not equals and value.startswith("--"):
            _stop(f"error: a value is required for '{flag} <{name.upper()}>' but none was supplied", 2)
        given[name] = _value(name, value)
    for name, (_, default) in ARGUMENTS.items():
        if name not in given:
            variable = os.environ.get(name.upper())
            given[name] = default if variable is None else _value(name, variable)
    return given


def check(args: Args) -> None:
    """What TGI's launcher refuses before it starts anything."""

    def refuse(text: str) -> NoReturn:
        _stop(f"Error: ArgumentValidation({json.dumps(text)})", 1)

    tokens, length, total = args["max_input_tokens"], args["max_input_length"], args["max_total_tokens"]
    if tokens is not None and length is not None:
        refuse(
            f"Both `max_input_tokens` ({tokens}) and `max_input_length` ({length}) are set. Please define "
            "only `max_input_tokens` as `max_input_length is deprecated for naming consistency."
        )
    args["max_input_tokens"] = tokens = length if tokens is None else tokens
    if tokens is not None and total is not None and tokens >= total:
        refuse(f"`max_input_tokens`({tokens}) must be < `max_total_tokens`({total})")
    batch = args["max_batch_total_tokens"]
    if batch is not None and total is not None and total > batch:
        refuse(f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {batch}")
    if args["validation_workers"] == 0:
        refuse("`validation_workers` must be > 0")


def launch(argv: list[str]) -> int:
    """The launcher: the status with which it ends."""
    if argv == ["--version"]:
        print(f"text-generation-launcher {VERSION}")
        return 0
    args = parse(argv)
    say("INFO stand_in: This is a stand-in for TGI, without a model: its answers are random words.")
    # As TGI does it, API key and all.
    say(
        "INFO text_generation_launcher: Args {\n"
        + "".join(f"    {k}: {v!r},\n" for k, v in args.items())
        + "}"
    )
    check(args)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    folder = Path(args["model_id"])
    if not (folder / "tokenizer.json").is_file():
        say(
            "ERROR download: text_generation_launcher: Download encountered an error:\n"
            "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.\n"
            f"Repository Not Found for url: https://huggingface.co/api/models/{args['model_id']}."
        )
        _stop("Error: DownloadError", 1)
    fault = os.environ.get("TGI_STAND_IN_START", "")
    if fault in ("crash", "oom"):
        what = (
            "RuntimeError: NCCL error" if fault == "crash" else "torch.OutOfMemoryError: CUDA out of memory."
        )
        say(f"ERROR shard-manager: text_generation_launcher: Shard complete standard error output:\n{what}")
        say("ERROR text_generation_launcher: Shard 0 failed to start")
        _stop("Error: ShardCannotStart", 1)
    if fault == "hang":
        stopping.wait()
        return 0
    router = subprocess.Popen(
        [sys.executable, __file__, "router", json.dumps(args)], stdin=subprocess.DEVNULL, process_group=0
    )
    while not stopping.wait(0.05):
        if router.poll() is not None:
            say("ERROR text_generation_launcher: Webserver Crashed")
            _stop("Error: WebserverFailed", 1)
    router.terminate()
    try:
        router.wait(args["graceful_termination_timeout"])
    except subprocess.TimeoutExpired:
        router.kill()
    return 0


# ---- what it has in place of a model -------------------------------------------------------------------


class Refused(Exception):
    """An error answer of TGI's: its status, its `error_type` and its text."""

    def __init__(self, status: int, kind: str, text: str) -> None:
        super().__init__(text)
        self.status, self.kind, self.text = status, kind, text


def invalid(text: str) -> Refused:
    return Refused(422, "validation", f"Input validation error: {text}")


@dataclass
class Fault:
    kind: str
    count: int


@dataclass
class Draft:
    """A request that is admitted: what is generated from, and how far."""

    inputs: str
    parameters: dict[str, Any]
    ids: list[int]
    max_new: int
    seed: int
    faults: list[Fault] = field(default_factory=list)


class Model:
    """The tokenizer, the chat template, and words in place of what a model would say."""

    def __init__(self, args: Args) -> None:
        from tokenizers import Tokenizer

        folder = Path(args["model_id"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads(
            Path(args["tokenizer_config_path"] or folder / "tokenizer_config.json").read_text()
        )
        self.tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
        # chat_template.jinja is newer than TGI, which does not look for it.
        self.template = config.get("chat_template")
        end = self.tokenizer.token_to_id(self.tokens["eos_token"] or "")
        assert end is not None
        self.end: int = end
        limit = json.loads((folder / "config.json").read_text()).get("max_position_embeddings", 4096)
        self.max_total = args["max_total_tokens"] or limit
        self.max_input = args["max_input_tokens"] or self.max_total - 1
        self.words = [self.encode(f" {word}", special=False).ids for word in WORDS]

    def encode(self, text: str, *, special: bool) -> Any:
        return self.tokenizer.encode(text, add_special_tokens=special)

    def apply(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.template is None:
            raise Refused(422, "template_error", "Template error: template not found")
        turns = [{**turn, "content": _content(turn)} for turn in messages]

        def raise_exception(text: str) -> NoReturn:
            raise TemplateError(text)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(self.template).render(
                messages=turns, tools=tools, add_generation_prompt=True, **self.tokens
            )
        except TemplateError as error:
            raise Refused(422, "template_error", f"Template error: syntax error: {error}") from None

    async def generate(self, draft: Draft, step: float) -> AsyncIterator[dict[str, Any]]:
        """TGI's tokens, {"token", "top_tokens", "text", "end"}, one after another."""
        p = draft.parameters
        key: list[Any] = [draft.ids]
        drawn = p["do_sample"] or any(p[name] is not None for name in SAMPLING)
        if drawn:
            key += [draft.seed, *(p[name] for name in SAMPLING)]
        key += [p["repetition_penalty"] or 1.0, p["frequency_penalty"] or 0.0]
        chance = random.Random(hashlib.sha256(json.dumps(key).encode()).digest())  # noqa: S311
        slow = next((fault.count / 1000 for fault in draft.faults if fault.kind == "slow"), step)
        end_id = self.end
        ids: list[int] = []
        coming: list[int] = []
        given, output = 0, ""
        while True:
            for fault in draft.faults:
                if fault.count == len(ids):
                    if fault.kind == "stop":
                        return
                    await _break(fault)
            await asyncio.sleep(slow)
            if not coming:
                over = ids and not draft.faults and chance.random() < END
                coming = [end_id] if over else list(chance.choice(self.words))
            token = coming.pop(0)
            ids.append(token)
            whole = self.tokenizer.decode(ids, skip_special_tokens=False)
            # A token that ends within a character has no text of its own: it comes with the character's last.
            text, given = ("", given) if whole.endswith("\ufffd") else (whole[given:], len(whole))
            output = (output + text)[-300:]
            end = None
            if len(ids) >= draft.max_new:
                end = "length"
            elif token == end_id:
                end = "eos_token"
            elif any(re.search(f"{re.escape(stop)}$", output) for stop in p["stop"]):
                end = "stop_sequence"
            made = {"id": token, "text": text, "logprob": -chance.random(), "special": token == end_id}
            top = [dict(made, special=False) for _ in range(p["top_n_tokens"] or 0)]
            yield {
                "token": made, "top_tokens": top, "end": end, "count": len(ids),
                "seed": draft.seed if drawn else None,
                "text": self.tokenizer.decode(ids, skip_special_tokens=True) if end else None,
            }  # fmt: skip
            if end:
                return


async def _break(fault: Fault) -> None:
    if fault.kind == "fail":
        raise Refused(424, "generation", "Request failed during generation: Server error: CUDA error")
    if fault.kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "hang":
        time.sleep(3600)  # noqa: ASYNC251 (on purpose: nothing answers any more)


def _token_text(token: Any) -> str | None:
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text


def _content(turn: dict[str, Any]) -> str:
    """What TGI's templates see of a message."""
    if "content" not in turn or turn["content"] is None:
        return json.dumps(turn["tool_calls"])
    if isinstance(turn["content"], str):
        return turn["content"]
    parts = turn["content"]
    return "".join(it["text"] if it["type"] == "text" else f"![]({it['image_url']['url']})" for it in parts)


# ---- requests, read as serde reads them ----------------------------------------------------------------

U32, U64, TEXTS, OBJECTS = "u32", "u64", "a sequence", "a sequence of maps"
# The type of each field, and whether null stands for its absence.
PARAMETERS: dict[str, tuple[Any, bool, Any]] = {
    "best_of": (U32, True, None), "temperature": (float, True, None),
    "repetition_penalty": (float, True, None), "frequency_penalty": (float, True, None),
    "top_k": (int, True, None), "top_p": (float, True, None),
    "typical_p": (float, True, None), "do_sample": (bool, False, False), "max_new_tokens": (U32, True, None),
    "return_full_text": (bool, True, None), "stop": (TEXTS, False, []), "truncate": (U32, True, None),
    "watermark": (bool, False, False), "details": (bool, False, False),
    "decoder_input_details": (bool, False, False), "seed": (U64, True, None),
    "top_n_tokens": (U32, True, None), "grammar": (dict, True, None), "adapter_id": (str, True, None),
}  # fmt: skip
CHAT: dict[str, tuple[Any, bool, Any]] = {
    "model": (str, True, None), "messages": (OBJECTS, False, ...), "frequency_penalty": (float, True, None),
    "logit_bias": (TEXTS, True, None), "logprobs": (bool, True, None), "top_logprobs": (U32, True, None),
    "max_tokens": (U32, True, None), "n": (U32, True, None), "presence_penalty": (float, True, None),
    "stop": (TEXTS, True, None), "stream": (bool, False, False), "seed": (U64, True, None),
    "temperature": (float, True, None), "top_p": (float, True, None), "tools": (OBJECTS, True, None),
    "tool_choice": (object, True, None), "response_format": (dict, True, None),
    "stream_options": (dict, False, {}),
}  # fmt: skip
COMPLETION: dict[str, tuple[Any, bool, Any]] = {
    "model": (str, True, None), "prompt": (object, False, ...), "max_tokens": (U32, True, None),
    "temperature": (float, True, None), "top_p": (float, True, None), "stream": (bool, False, False),
    "seed": (U64, True, None), "suffix": (str, True, None), "repetition_penalty": (float, True, None),
    "frequency_penalty": (float, True, None), "stop": (TEXTS, True, None),
}  # fmt: skip


class Malformed(Exception):
    """The body is not the JSON that the route takes; axum answers in plain text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def _fits(value: Any, kind: Any) -> bool:
    if kind in (U32, U64):
        return type(value) is int and 0 <= value < 2 ** (32 if kind == U32 else 64)
    if kind is float:
        return type(value) in (int, float)
    if kind in (TEXTS, OBJECTS):
        inner = str if kind == TEXTS else dict
        return isinstance(value, list) and all(isinstance(item, inner) for item in value)
    return kind is object or type(value) is kind


def read(body: Any, fields: dict[str, tuple[Any, bool, Any]], prefix: str = "") -> dict[str, Any]:
    """The known fields with their defaults; serde ignores the others."""

    def wrong(where: str, what: str) -> Malformed:
        text = f"{prefix}{where}: {what}" if where else what
        return Malformed(
            422, f"Failed to deserialize the JSON body into the target type: {text} at line 1 column 9"
        )

    if not isinstance(body, dict):
        raise wrong("", "invalid type, expected struct")
    found = {}
    for name, (kind, nullable, default) in fields.items():
        if name == "max_tokens" and "max_completion_tokens" in body:
            if "max_tokens" in body:
                raise wrong("", "duplicate field `max_tokens`")
            body = {**body, "max_tokens": body["max_completion_tokens"]}
        if name not in body:
            if default is ...:
                raise wrong("", f"missing field `{name}`")
            found[name] = default
        elif body[name] is None and nullable:
            found[name] = None
        elif _fits(body[name], kind):
            # TGI's numbers have 32 bits: 0.99999999999 is 1.
            found[name] = struct.unpack("f", struct.pack("f", body[name]))[0] if kind is float else body[name]
        else:
            raise wrong(name, f"invalid value: `{json.dumps(body[name])[:40]}`, expected {kind}")
    return found


# ---- the router ----------------------------------------------------------------------------------------


class Router:
    """TGI's HTTP side: validation, a permit for each request, and its answers."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.model = Model(args)
        self.permits = args["max_concurrent_requests"]
        self.running = 0
        self.served = 0
        self.healthy = True
        self.step = float(os.environ.get("TGI_STAND_IN_STEP", "0"))
        self.keep_alive = float(os.environ.get("TGI_STAND_IN_KEEP_ALIVE", "15"))

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self.args["payload_limit"], middlewares=[self.errors])
        app.router.add_post("/", self.compat)
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/generate_stream", self.generate_stream)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/chat_tokenize", self.chat_tokenize)
        for path in ("/", "/health", "/ping"):
            app.router.add_get(path, self.health)
        app.router.add_get("/info", self.info)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        return app

    @web.middleware
    async def errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        key = self.args["api_key"]
        guarded = key and request.method == "POST" and request.path != "/chat_tokenize"
        if guarded and request.headers.get("Authorization") != f"Bearer {key}":
            return web.Response(status=401)
        try:
            return await handler(request)
        except Refused as refused:
            return web.json_response(
                {"error": refused.text, "error_type": refused.kind}, status=refused.status
            )
        except Malformed as malformed:
            return web.Response(text=malformed.text, status=malformed.status)

    async def body(self, request: web.Request) -> Any:
        if request.content_type != "application/json":
            raise Malformed(415, "Expected request with `Content-Type: application/json`")
        try:
            text = await request.text()
        except web.HTTPRequestEntityTooLarge:
            raise Malformed(413, "Failed to buffer the request body: length limit exceeded") from None
        try:
            return json.loads(text)
        except ValueError as error:
            raise Malformed(400, f"Failed to parse the request body as JSON: {error}") from None

    # ---- admission ----

    def admit(self, inputs: str, p: dict[str, Any], *, special: bool = True) -> Draft:
        """Validate as TGI does, in its order. Raises Refused."""
        best_of = 1 if p["best_of"] is None else p["best_of"]
        drawn = p["do_sample"] or any(p[name] is not None for name in SAMPLING)
        if best_of > 1 and not drawn:
            raise invalid("you must use sampling when `best_of` is > 1")
        if p["temperature"] is not None and p["temperature"] <= 0:
            raise invalid("`temperature` must be strictly positive")
        if p["repetition_penalty"] is not None and p["repetition_penalty"] <= 0:
            raise invalid("`repetition_penalty` must be strictly positive")
        if p["frequency_penalty"] is not None and not -2 <= p["frequency_penalty"] <= 2:
            raise invalid("`frequency_penalty` must be >= -2.0 and <= 2.0")
        for name in ("top_p", "typical_p"):
            if p[name] is not None and not 0 < p[name] < 1:
                raise invalid(f"`{name}` must be > 0.0 and < 1.0")
        if p["top_k"] is not None and p["top_k"] <= 0:
            raise invalid("`top_k` must be strictly positive")
        if p["max_new_tokens"] == 0:
            raise invalid("`max_new_tokens` must be strictly positive")
        stops = self.args["max_stop_sequences"]
        if len(p["stop"]) > stops:
            raise invalid(f"`stop` supports up to {stops} stop sequences. Given: {len(p['stop'])}")
        if p["seed"] is not None and best_of > 1:
            raise invalid("`seed` must not be set when `best_of` > 1")
        top = self.args["max_top_n_tokens"]
        if (p["top_n_tokens"] or 0) > top:
            raise invalid(f"`top_n_tokens` must be >= 0 and <= {top}. Given: {p['top_n_tokens']}")
        if not inputs:
            raise invalid("`inputs` cannot be empty")
        most = self.model.max_input
        if p["truncate"] is not None and not 0 < p["truncate"] <= most:
            raise invalid(
                f"`truncate` must be strictly positive and less than {most}. Given: {p['truncate']}"
            )
        ids = self.model.encode(inputs, special=special).ids
        if p["truncate"]:
            ids = ids[-p["truncate"] :]
        room = max(0, self.model.max_total - len(ids))
        wanted = room if p["max_new_tokens"] is None else p["max_new_tokens"]
        first = min(wanted, DEFAULT_GENERATION)
        if len(ids) + first > self.model.max_total:
            raise invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {self.model.max_total}. Given: {len(ids)} "
                f"`inputs` tokens and {first} `max_new_tokens`"
            )
        if len(ids) > most:
            raise invalid(f"`inputs` must have less than {most} tokens. Given: {len(ids)}")
        if p["grammar"] is not None:
            if self.args["disable_grammar_support"]:
                raise invalid("grammar is not supported")
            value = p["grammar"].get("value")
            if p["grammar"].get("type") == "json" and not (isinstance(value, dict) and "properties" in value):
                raise invalid("grammar is not valid: Grammar must have a 'properties' field")
        seed = p["seed"] if p["seed"] is not None else random.getrandbits(63)
        faults = [
            Fault(kind, int(n)) for kind, n in re.findall(r"\[\[(fail|die|hang|stop|slow) (\d+)\]\]", inputs)
        ]
        return Draft(inputs, p, ids, min(wanted, max(room, 1)), seed, faults)

    async def tokens(
        self, inputs: str, p: dict[str, Any], *, special: bool = True
    ) -> AsyncIterator[dict[str, Any]]:
        """A request from its permit to its last token; the permit goes back however it ends."""
        if self.running >= self.permits:
            raise Refused(429, "overloaded", "Model is overloaded")
        self.running += 1
        self.served += 1
        try:
            draft = self.admit(inputs, p, special=special)
            async for made in self.model.generate(draft, self.step):
                yield {**made, "input_length": len(draft.ids)}
        except Refused as refused:
            self.healthy = refused.kind != "generation"
            raise
        finally:
            self.running -= 1

    async def whole(
        self, inputs: str, p: dict[str, Any], *, special: bool = True
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """TGI's `details` and the last token."""
        made, tops, last = [], [], {}
        async for last in self.tokens(inputs, p, special=special):
            made.append(last["token"])
            tops.append(last["top_tokens"])
        details = {
            "finish_reason": last["end"], "generated_tokens": last["count"], "seed": last["seed"],
            "prefill": [], "tokens": made, **({"top_tokens": tops} if p["top_n_tokens"] else {}),
        }  # fmt: skip
        return details, last

    # ---- TGI's own routes ----

    async def answer(self, inputs: str, p: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        best_of = p["best_of"] or 1
        if best_of > self.args["max_best_of"]:
            raise invalid(f"`best_of` must be > 0 and <= {self.args['max_best_of']}. Given: {best_of}")
        made = await asyncio.gather(*(self.whole(inputs, p) for _ in range(best_of)))
        prompt = inputs if p["return_full_text"] else ""
        (details, last), *others = made
        if others:
            details["best_of_sequences"] = [{"generated_text": prompt + it["text"], **d} for d, it in others]
        answer: dict[str, Any] = {"generated_text": prompt + last["text"]}
        if p["details"] or p["decoder_input_details"]:
            answer["details"] = details
        headers = {"x-prompt-tokens": str(last["input_length"]), "x-generated-tokens": str(last["count"])}
        return answer, headers

    async def generate(self, request: web.Request) -> web.StreamResponse:
        inputs, p = self.read_generate(await self.body(request))
        answer, headers = await self.answer(inputs, p)
        return web.json_response(answer, headers=headers)

    def read_generate(self, body: Any) -> tuple[str, dict[str, Any]]:
        inputs = read(body, {"inputs": (str, False, ...)})["inputs"]
        parameters = body.get("parameters", {"do_sample": True})
        return inputs, read(parameters, PARAMETERS, "parameters.")

    async def compat(self, request: web.Request) -> web.StreamResponse:
        body = await self.body(request)
        inputs, p = self.read_generate(body)
        if body.get("stream"):
            return await self.sse(request, self.stream_events(inputs, p))
        answer, headers = await self.answer(inputs, p)
        return web.json_response([answer], headers=headers)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        inputs, p = self.read_generate(await self.body(request))
        return await self.sse(request, self.stream_events(inputs, p))

    async def stream_events(self, inputs: str, p: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if (p["best_of"] or 1) != 1:
            raise invalid("`best_of` != 1 is not supported when streaming tokens")
        if p["decoder_input_details"]:
            raise invalid("`decoder_input_details` == true is not supported when streaming tokens")
        async for made in self.tokens(inputs, p):
            event: dict[str, Any] = {"index": made["count"], "token": made["token"]}
            if made["top_tokens"]:
                event["top_tokens"] = made["top_tokens"]
            end = made["end"] is not None
            event["generated_text"] = (
                (inputs if p["return_full_text"] else "") + made["text"] if end else None
            )
            event["details"] = self.stream_details(made) if end and p["details"] else None
            yield event

    def stream_details(self, made: dict[str, Any]) -> dict[str, Any]:
        return {
            "finish_reason": made["end"], "generated_tokens": made["count"], "seed": made["seed"],
            "input_length": made["input_length"],
        }  # fmt: skip

    async def sse(
        self, request: web.Request, events: AsyncIterator[dict[str, Any]], *, openai: bool = False
    ) -> web.StreamResponse:
        """Server-sent events as axum writes them: JSON follows `data:` without a blank, a text with one."""
        response = web.StreamResponse(
            headers={"content-type": "text/event-stream", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        waiting = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                done, _ = await asyncio.wait([waiting], timeout=self.keep_alive)
                if not done:
                    await response.write(b":\n\n")
                    continue
                event = waiting.result()
                if event is None:
                    break
                await response.write(f"data:{json.dumps(event, ensure_ascii=False)}\n\n".encode())
                waiting = asyncio.ensure_future(anext(events, None))
        except Refused as refused:
            error: dict[str, Any] = {"error": refused.text, "error_type": refused.kind}
            if openai:
                error = {"error": {"message": refused.text, "http_status_code": 422}}
            await response.write(f"data:{json.dumps(error)}\n\n".encode())
        finally:
            waiting.cancel()
            await asyncio.wait([waiting])
            await events.aclose()  # type: ignore[attr-defined]
        if openai:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        inputs, _ = self.read_generate(await self.body(request))
        return web.json_response(self.simple_tokens(inputs, special=True))

    async def chat_tokenize(self, request: web.Request) -> web.StreamResponse:
        chat = read(await self.body(request), CHAT)
        text = self.read_chat(chat)[0]
        tokens = self.simple_tokens(text, special=False)
        return web.json_response({"tokenize_response": tokens, "templated_text": text})

    def simple_tokens(self, text: str, *, special: bool) -> list[dict[str, Any]]:
        found = self.model.encode(text, special=special)
        pairs = zip(found.ids, found.offsets, strict=True)
        return [{"id": id, "text": text[a:b], "start": a, "stop": b} for id, (a, b) in pairs]

    async def health(self, request: web.Request) -> web.StreamResponse:
        self.healthy = True  # TGI generates a token to find out
        return web.Response()

    async def info(self, request: web.Request) -> web.StreamResponse:
        args = self.args
        return web.json_response(
            {
                "model_id": args["model_id"], "model_sha": None, "model_pipeline_tag": None,
                "router": "stand-in", "max_concurrent_requests": args["max_concurrent_requests"],
                "max_best_of": args["max_best_of"], "max_stop_sequences": args["max_stop_sequences"],
                "max_input_tokens": self.model.max_input, "max_total_tokens": self.model.max_total,
                "validation_workers": args["validation_workers"],
                "max_client_batch_size": args["max_client_batch_size"], "version": VERSION, "sha": None,
                "docker_label": None,
            }
        )  # fmt: skip

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        text = f"tgi_batch_current_size {self.running}\ntgi_request_count {self.served}\ntgi_queue_size 0\n"
        return web.Response(text=text)

    async def models(self, request: web.Request) -> web.StreamResponse:
        name = self.args["model_id"]
        model = {"id": name, "object": "model", "created": 0, "owned_by": name}
        return web.json_response({"object": "list", "data": [model]})

    # ---- OpenAI's routes, as TGI has them ----

    def head(self, kind: str, model: str | None) -> dict[str, Any]:
        return {
            "object": kind, "id": "", "created": int(time.time()),
            "model": model if model not in (None, "tgi") else self.args["model_id"],
            "system_fingerprint": f"{VERSION}-native",
        }  # fmt: skip

    def sampling(self, asked: dict[str, Any]) -> dict[str, Any]:
        greedy = asked["temperature"] == 0
        values = {name: default for name, (_, _, default) in PARAMETERS.items()}
        return values | {
            "do_sample": not greedy, "temperature": None if greedy else asked["temperature"], "details": True,
            "top_p": asked["top_p"], "seed": asked["seed"], "stop": asked["stop"] or [],
            "max_new_tokens": asked["max_tokens"], "frequency_penalty": asked["frequency_penalty"],
        }  # fmt: skip

    def read_chat(self, chat: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if chat["tools"] is not None and chat["response_format"] is not None:
            raise Refused(422, "tool_error", "Tool error: Grammar and tools are mutually exclusive")
        for number, turn in enumerate(chat["messages"]):
            if "role" not in turn or not ({"content", "tool_calls"} & turn.keys()):
                text = f"messages[{number}]: no variant of enum MessageBody found in flattened data"
                raise Malformed(422, f"Failed to deserialize the JSON body into the target type: {text}")
        p = self.sampling(chat)
        if chat["presence_penalty"] is not None:
            p["repetition_penalty"] = chat["presence_penalty"] + 2.0
        p["top_n_tokens"], p["grammar"] = chat["top_logprobs"], chat["response_format"]
        return self.model.apply(chat["messages"], chat["tools"]), p

    async def chat(self, request: web.Request) -> web.StreamResponse:
        chat = read(await self.body(request), CHAT)
        inputs, p = self.read_chat(chat)
        if chat["stream"]:
            return await self.sse(request, self.chat_events(chat, inputs, p), openai=True)
        tool = self.called(chat)
        details, last = await self.whole(inputs, p, special=False)
        message: dict[str, Any] = {"role": "assistant", "content": last["text"]}
        if tool:
            function = {"description": None, "name": tool, "arguments": "{}"}
            message = {
                "role": "assistant",
                "tool_calls": [{"id": "0", "type": "function", "function": function}],
            }
        logprobs = None
        if chat["logprobs"]:
            tops = details.get("top_tokens", [[]] * len(details["tokens"]))
            logprobs = {
                "content": [_logprob(it, top) for it, top in zip(details["tokens"], tops, strict=True)]
            }
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": _reason(last)}
        return web.json_response(
            {**self.head("chat.completion", chat["model"]), "choices": [choice], "usage": _usage(last)}
        )

    def called(self, chat: dict[str, Any]) -> str | None:
        """The tool that is called: TGI forces one where it is `required` or named."""
        choice = chat["tool_choice"]
        if not chat["tools"] or choice in (None, "auto", "none"):
            return None
        return str(
            choice["function"]["name"] if isinstance(choice, dict) else chat["tools"][0]["function"]["name"]
        )

    async def chat_events(
        self, chat: dict[str, Any], inputs: str, p: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        head = self.head("chat.completion.chunk", chat["model"])
        tool = self.called(chat)
        async for made in self.tokens(inputs, p, special=False):
            text = "" if made["token"]["special"] else made["token"]["text"]
            delta: dict[str, Any] = {"role": "assistant", "content": text}
            if tool:
                function = {"name": tool if made["count"] == 1 else None, "arguments": text}
                delta = {
                    "role": "assistant",
                    "tool_calls": [{"index": 0, "id": "0", "type": "function", "function": function}],
                }
            logprobs = (
                {"content": [_logprob(made["token"], made["top_tokens"])]} if chat["logprobs"] else None
            )
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": _reason(made)}
            yield {**head, "choices": [choice], "usage": None}
            if made["end"] and chat["stream_options"].get("include_usage"):
                yield {**head, "choices": [], "usage": _usage(made)}

    async def completions(self, request: web.Request) -> web.StreamResponse:
        asked = read(await self.body(request), COMPLETION)
        prompts = [asked["prompt"]] if isinstance(asked["prompt"], str) else asked["prompt"]
        if not (isinstance(prompts, list) and prompts and all(isinstance(it, str) for it in prompts)):
            text = "prompt: data did not match any variant of untagged enum PromptDeserializer"
            raise Malformed(422, f"Failed to deserialize the JSON body into the target type: {text}")
        if asked["suffix"] is not None:
            text = "Suffix is not supported and can be achieved by preprocessing the prompt."
            raise Refused(422, "suffix not supported", text)
        most = self.args["max_client_batch_size"]
        if len(prompts) > most:
            text = f"Number of prompts exceeds the maximum allowed batch size of {most}"
            raise Refused(422, "batch size exceeded", text)
        p = self.sampling(asked) | {"repetition_penalty": asked["repetition_penalty"]}
        head = self.head("text_completion", None)
        if asked["stream"]:
            return await self.sse(request, self.completion_events(head, prompts, p), openai=True)
        made = [last for _, last in await asyncio.gather(*(self.whole(it, p) for it in prompts))]
        choices = [
            {"index": number, "text": it["text"], "logprobs": None, "finish_reason": _reason(it)}
            for number, it in enumerate(made)
        ]
        usage = {name: sum(_usage(it)[name] for it in made) for name in _usage(made[0])}
        return web.json_response({**head, "choices": choices, "usage": usage})

    async def completion_events(
        self, head: dict[str, Any], prompts: list[str], p: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """A token of each prompt in turn. The last of each has its text even where that is the end's mark."""
        streams = dict(enumerate(self.tokens(it, p) for it in prompts))
        try:
            while streams:
                for number, stream in list(streams.items()):
                    made = await anext(stream)
                    reason = made["end"] or ""
                    choice = {
                        "index": number,
                        "text": made["token"]["text"],
                        "logprobs": None,
                        "finish_reason": reason,
                    }
                    yield {**head, "choices": [choice], **({"usage": _usage(made)} if reason else {})}
                    if reason:
                        await streams.pop(number).aclose()  # type: ignore[attr-defined]
        finally:
            for stream in streams.values():
                await stream.aclose()  # type: ignore[attr-defined]


def _reason(made: dict[str, Any]) -> str | None:
    return "stop" if made["end"] == "eos_token" else made["end"]


def _usage(made: dict[str, Any]) -> dict[str, int]:
    prompt, count = made["input_length"], made["count"]
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def _logprob(token: dict[str, Any], top: list[dict[str, Any]]) -> dict[str, Any]:
    tops = [{"token": it["text"], "logprob": it["logprob"]} for it in top]
    return {"token": token["text"], "logprob": token["logprob"], "top_logprobs": tops}


def route(args: Args) -> None:
    """The router process: ready when it listens, and on SIGTERM it finishes what it has."""
    app = Router(args).app()
    host = args["hostname"] if re.fullmatch(r"[\d.]+", args["hostname"]) else "0.0.0.0"  # noqa: S104 (TGI's way)
    web.run_app(
        app, host=host, port=args["port"], handler_cancellation=True, access_log=None, print=None,
        shutdown_timeout=args["graceful_termination_timeout"],
    )  # fmt: skip


def main(argv: list[str]) -> int:
    if argv[:1] == ["router"]:
        route(json.loads(argv[1]))
        return 0
    return launch(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
