"""Whether a worker is right on the device: numbers, batches, out of memory, cancelled requests."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import CASES, make, picture, text
from benchmarks.gpu.report import Part

# Relative error of the outputs, by the 8 and 11 bits of the two formats' mantissas. float32 on a GPU adds up
# in another order than on a CPU.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-3}
FREED_BYTES = 64 * 2**20  # a cancelled job may leave so much: workspaces of the libraries


# ---- the model alone -----------------------------------------------------------------------------------


def numbers(part: Part) -> None:
    """The same model, two layers of the real width: float32 on the CPU, and on the device in three dtypes."""
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    case = CASES[part.worker]
    with tempfile.TemporaryDirectory() as name:
        folder = make(
            part.worker, Path(name) / "model", tiny=part.tiny, layers=2, device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
        model_class = getattr(transformers, case.model_class)
        inputs = model_inputs(part.worker, folder)
        expected = forward(model_class.from_pretrained(folder, dtype=torch.float32).eval(), inputs)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if part.device.type == "cuda" and dtype == torch.bfloat16 != part.dtype:
                part.row(f"{dtype}", "left out: this GPU has it by emulation only")
                continue
            model = model_class.from_pretrained(folder, dtype=dtype).to(part.device).eval()
            found = forward(model, inputs)
            error = float((found - expected).norm() / expected.norm())
            cosine = float(torch.cosine_similarity(found, expected, dim=-1).min())
            part.at_most(f"outputs in {dtype}, relative error to the CPU's float32", error, TOLERANCE[dtype])
            part.at_least(f"outputs in {dtype}, smallest cosine", cosine, 1 - TOLERANCE[dtype])


def model_inputs(worker: str, folder: Path) -> dict[str, torch.Tensor]:
    """Two requests as the model takes them, on the CPU."""
    import base64
    import io

    import transformers
    from PIL import Image

    draw = torch.Generator().manual_seed(1)
    if worker == "whisper":
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        sounds = [torch.randn(16_000, generator=draw).numpy() * 0.1 for _ in range(2)]
        features = extractor(
            sounds, sampling_rate=16_000, return_tensors="pt"
        ).input_features  # (2, mels, 3000)
        return {
            "input_features": features,
            "decoder_input_ids": torch.randint(0, 200, (2, 6), generator=draw),
        }
    if worker in ("llava", "florence2"):
        processor = transformers.AutoProcessor.from_pretrained(folder)
        images = [Image.open(io.BytesIO(base64.b64decode(picture(number, 64)))) for number in range(2)]
        prompt = "<image> what is this" if worker == "llava" else "<CAPTION>"
        inputs = dict(processor(text=[prompt] * 2, images=images, return_tensors="pt"))
        if worker == "florence2":
            inputs["decoder_input_ids"] = torch.randint(5, 200, (2, 6), generator=draw)
        return inputs
    vocabulary: int = transformers.AutoConfig.from_pretrained(folder).vocab_size
    ids = torch.randint(5, vocabulary, (2, 64), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the states of an encoder, in float32 on the CPU."""
    moved = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    with torch.inference_mode():
        output = model(**moved)
    found = output.logits if "logits" in output else output.last_hidden_state
    return found.float().cpu()


# ---- the worker ----------------------------------------------------------------------------------------


def batches(part: Part) -> None:
    """Jobs that run together get what each gets alone, in float32."""
    from benchmarks.gpu import jobs

    worker = jobs.load(part, DTYPE="float32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    number = 4 if part.tiny else 16
    values = [request(part, index) for index in range(number)]

    async def both() -> tuple[list[Any], list[Any]]:
        alone = [(await jobs.together(worker, [value]))[1][0] for value in values]
        return alone, (await jobs.together(worker, values))[1]

    alone, together = asyncio.run(both())
    if "embeddings" in alone[0]:
        pairs = [
            torch.tensor([a["embeddings"][0], b["embeddings"][0]])
            for a, b in zip(alone, together, strict=True)
        ]
        cosine = min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)
        part.at_least(f"{number} jobs at once by lone ones, float32, smallest cosine", cosine, 0.9999)
    else:
        same = sum(answer(a) == answer(b) for a, b in zip(alone, together, strict=True)) / number
        part.at_least(f"{number} jobs at once, float32: share of answers equal to a lone job's", same, 1.0)


