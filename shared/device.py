"""Which device and number format a model runs in, and how a GPU fails."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shared.errors import StartError

if TYPE_CHECKING:
    import torch


def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Device and dtype for the hardware found: bfloat16 where the GPU has it, float16 else, float32 on CPU.

    Raises StartError(code="no_gpu") when DEVICE asks for a GPU that is not there.
    """
    import torch

    gpus = torch.cuda.device_count()
    chosen = torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise StartError(
            f"DEVICE={device}: {gpus} GPUs found. Use an endpoint with a GPU, or DEVICE=cpu.", code="no_gpu"
        )
    if dtype != "auto":
        return chosen, getattr(torch, dtype)
    if chosen.type == "cpu":
        return chosen, torch.float32
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return chosen, torch.bfloat16 if bf16 else torch.float16


def parallel_batches(device: torch.device) -> int:
    """How many batches to run at a time: on CPU one for each of torch's threads, on a GPU one.

    Threads that share a batch wait for each other after every operation, and for whoever else has a core
    meanwhile: two batches on a thread each were 1.05 times as fast as one after the other on two, on an
    otherwise idle machine, and more beside a busy event loop (benchmarks/results/embeddings.md).
    """
    import torch

    return torch.get_num_threads() if device.type == "cpu" else 1


def share_cores(batches: int, running: int) -> None:
    """Give the calling thread its share of torch's threads.

    batches: the most batches that run at a time. running: how many do; a lone one gets all threads.
    """
    if batches > 1:
        import torch

        torch.set_num_threads(max(1, batches // max(1, running)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the GPU, or this process, has no memory left."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    marks = ("DefaultCPUAllocator: can't allocate memory", "CUDA failed with error out of memory")
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in marks)


def is_cuda_broken(error: BaseException) -> bool:
    """Whether `error`, torch's or CTranslate2's, is one of CUDA after which every other call fails too."""
    marks = ("CUDA error", "CUDA failed with error")
    return any(mark in str(error) for mark in marks) and not is_out_of_memory(error)


def empty_cache() -> None:
    """Give the GPU memory that torch holds without using it back to the driver."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
