"""workers/vllm beside the naive handler and beside its own engine, asked without it: what the hop costs.

Everything is in one run, with the real vLLM on the CPU and random Llamas: one whose tokens take about as long
as a large model's on a GPU, and one of half a million parameters, whose tokens take less than any real
model's anywhere: the shorter its steps, the more weighs what the worker adds to them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import servers
from benchmarks.harness import machine, table, write
from benchmarks.servers import TOKENS
from tools.models import local_env, made, tiny_causal, vllm_cpu

ENV = {
    # Processes that wait for each other's threads measure what else runs on the machine.
    "OMP_NUM_THREADS": "1",
    # As on one GPU: the model in the engine's own process. On a CPU vLLM starts another one, and the two wait
    # for each other in busy loops, which leave nothing of two cores to whoever reads a stream.
    "DISTRIBUTED_EXECUTOR_BACKEND": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}


def make_paced(folder: Path) -> None:
    tiny_causal.make(folder, hidden=512, layers=6)


def asked(prompt: str, tokens: int, stream: bool) -> dict[str, Any]:
    more = {"stream": True} if stream else {}
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more}


VLLM = servers.Kind(
    "vllm",
    job=asked,
    direct=lambda *order: ("/v1/completions", asked(*order)),
    event=b"data: {",
    token=re.compile(r'\\"text\\":'),
)


def measure() -> dict[str, Any]:
    prompts = servers.prompts()
    crowd = [asked(prompt, TOKENS, False) for prompt in prompts]
    tiny = {**local_env("vllm"), **ENV}
    paced = {**tiny, "MODEL_NAME": str(made("benchmark-vllm", make_paced))}
    naive = {
        "SDK_PACKAGES": str(Path(aiohttp.__file__).parents[1]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    found: dict[str, Any] = {}
    for name, env in (("paced", paced), ("tiny", tiny)):
        print(f"  this worker, {name} model", flush=True)
        found[name] = servers.measure(VLLM, env, prompts)
    print("  naive, paced model", flush=True)
    found["paced"]["naive burst"] = servers.measure_naive(
        "vllm_offline.py", {**paced, **naive}, crowd, python=str(vllm_cpu.PYTHON)
    )
    print("  no-op handler", flush=True)
    found["no-op burst"] = servers.measure_noop(crowd)
    return found


def report(found: dict[str, Any], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    paced, tiny = found["paced"], found["tiny"]
    aims = {"paced": servers.goals(paced), "tiny": servers.goals(tiny)}
    text = f"""# vllm

vLLM on the CPU with random Llamas in float32, greedy, one thread, the model in the engine's own process as on
one GPU.

{servers.HOW}
Written by `python -m benchmarks vllm`.

## {1000 * paced["token"]:.0f} ms a token

A model of 19 million parameters, whose tokens take as long here as those of the quicker models that GPUs
are rented for: 7 thousand million parameters in bfloat16 are 15 GB, read once for each token, in 8 ms at the
2 TB/s of an A100, in 50 ms at the 0.3 TB/s of an L4. What a worker adds is to be seen beside that.

{servers.goal_table(aims["paced"])}

{servers.time_table(paced)}

## {1000 * tiny["token"]:.1f} ms a token

Half a million parameters, the hardest case: no model of use is as fast, and a single post of
{1000 * servers.POST_S:.0f} ms is {servers.POST_S / tiny["bare one stream"]["last"]:.0%} of a stream.
{servers.noop_line(found["no-op burst"])}

{servers.goal_table(aims["tiny"])}

{servers.time_table(tiny)}

{table(["machine", ""], list(where.items()))}

Not measured: a GPU, for want of one.
"""
    return text, {"machine": where, **found, "goals": aims}


def versions() -> dict[str, str]:
    """Of the engine's environment, which is not this one."""
    script = "import importlib.metadata as m; print(m.version('vllm-cpu'), m.version('torch'))"
    shown = subprocess.run(
        [str(vllm_cpu.PYTHON), "-c", script], capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(("vllm-cpu", "torch"), shown.split(), strict=True))


def main() -> None:
    if reason := vllm_cpu.missing():
        sys.exit(f"No vLLM on this machine: {reason}.")
    where = {**machine("runpod", "aiohttp"), **versions()}
    write("vllm", *report(measure(), where))


if __name__ == "__main__":
    main()
