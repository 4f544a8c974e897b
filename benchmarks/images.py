"""The images that are built here: how large, how much of each is its own, how fast they change and start.

    python -m benchmarks.images [sizes|rebuilds|starts ...] [WORKER ...]

`make build-<worker>` builds them. Beside each its naive Dockerfile: one `pip install` of the same packages,
unpinned, on a base that brings torch. Nine images and their copies fill a disk, and hours: what is not named
keeps the figures that results/images.json has of it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import HERE, ROOT, machine, table, write
from local import Container, running
from tools.images import Layer, Layers, image, layers
from tools.start import image_env, mounts
from tools.workers import worker_names

ROUNDS = 3
SHARE, SECONDS = 0.15, 3.0  # the aims: what a further torch image adds to a host, a rebuild after an edit
PARTS = ("sizes", "rebuilds", "starts")
# What makes an image larger than the aim, where that is known.
WHY = {
    "whisper": "cuBLAS of CUDA 12, 868 MB, which CTranslate2's wheel loads beside torch's of CUDA 13",
    "xtts": "what coqui-tts asks for: a dictionary of Japanese (249 MB), numba's compiler (208 MB), scipy,"
    " scikit-learn, matplotlib and tensorboard",
}


def docker(*arguments: str, text: str = "") -> str:
    command = ["docker", *arguments]
    done = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.strip()


def size(found: Layers) -> int:
    return sum(layer.bytes for layer in found)


def unique(images: Mapping[str, Layers]) -> dict[str, Layers]:
    """For each image the layers that a host with all the others lacks.

    An engine keeps a layer together with those below it, so what two images share is their common beginning.
    """
    chains = {
        name: [tuple(layer.digest for layer in found[: end + 1]) for end in range(len(found))]
        for name, found in images.items()
    }
    result = {}
    for name, found in images.items():
        others = {chain for other, own in chains.items() if other != name for chain in own}
        result[name] = [
            layer for layer, chain in zip(found, chains[name], strict=True) if chain not in others
        ]
    return result


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
COPY workers/{worker} ./
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


def torch_end(found: Layers) -> int | None:
    """Where an image's layers above torch begin; None where it has none of its own."""
    ends = [number for number, layer in enumerate(found, 1) if "/tmp/torch.txt" in layer.made_by]
    return ends[0] if ends else None


def added(worker: str, images: dict[str, Layers]) -> int | None:
    """Bytes that an image adds to a host with one other torch image, the one it has least in common with."""
    others = [name for name in images if name != worker and torch_end(images[name])]
    if not others or not torch_end(images[worker]):
        return None
    pairs = [{worker: images[worker], other: images[other]} for other in others]
    return max(size(unique(pair)[worker]) for pair in pairs)


def ended(made_by: str) -> str:
    """The end of a layer's instruction, which tells them apart; a base that was imported has none."""
    words = " ".join(made_by.removesuffix("# buildkit").split())
    return words[-60:].replace("|", " ") or "the base"


def report(found: dict[str, dict[str, Any]], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    images = {worker: [Layer(*layer) for layer in its["layers"]] for worker, its in found.items()}
    own = unique(images)
    goals, rows = [], []
    for worker, its in found.items():
        whole, further = size(images[worker]), added(worker, images)
        if further is not None:
            share = further / whole
            goals.append((f"{worker}: added to another torch image's, part of its size", share, SHARE))
        if its.get("rebuilds"):
            seconds = statistics.median(its["rebuilds"])
            goals.append((f"{worker}: rebuild after an edit of the handler, s", seconds, SECONDS))
        rows.append(
            (
                worker,
                whole / 1e6,
                "" if further is None else further / 1e6,
                size(own[worker]) / 1e6,
                its["naive"] / 1e6 if its.get("naive") else "",
                statistics.median(its["starts"]) if its.get("starts") else "",
            )
        )
    why = "\n".join(
        f"- {worker}, added: {WHY[worker]}."
        for worker in WHY
        if worker in found and (added(worker, images) or 0) >= SHARE * size(images[worker])
    )
    parts = [
        (worker, ended(layer.made_by), layer.bytes / 1e6)
        for worker, its in images.items()
        for layer in its
        if layer.bytes > 1e6
    ]
    reached = [(*goal[:2], f"< {goal[2]:g}", "yes" if goal[1] < goal[2] else "**no**") for goal in goals]
    text = f"""# Images

Built by `make build-<worker>` on this machine, CUDA's libraries included, and started on its CPU with the
models of `make run-<worker>`. Sizes are unpacked, in MB, as Docker's history gives them. Written by
`python -m benchmarks images`; of {ROUNDS} rounds the median.

{table(["", "measured", "aim", "reached"], reached)}

{table(["", "size", "added", "unique", "naive, added", "start, s"], rows)}

- added: what a host pulls and keeps besides, if it has one other image with our torch: the one that has the
  least in common with it.
- unique: the same, if it has all the other images of the table.
- naive, added: the layers that the naive Dockerfile puts on its base: the same packages, unpinned. That base,
  runpod/pytorch with CUDA's development files, could not be pulled: its size is not here, and our torch layer
  stood in for it.
- start: from `docker run` to the first request for a job.
{why}

{table(["layers over 1 MB", "instruction", "MB"], parts)}

{table(["machine", ""], list(where.items()))}

Not measured: a pull on RunPod's hosts, a start on a GPU.
"""
    numbers = {
        "machine": where,
        "images": found,
        "goals": [
            {"what": what, "measured": value, "aim": aim, "reached": value < aim}
            for what, value, aim in goals
        ],
    }
    return text, numbers


def main(parts: Sequence[str] = PARTS, workers: Sequence[str] = ()) -> None:
    if not shutil.which("docker"):
        print("images: skipped, docker is not installed")
        return
    built = {worker: its for worker in worker_names() if (its := layers(image(worker))) is not None}
    measured = [worker for worker in built if not workers or worker in workers]
    if not measured:
        print("images: skipped, none is built; make build builds them")
        return
    where = machine("runpod") | {
        "docker": docker("version", "--format", "{{.Server.Version}}"),
        "base": os.environ.get("BASE_IMAGE") or "that of docker-bake.hcl",
    }
    before = HERE / "results" / "images.json"
    found: dict[str, dict[str, Any]] = json.loads(before.read_text())["images"] if before.exists() else {}
    for worker in measured:
        print(worker, flush=True)
        figures = found.setdefault(worker, {})
        figures["layers"] = [[layer.digest, layer.bytes, layer.made_by] for layer in built[worker]]
        if "sizes" in parts:
            figures["naive"] = naive(worker)
        if "rebuilds" in parts:
            figures["rebuilds"] = rebuild(worker)
        if "starts" in parts:
            figures["starts"], figures["phases"] = start(worker)
    write("images", *report(dict(sorted(found.items())), where))


if __name__ == "__main__":
    named = sys.argv[1:]
    if unknown := set(named) - {*PARTS, *worker_names()}:
        sys.exit(f"Neither a part ({', '.join(PARTS)}) nor a worker: {', '.join(sorted(unknown))}")
    main([part for part in PARTS if part in named] or PARTS, [name for name in named if name not in PARTS])
