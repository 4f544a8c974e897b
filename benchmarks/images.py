"""The images that are built here: how large, how much of each is its own, how fast they change and start.

`make build-<worker>` builds them. Beside each its naive Dockerfile: one `pip install` of the same packages,
unpinned, on a base that brings torch.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, machine, table, write
from local import Container, running
from tools.images import Layers, image, layers, unique
from tools.start import image_env, mounts
from tools.workers import worker_names

ROUNDS = 3
SHARE, SECONDS = 0.15, 3.0  # the aims: unique bytes of a further torch image, a rebuild after an edit


def docker(*arguments: str, text: str = "") -> str:
    command = ["docker", *arguments]
    done = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.strip()


def size(found: Layers) -> int:
    return sum(layer.bytes for layer in found)


def rebuild(worker: str) -> list[float]:
    """Seconds that `make build-<worker>` takes after an edit of the handler, in each round."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"), ignore_dangling_symlinks=True
        )
        shutil.copy2(ROOT / ".dockerignore", copy)
        for number in range(ROUNDS + 1):  # the first makes what is below the handler
            with (copy / "workers" / worker / "handler.py").open("a") as handler:
                handler.write(f"# {time.time_ns()}\n")
            begin = time.monotonic()
            subprocess.run(
                ["make", f"build-{worker}"],
                cwd=copy,
                env=os.environ | {"REGISTRY": "localhost/benchmark"},
                check=True,
                capture_output=True,
            )
            if number:
                seconds.append(time.monotonic() - begin)
    docker("image", "rm", "--force", f"localhost/benchmark/worker-{worker}:dev")
    return seconds


def start(worker: str) -> tuple[list[float], dict[str, float]]:
    """Seconds from `docker run` to the first request for a job, in each round, and the phases of the last."""
    seconds = []
    env = image_env(worker)
    container = Container(image(worker), mounts(env))
    for number in range(ROUNDS + 1):  # the first reads the layers from the disk
        with running(worker, container=container, env=env, ready_timeout=600) as platform:
            (process,) = platform.workers
            assert process.ready_after is not None
            if number:
                seconds.append(process.ready_after)
    return seconds, process.phases


def naive(worker: str) -> int | None:
    """Bytes of the layers that the naive Dockerfile adds to its base; None where the worker has no torch.

    Its base, runpod/pytorch, is not counted and takes no part: torch is that of our images.
    """
    dockerfile = (ROOT / "workers" / worker / "Dockerfile").read_text()
    head, mark, rest = dockerfile.partition("source=workers/torch.txt")
    if not mark:
        return None
    lower = head + mark + rest.partition("\n\n")[0]
    lines = (ROOT / "workers" / worker / "requirements.in").read_text().splitlines()
    packages = ["runpod", *(line.split("#")[0] for line in lines if not line.startswith(("-", "#")))]
    names = " ".join(f"'{package.strip()}'" for package in packages if package.strip())
    text = f"""{lower}

WORKDIR /app
RUN pip install --no-cache-dir {names}
COPY workers/{worker}/handler.py ./
"""
    name = f"localhost/benchmark/naive-{worker}:dev"
    options = ["--load", "--provenance=false", f"--tag={name}", "--file=-", "."]
    if os.environ.get("NETWORK"):
        options.insert(0, f"--network={os.environ['NETWORK']}")
    if os.environ.get("BASE_IMAGE"):
        options.insert(0, f"--build-arg=BASE_IMAGE={os.environ['BASE_IMAGE']}")
    docker("buildx", "build", *options, text=text)
    found = layers(name)
    assert found is not None
    torch = next(number for number, layer in enumerate(found) if "/tmp/torch.txt" in layer.made_by)
    docker("image", "rm", "--force", name)
    return size(found[torch + 1 :])


def report(found: dict[str, dict[str, Any]], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    goals = []
    for worker, its in found.items():
        if its["shares"]:
            share = its["unique"] / its["size"]
            goals.append((f"{worker}: unique bytes, part of its size", share, f"< {SHARE}", share < SHARE))
        again = statistics.median(its["rebuild"])
        goals.append(
            (f"{worker}: rebuild after an edit of the handler, s", again, f"< {SECONDS:g}", again < SECONDS)
        )
    rows = [
        (
            worker,
            its["size"] / 1e6,
            its["unique"] / 1e6,
            its["above_torch"] / 1e6 if its["naive"] else "",
            its["naive"] / 1e6 if its["naive"] else "",
            statistics.median(its["start"]),
        )
        for worker, its in found.items()
    ]
    parts = [
        (worker, layer.made_by[:60].replace("|", " "), layer.bytes / 1e6)
        for worker, its in found.items()
        for layer in its["layers"]
        if layer.bytes > 1e6
    ]
    base = os.environ.get("BASE_IMAGE") or "that of docker-bake.hcl"
    text = f"""# Images

Built by `make build-<worker>` on this machine, CUDA's libraries included, and started on its CPU with the
models of `make run-<worker>`. Base: {base}. Sizes are unpacked, in MB, as Docker's history gives
them. Written by `python -m benchmarks images`; of {ROUNDS} rounds the median.

{table(["", "measured", "aim", "reached"], [(*goal[:3], "yes" if goal[3] else "**no**") for goal in goals])}

{table(["", "size", "unique", "above torch", "naive, above torch", "start, s"], rows)}

- unique: what a host pulls and keeps besides, if it has the other images of the table.
- above torch: our layers but base and torch. naive, above torch: what the naive Dockerfile adds to a base
  that has this torch, with the same packages, unpinned. Its own base, runpod/pytorch with CUDA's development
  files, could not be pulled, so its size is not here.
- start: from `docker run` to the first request for a job.

{table(["layers over 1 MB", "instruction", "MB"], parts)}

{table(["machine", ""], list(where.items()))}

Not measured: a pull on RunPod's hosts, a start on a GPU.
"""
    numbers = {
        "machine": where,
        "base": base,
        "images": {
            worker: {**its, "layers": [[layer.digest, layer.bytes, layer.made_by] for layer in its["layers"]]}
            for worker, its in found.items()
        },
        "goals": [
            {"what": what, "measured": value, "aim": aim, "reached": reached}
            for what, value, aim, reached in goals
        ],
    }
    return text, numbers


def main() -> None:
    if not shutil.which("docker"):
        print("images: skipped, docker is not installed")
        return
    built = {worker: its for worker in worker_names() if (its := layers(image(worker))) is not None}
    if not built:
        print("images: skipped, none is built; make build builds them")
        return
    where = machine("runpod") | {"docker": docker("version", "--format", "{{.Server.Version}}")}
    own = unique(built)
    found: dict[str, dict[str, Any]] = {}
    for worker, its in built.items():
        print(worker, flush=True)
        torch = [number for number, layer in enumerate(its) if "/tmp/torch.txt" in layer.made_by]
        seconds, phases = start(worker)
        found[worker] = {
            "size": size(its),
            "unique": size(own[worker]),
            "shares": own[worker] != its,
            "above_torch": size(its[torch[0] + 1 :]) if torch else None,
            "naive": naive(worker),
            "rebuild": rebuild(worker),
            "start": seconds,
            "phases": phases,
            "layers": its,
        }
    write("images", *report(found, where))


if __name__ == "__main__":
    main()