def answer(output: Any) -> Any:
    return next(output[name] for name in ("response", "raw_output", "text") if name in output)


def request(part: Part, number: int) -> dict[str, Any]:
    """A job of a length of its own, where the requests have texts."""
    value = CASES[part.worker].request(number, part.tiny)
    words = 3 + 5 * (number % 4)
    if "prompt" in value:
        return {**value, "prompt": text(number, words)}
    return {**value, "texts": [text(number, words)]} if "texts" in value else value


def memory(part: Part) -> None:
    """Where memory runs out in a batch, its jobs are answered all the same, and so is the next one."""
    from benchmarks.gpu import jobs

    worker = jobs.load(part)
    number = 8 if part.tiny else 64
    values = [CASES[part.worker].request(index, part.tiny) for index in range(number)]

    async def under_pressure() -> tuple[int, int]:
        if part.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        await jobs.together(worker, values[:1])
        peak = torch.cuda.max_memory_reserved() if part.device.type == "cuda" else 0
        with little_memory(part, peak) as times:
            outputs = await asyncio.gather(*(jobs.ask(worker, value) for value in values))
            failed = times()
        answered = sum(jobs.failure(output) is None for output in outputs)
        await jobs.together(worker, values[:2])
        return answered, failed

    answered, failed = asyncio.run(under_pressure())
    part.row("times that memory ran out", failed, "> 0", failed > 0)
    part.row(f"of {number} jobs while memory ran out, answered", answered, number, answered == number)
    part.row("jobs after it", "answered", "answered", True)


@contextmanager
def little_memory(part: Part, peak: int) -> Iterator[Callable[[], int]]:
    """Memory runs out in large batches: on a GPU by a limit 1/8 above `peak`, what a lone job needs. A CPU
    has no such limit, so there an embedding of more than 6 sequences raises what a GPU raises.

    Gives a function that counts how often memory ran out.
    """
    if part.device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(part.device).total_memory
        before = torch.cuda.memory_stats()["num_ooms"]
        torch.cuda.set_per_process_memory_fraction(min(1.0, peak * 1.125 / total))
        try:
            yield lambda: torch.cuda.memory_stats()["num_ooms"] - before
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    times = 0

    def refuse(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal times
        if isinstance(module, torch.nn.Embedding) and inputs and inputs[0].dim() > 1 and len(inputs[0]) > 6:
            times += 1
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield lambda: times
    finally:
        hook.remove()


def cancelled(part: Part) -> None:
    """Jobs that nobody waits for free their memory; the next job is answered soon."""
    from benchmarks.gpu import jobs

    worker = jobs.load(part)
    value = CASES[part.worker].request(0, part.tiny)
    if "max_tokens" in value:
        value["max_tokens"] = 200 if part.tiny else 2000
    if part.worker == "florence2":
        value["num_beams"] = 1

    async def cancel() -> tuple[int, float]:
        short = {**value, "max_tokens": 2} if "max_tokens" in value else value
        await jobs.together(worker, [short])
        await asyncio.sleep(0.2)
        before = in_use(part.device)
        tasks = [asyncio.create_task(jobs.ask(worker, value)) for _ in range(8)]
        await asyncio.sleep(0.1 if part.tiny else 0.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        begin = time.perf_counter()
        await jobs.together(worker, [short])
        took = time.perf_counter() - begin
        await asyncio.sleep(0.2)
        return in_use(part.device) - before, took

    left, took = asyncio.run(cancel())
    part.at_most("memory that 8 cancelled jobs left, MiB", left / 2**20, FREED_BYTES / 2**20)
    part.at_most("seconds of a short job after them", took, 10.0 if part.tiny else 2.0)


def in_use(device: torch.device) -> int:
    """Bytes of live tensors on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in tensors)
