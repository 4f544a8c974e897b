"""`python -m benchmarks.gpu [WORKER ...] [--minutes N] [--cpu]`: the check of workers on a GPU.

Each part is a process of its own, in a group of its own, that is killed at its limit: a kernel that hangs, a
CUDA context that is broken and memory that is full cost that part only. What it has written stays.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.md"
WORKERS = ("huggingface", "sentence-transformers", "bge", "whisper", "florence2", "llava")


@dataclass(frozen=True)
class Step:
    """A part of the check. function: module and function of this package. limit_s: seconds."""

    title: str
    function: str
    limit_s: float
    workers: Sequence[str] = WORKERS


# In the order in which they are run for each worker. The first makes its model.
STEPS = (
    Step("model", "models.main", 120),
    Step("right: numbers", "right.numbers", 90),
    Step("right: batches", "right.batches", 120),
    Step("right: out of memory", "right.memory", 90),
    Step("right: cancelled jobs", "right.cancelled", 90),
    Step("fast: handler", "fast.engine", 180),
    Step("fast: naive handler", "fast.naive", 90),
    Step("fast: HTTP mode", "fast.http", 180),
    Step("fast: where the time goes", "fast.profile", 120),
    Step("decided: decode step", "decide.decoding", 180, ("huggingface",)),
    Step("decided: continuous batching", "decide.batching", 180, ("huggingface",)),
    Step("decided: engine of whisper", "decide.whisper_engines", 180, ("whisper",)),
    Step("decided: attention", "decide.attention", 90),
)
HEAD = "| | measured | aim | reached |\n| --- | --- | --- | --- |\n"
LEAST_S = 5.0  # a part with less time than this does not start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "workers", nargs="*", metavar="WORKER", help=f"of {', '.join(WORKERS)}; all where none is named"
    )
    parser.add_argument("--minutes", type=float, default=10, help="in all (10)")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes, to see that the check runs")
    parser.add_argument(
        "--model", type=Path, help="a folder with a model of the one worker named, in place of random weights"
    )
    parser.add_argument("--only", default="", help="parts whose title starts so, such as 'fast'")
    parser.add_argument("--report", type=Path, default=RESULTS, help="the file that is written")
    parser.add_argument(
        "--child", nargs=4, metavar=("FUNCTION", "WORKER", "FOLDER", "FACTS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.child:
        run_part(options)
        return
    if unknown := set(options.workers) - set(WORKERS):
        parser.error(f"no check for {', '.join(sorted(unknown))}; there are {', '.join(WORKERS)}")
    if options.model and (len(options.workers) != 1 or not options.model.is_dir()):
        parser.error("--model (MODEL_NAME) is a folder with a model, and goes with one worker")
    if not options.cpu and not has_gpu():
        sys.exit("No NVIDIA GPU that torch can use here. --cpu runs the check on tiny shapes.")
    check(options)


def has_gpu() -> bool:
    """Whether torch sees a GPU, asked in a process of its own: this one stays without a CUDA context."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def check(options: argparse.Namespace) -> None:
    workers = options.workers or list(WORKERS)
    end = time.monotonic() + 60 * options.minutes
    options.report.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    shapes = "The model of MODEL_NAME." if options.model else "Random weights of real shapes."
    if options.cpu:
        shapes = "Tiny shapes on the CPU: these figures say nothing but that the check runs."
    options.report.write_text(f"# On a GPU\n\n{now}. {shapes}\nWritten by `make check-gpu`, part by part.\n")
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as name:
        work = Path(name)
        start(options, Step("The device", "limits.main", 60), workers[0], work, 60.0)
        for index, worker in enumerate(workers):
            # What one worker leaves of its share, the later ones have.
            until = time.monotonic() + (end - time.monotonic()) / (len(workers) - index)
            for step in STEPS:
                if worker not in step.workers or not step.title.startswith((options.only, "model")):
                    continue
                left = until - time.monotonic()
                ended = start(options, step, worker, work, min(step.limit_s, left))
                if step.title == "model" and not ended:
                    break
            subprocess.run(["rm", "-rf", str(work / worker)], check=False)
    print(f"Written to {options.report}")


def start(options: argparse.Namespace, step: Step, worker: str, work: Path, limit_s: float) -> bool:
    """Run a part in a process of its own and append how it ended; whether it ended well."""
    title = step.title if step.function == "limits.main" else f"{worker}, {step.title}"
    append(options.report, f"\n## {title}\n\n{HEAD}")
    print(f"{title} (at most {max(0.0, limit_s):.0f} s)", flush=True)
    if limit_s < LEAST_S:
        append(options.report, "| left out | the time is over | | |\n")
        return False
    folder = options.model.resolve() if options.model else work / worker
    command = [sys.executable, "-m", "benchmarks.gpu", "--report", str(options.report.resolve())]
    command += ["--cpu"] if options.cpu else []
    command += ["--child", step.function, worker, str(folder), str(work / "facts.json")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if options.cpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    with (work / "stderr").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # What the part has started goes too, when it ended well as well.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = log.read().strip().splitlines()
    took = time.monotonic() - begin
    if status != 0:
        cause = f"killed at its limit of {limit_s:.0f} s" if status is None else cause_of(lines, status)
        append(options.report, f"| **did not end well** | {cause} | | |\n")
        print("\n".join(lines[-15:]), file=sys.stderr)
    append(options.report, f"\n{took:.0f} s.\n")
    return status == 0


def cause_of(lines: Sequence[str], status: int) -> str:
    """The last line of a traceback, or a missing package by its name."""
    last = next((line for line in reversed(lines) if line.strip()), "it wrote nothing")
    last = last.replace("|", "/")[:300]
    if "No module named" in last:
        return f"left out: needs {last.rpartition(' ')[2]}"
    return f"status {status}: {last}"


def append(report: Path, text: str) -> None:
    with report.open("a") as file:
        file.write(text)


def run_part(options: argparse.Namespace) -> None:
    """The child: one part."""
    from benchmarks.gpu.report import Part

    function, worker, folder, facts = options.child
    module, name = function.split(".")
    part = Part(worker, Path(folder), options.cpu, options.report, Path(facts))
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(part)


if __name__ == "__main__":
    main()
