"""The device and dtype that a model runs with, the CPU's threads, and the errors of a GPU."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shared.errors import StartError

if TYPE_CHECKING:
    import torch


def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device and dtype for the settings DEVICE and DTYPE.

    auto: the GPU if there is one; bfloat16 if the GPU supports it natively, else float16; float32 on CPU.
    Raises StartError(code="no_gpu") for a GPU that does not exist.
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
    """How many batches to run at a time: one for each of torch's threads on CPU, one on a GPU.

    Threads that share a batch synchronise after every operation, and one that lost its core delays all. Two
    batches on one thread each were 1.05 times as fast as one after the other on two threads, on an otherwise
    idle machine, and more beside a busy event loop (benchmarks/results/embeddings.md).
    """
    import torch

    return torch.get_num_threads() if device.type == "cpu" else 1


def share_cores(batches: int, running: int) -> None:
    """Set how many threads torch uses for operations of the calling thread.

    batches: `parallel_batches`, which is also the number of threads to share. running: the batches that run
    at this moment; a single one gets all threads.
    """
    if batches > 1:
        import torch

        torch.set_num_threads(max(1, batches // max(1, running)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` reports that the GPU or the process is out of memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    marks = ("DefaultCPUAllocator: can't allocate memory", "CUDA failed with error out of memory")
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in marks)


def is_cuda_broken(error: BaseException) -> bool:
    """Whether `error`, of torch or CTranslate2, is a CUDA error after which every later call fails."""
    marks = ("CUDA error", "CUDA failed with error")
    return any(mark in str(error) for mark in marks) and not is_out_of_memory(error)


def empty_cache() -> None:
    """Return the GPU memory that torch caches and does not use to the driver."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
