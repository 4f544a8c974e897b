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
