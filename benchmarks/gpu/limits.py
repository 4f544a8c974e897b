"""What the device can do, measured in the same run: memory bandwidth, matrix rate, cost of a launch."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.report import Part, seconds


def main(part: Part) -> None:
    device = part.device
    if device.type == "cuda":
        props = torch.cuda.get_device_properties(device)
        major, minor = torch.cuda.get_device_capability(device)
        part.row("device", f"{props.name}, {props.total_memory / 2**30:.0f} GiB, sm_{major}{minor}")
        part.row(
            "torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    # Reads are what decoding is bound by: a sum reads each byte once and writes nothing.
    size = 2**18 if part.tiny else 2**31
    source = torch.ones(size // 4, device=device)
    read = size / seconds(source.sum, device, repeats=1 if part.tiny else 10)
    target = torch.empty_like(source)
    copied = 2 * size / seconds(partial(target.copy_, source), device, repeats=1 if part.tiny else 10)
    part.row("memory read (sum), GB/s", read / 1e9)
    part.row("memory copied, read and written, GB/s", copied / 1e9)
    part.keep("bandwidth", max(read, copied))
    del source, target

    for dtype in dict.fromkeys((part.dtype, torch.float32)):
        rate = 0.0
        for width in (64, 128) if part.tiny else (4096, 8192):
            left = torch.randn(width, width, device=device, dtype=dtype)
            right = torch.randn(width, width, device=device, dtype=dtype)
            took = seconds(partial(torch.matmul, left, right), device, repeats=1 if part.tiny else 10)
            rate = max(rate, 2 * width**3 / took)
        part.row(f"matrix product, {dtype}, TFLOP/s", rate / 1e12)
        if dtype == part.dtype:
            part.keep("rate", rate)

    small = torch.zeros(16, device=device)
    part.row(
        "one launch of a small kernel, microseconds",
        1e6 * seconds(lambda: small.add_(1), device, repeats=1000),
    )
