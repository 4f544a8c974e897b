"""Which way is faster on this device: continuous batching, whisper's engines, attention, decode steps."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.models import CASES, text, weights
from benchmarks.gpu.report import Part, seconds, synchronize


def load_model(part: Part, **options: Any) -> Any:
    import transformers

    model_class = getattr(transformers, CASES[part.worker].model_class)
    return model_class.from_pretrained(part.folder, dtype=part.dtype, **options).to(part.device).eval()


def batching(part: Part) -> None:
    """serving/continuous_batching beside transformers' ContinuousBatchingManager."""
    from transformers import AutoTokenizer
    from transformers.generation import ContinuousBatchingConfig

    from benchmarks.bare.huggingface import continuous, engine

    tokenizer = AutoTokenizer.from_pretrained(part.folder)
    tokens = 4 if part.tiny else 128
    prompts = [tokenizer(text(number, 8 if part.tiny else 60))["input_ids"] for number in range(64)]
    counts = (1, 2) if part.tiny else (1, 8, 32, 64)
    # The manager sizes its cache by the free memory of a GPU; a CPU's it cannot see.
    sizes: dict[str, Any] = {"max_memory_percent": 0.5}
    if part.tiny:
        sizes = {"num_blocks": 64, "page_size": 16, "max_batch_tokens": 128}

    def measure(label: str, opened: Callable[[Any], Any]) -> None:
        model = load_model(part, attn_implementation="sdpa")
        model.generation_config.eos_token_id = None
        with opened(model) as runs:
            for count in counts:
                asked = [(prompt, tokens) for prompt in prompts[:count]]
                if not part.tiny:
                    runs.run(asked, 0)
                took, _, made = runs.run(asked, 0)
                part.row(f"{label}: {count} prompts at once, tokens/s", sum(map(len, made)) / took)
            mixed = [
                (prompt, 2 + 3 * (number % 40))
                for number, prompt in enumerate(prompts[: 4 if part.tiny else 64])
            ]
            part.row(
                f"{label}: mean latency of arrivals 10 ms apart, s", statistics.mean(runs.run(mixed, 0.01)[1])
            )

    ours = "serving/continuous_batching"
    part.attempt(ours, lambda: measure(ours, lambda model: engine(model, tokenizer, max_batch_size=64)))
    for graphs in (False,) if part.tiny else (False, True):
        label = f"ContinuousBatchingManager, CUDA graphs {'on' if graphs else 'off'}"
        settings = ContinuousBatchingConfig(use_cuda_graph=graphs, **sizes)
        part.attempt(label, lambda label=label, settings=settings: measure(  # type: ignore[misc]
            label, lambda model: continuous(model, tokens, settings)))  # fmt: skip


