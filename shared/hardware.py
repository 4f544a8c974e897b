"""Which device and which number format to run a model in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.errors import StartError
from shared.settings import WorkerSettings

if TYPE_CHECKING:
    import torch


def pick_device(settings: WorkerSettings) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for the hardware found: bfloat16 where the GPU has it, float16 else, float32 on CPU.

    Raises StartError(code="no_gpu") when DEVICE asks for a GPU that is not there.
    """
    import torch

    name = settings.device
    found = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if found else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise StartError(
            f"DEVICE={settings.device}: {found} GPUs found. Use an endpoint with a GPU, or DEVICE=cpu.",
            code="no_gpu",
        )
    if settings.dtype != "auto":
        return device, getattr(torch, settings.dtype)
    if device.type == "cpu":
        return device, torch.float32
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if bf16 else torch.float16


def cpu_lanes(device: torch.device) -> int:
    """How many batches to run at a time: on CPU one for each of torch's threads, on a GPU one.

    Threads that share a batch wait for each other after every operation, and for whoever else has a core
    meanwhile: two batches on a thread each were 1.05 times as fast as one after the other on two, on an
    otherwise idle machine, and more beside a busy event loop (benchmarks/results/embeddings.md).
    """
    import torch

    return torch.get_num_threads() if device.type == "cpu" else 1


def share_cores(lanes: int, running: int) -> None:
    """Give the calling thread its share of the cores: all, while its batch is the only one of `running`."""
    if lanes > 1:
        import torch

        torch.set_num_threads(max(1, lanes // max(1, running)))