def whisper_engines(part: Part) -> None:
    """CTranslate2 in place of transformers; the rows of the part `engine` have the latter."""
    from benchmarks.gpu import fast

    for package in ("ctranslate2", "faster_whisper"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
    fast.engine(part, label="faster-whisper: ", ENGINE="faster-whisper")
    for number in fast.TINY_SIZES if part.tiny else fast.SIZES:
        ours, other = part.known(f"whisper {number}"), part.known(f"whisper faster-whisper: {number}")
        if ours and other:
            part.row(f"{number} jobs at once, faster-whisper by transformers", other / ours)


def attention(part: Part) -> None:
    """One forward pass of 8 requests with each attention implementation, and each kernel of sdpa."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.gpu.right import model_inputs

    inputs = {
        name: torch.cat([value] * 4).to(part.device)
        for name, value in model_inputs(part.worker, part.folder).items()
    }
    inputs = {n: v.to(part.dtype) if v.is_floating_point() else v for n, v in inputs.items()}

    def measure(label: str, implementation: str, backend: Any = None) -> None:
        model = load_model(part, attn_implementation=implementation)

        def run() -> None:
            with torch.inference_mode():
                model(**inputs)

        if backend is None:
            took = seconds(run, part.device, repeats=1 if part.tiny else 5)
        else:
            with sdpa_kernel(backend):
                took = seconds(run, part.device, repeats=1 if part.tiny else 5)
        part.row(f"{label}, ms", 1000 * took)

    ways: list[tuple[str, str, Any]] = [("eager", "eager", None), ("sdpa, torch's choice", "sdpa", None)]
    names = ("MATH",) if part.tiny else ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    ways += [(f"sdpa, {name}", "sdpa", getattr(SDPBackend, name)) for name in names]
    if importlib.util.find_spec("flash_attn"):
        ways.append(("flash_attention_2", "flash_attention_2", None))
    else:
        part.row("flash_attention_2", "left out: needs flash_attn")
    for label, implementation, backend in ways:
        part.attempt(label, lambda way=(label, implementation, backend): measure(*way))  # type: ignore[misc]


def decoding(part: Part) -> None:
    """One decode step: as now, with a static cache, as a CUDA graph, and by torch.compile."""
    model = load_model(part)
    bandwidth = part.known("bandwidth")
    least = weights(part.folder, ".")[1] / bandwidth if bandwidth else None

    def measure(label: str, prepare: Callable[[], Callable[[], Any]]) -> None:
        begin = time.perf_counter()
        with torch.no_grad():
            step = prepare()
            step()
            synchronize(part.device)
            part.row(f"{label}: seconds to prepare", time.perf_counter() - begin)
            took = seconds(step, part.device, repeats=2 if part.tiny else 20)
        part.row(f"{label}: ms a step", 1000 * took)
        if least:
            part.row(f"{label}: share of the bandwidth limit", least / took)

    for batch in (2,) if part.tiny else (1, 8, 64):
        for name, steps in (
            ("as now", growing),
            ("static cache", static),
            ("torch.compile", compiled),
            ("CUDA graph", graphed),
        ):
            if part.device.type == "cpu" and steps is graphed:
                continue
            label = f"{batch} sequences, {name}"
            part.attempt(label, lambda args=(label, steps, batch): measure(  # type: ignore[misc]
                args[0], lambda: args[1](model, args[2])))  # fmt: skip


PROMPT, CAPACITY = 64, 512  # tokens; a step beyond the capacity of a static cache would end the process


def growing(model: Any, batch: int) -> Callable[[], Any]:
    """The step of serving/continuous_batching: cache and mask grow."""
    from serving.continuous_batching.kv_cache import preallocated_cache

    cache = preallocated_cache(model)
    ids = torch.ones(batch, PROMPT, dtype=torch.long, device=model.device)
    mask = torch.ones_like(ids)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> Any:
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        output = model(
            input_ids=ids[:, :1], attention_mask=mask, position_ids=mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return output.logits[:, -1].argmax(-1).tolist()

    return step


def _static(model: Any, batch: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A static cache with a prompt, the next tokens (batch, 1) and their positions (batch, 1)."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    ids = torch.ones(batch, PROMPT, dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, ids[:, :1].clone(), torch.full((batch, 1), PROMPT, device=model.device)


def static(model: Any, batch: int, forward: Callable[..., Any] | None = None) -> Callable[[], Any]:
    cache, ids, positions = _static(model, batch)
    run = forward or model

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        output = run(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        positions.add_(1)
        return output.logits[:, -1].argmax(-1).tolist()

    return step


def compiled(model: Any, batch: int) -> Callable[[], Any]:
    """torch.compile with CUDA graphs; on a CPU its tracer alone, which needs no compiler."""
    options: dict[str, Any] = (
        {"backend": "eager"} if model.device.type == "cpu" else {"mode": "reduce-overhead"}
    )
    torch._dynamo.reset()
    step = static(model, batch, torch.compile(model.forward, dynamic=False, **options))
    step()
    step()  # the second call records the graph
    return step


def graphed(model: Any, batch: int) -> Callable[[], Any]:
    """The whole step in one CUDA graph, its tensors updated in place."""
    cache, ids, positions = _static(model, batch)

    def forward() -> torch.Tensor:
        output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        positions.add_(1)
        found: torch.Tensor = output.logits[:, -1].argmax(-1)
        return found

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = forward()

    def step() -> Any:
        graph.replay()
        return tokens.tolist()

    return step
