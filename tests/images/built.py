"""The images themselves, built and run: `make test-images`. `make test` does not collect this file.

It needs Docker with buildx, and takes minutes for each image. IMAGES names the workers (all), BASE_IMAGE
another Python base, NETWORK=host the network for builds; BUILT=1 takes images that are built. The models are
those of `make run-<worker>`, mounted or baked in, on the CPU.

vllm's own base has an engine for CUDA, which starts on no CPU. Here its Dockerfile builds on a stand-in: the
Python base with the same version of the real vLLM for CPUs, and what else the Dockerfile relies on. TGI's has
tools/stand_ins/tgi.py in the place of the launcher.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from local import Container, Platform, Rules, WorkerProcess, running
from tests.helpers import wait_until
from tests.hub import Hub
from tools.bake import kept
from tools.images import Layer, layers
from tools.models import vllm_cpu
from tools.start import image_env, mounts
from tools.workers import ROOT, worker_names

WORKERS = os.environ.get("IMAGES", "").split() or worker_names()
RULES = Rules(restart_delay=0.1, grace=600)
READY = 600.0  # seconds; a layer that was just built is read from the disk for the first time
KEY = {"Authorization": "Bearer any"}


def missing() -> str | None:
    """What keeps images from being built here."""
    if not shutil.which("docker"):
        return "docker is not installed"
    for command in (["docker", "info"], ["docker", "buildx", "version"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or "ERROR" in done.stderr:
            return f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}"
    return None


if reason := missing():
    pytest.skip(f"Images are not tested: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
each_worker = pytest.mark.parametrize("worker", WORKERS)


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def with_containerd() -> bool:
    """Whether the engine keeps images as registries do: only then can it export attestations and digests."""
    return "io.containerd.snapshotter" in docker("info", "--format", "{{.DriverStatus}}")


needs_containerd = pytest.mark.skipif(
    not with_containerd(),
    reason='digests take {"features": {"containerd-snapshotter": true}} in the daemon.json of Docker',
)


def bake(
    workers: Sequence[str],
    *flags: str,
    release: bool = False,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    **override: Any,
) -> None:
    """`docker buildx bake` of workers on one base. override: attributes of each target."""
    targets = [f"{worker}-release" if release else worker for worker in workers]
    changes = json.dumps({"target": dict.fromkeys(targets, override)})
    allow = ["--allow=network.host"] if "--allow" in docker("buildx", "bake", "--help") else []
    command = ["docker", "buildx", "bake", *allow, "--file=docker-bake.hcl", "--file=-", *flags, *targets]
    # Without CACHE: what is built here does not go into the registry's.
    environment = {**os.environ, "CACHE": "", **variables(workers[0]), **(env or {})}
    done = subprocess.run(
        command, cwd=cwd, env=environment, input=changes, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]


# `vllm` is what the official image calls its engine, and no command of this wheel.
VLLM = f"""
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1
COPY lib /opt/engine/lib
RUN python3 -c "import glob, sysconfig; packages = glob.glob('/opt/engine/lib/python3*/site-packages')[0]; \\
    open(sysconfig.get_path('purelib') + '/engine.pth', 'w').write(packages)" \\
    && printf '#!/bin/sh\\nshift\\nexec python3 -m {vllm_cpu.MODULE} --model "$@"\\n' > /usr/local/bin/vllm \\
    && chmod +x /usr/local/bin/vllm
"""

# TGI's base has uv, a Python of its own and no pip, and starts its launcher.
TGI = """
RUN python3 -m venv /usr/src/.venv \\
    && /usr/src/.venv/bin/pip install --no-cache-dir --quiet uv aiohttp jinja2 tokenizers \\
    && mv /usr/src/.venv/bin/uv /bin/ \\
    && /usr/src/.venv/bin/pip uninstall --quiet --yes pip
COPY tgi.py /usr/src/
RUN printf '#!/bin/sh\\nexec /usr/src/.venv/bin/python /usr/src/tgi.py "$@"\\n' \\
        > /usr/local/bin/text-generation-launcher \\
    && chmod +x /usr/local/bin/text-generation-launcher
ENV PATH="$PATH:/usr/src/.venv/bin/" HF_HOME=/data PORT=80 UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
ENTRYPOINT ["text-generation-launcher"]
"""


def build_base(worker: str, python: str, name: str) -> None:
    """Build a stand-in for the base of `worker` on the Python image `python`."""
    context, lines = ROOT / "tools" / "stand_ins", TGI
    if worker == "vllm":
        context, lines = vllm_cpu.PYTHON.parents[1], VLLM
        if reason := vllm_cpu.missing():
            pytest.skip(f"no stand-in for the base of vllm: {reason}")
        version = docker("run", "--rm", "--entrypoint=python3", python, "--version").removeprefix("Python ")
        if not (context / "lib" / f"python{version.rpartition('.')[0]}").exists():
            pytest.skip(f"no stand-in for the base of vllm: .venv-vllm has another Python than {python}")
    network = [f"--network={os.environ['NETWORK']}"] if os.environ.get("NETWORK") else []
    command = ["docker", "buildx", "build", "--load", f"--tag={name}", *network, "--file=-", str(context)]
    subprocess.run(command, input=f"FROM {python}{lines}", text=True, check=True)


STAND_INS = ("tgi", "vllm")
PYTHON_BASE = kept()["sentence-transformers"]["args"]["BASE_IMAGE"]


def variables(worker: str) -> dict[str, str]:
    """What `make` is told about a worker whose base has a stand-in."""
    if worker not in STAND_INS:
        return {}
    return {"REGISTRY": "localhost/test-images", "BASE_IMAGE": f"localhost/test-images/base-{worker}:dev"}


@pytest.fixture(scope="session")
def built() -> Callable[[str], str]:
    """Builds the image of a worker, once, as `make build-<worker>` does, and returns its name."""
    done = dict[str, str]()

    def build(worker: str) -> str:
        if worker not in done:
            env = variables(worker)
            if not os.environ.get("BUILT"):
                if worker in STAND_INS:
                    build_base(worker, os.environ.get("BASE_IMAGE") or PYTHON_BASE, env["BASE_IMAGE"])
                subprocess.run(["make", f"build-{worker}"], cwd=ROOT, env=os.environ | env, check=True)
            command = [sys.executable, "-m", "tools.images", worker]
            done[worker] = subprocess.check_output(command, cwd=ROOT, env=os.environ | env, text=True).strip()
        return done[worker]

    return build


def layers_of(name: str) -> list[Layer]:
    found = layers(name)
    assert found is not None
    return found


@contextmanager
def serving(
    worker: str, name: str, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[tuple[Platform, WorkerProcess]]:
    """The image `name` under the local platform. env: of the worker; its model at hand, unless given."""
    given = image_env(worker) if env is None else dict(env)
    container = Container(name, [*mounts(given), *options])
    with running(worker, container=container, env=given, rules=RULES, ready_timeout=READY) as platform:
        (process,) = platform.workers
        yield platform, process


def post(platform: Platform, route: str, body: Any) -> Any:
    return requests.post(f"{platform.endpoint_url}/{route}", json=body, headers=KEY, timeout=300).json()


def http_status(url: str) -> int | None:
    """None: nothing listens there (yet)."""
    try:
        return requests.get(url, timeout=60).status_code
    except requests.ConnectionError:
        return None


def status(platform: Platform, job: str) -> str:
    answer = requests.get(f"{platform.endpoint_url}/status/{job}", headers=KEY, timeout=60).json()
    return str(answer["status"])


def test_input(worker: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((ROOT / "workers" / worker / "test_input.json").read_text())
    return body


test_input.__test__ = False  # type: ignore[attr-defined]


# ---- it runs -------------------------------------------------------------------------------------------


@each_worker
def test_make_serve_answers_and_says_what_runs(worker: str, built: Callable[[str], str]) -> None:
    built(worker)
    command = ["make", f"serve-{worker}", "IMAGE=1", "ARGS=--port=0"]
    begin = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables(worker),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            lines = list[str]()
            while not (lines and "RunPod's API" in lines[-1]):
                lines.append(process.stdout.readline())
                assert lines[-1], f"it ended:\n{''.join(lines)}"
            print(f"{worker}: {time.monotonic() - begin:.1f} s from make to ready")
            found = re.search(r"http://\S+", lines[-1])
            assert found is not None
            answer = requests.post(
                f"{found[0]}/runsync", json=test_input(worker), headers=KEY, timeout=300
            ).json()
            assert answer["status"] == "COMPLETED", answer
            assert answer["output"]
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.stdout.read()
            process.wait(60)
    versions = next(line for line in lines if "versions worker=" in line)
    for what in (f"worker={worker} ", "python=3.", "runpod=", "cuda=", "model="):
        assert what in versions
    assert docker("ps", "--quiet", "--all", "--filter=name=runpod-local-") == ""


@each_worker
def test_docker_run_serves_http(worker: str, built: Callable[[str], str]) -> None:
    """On a laptop or a Pod: SERVE_MODE=http and a published port are all that it needs."""
    env = {**image_env(worker), "SERVE_MODE": "http"}
    options = ["--read-only", "--tmpfs=/tmp:exec", "--publish=127.0.0.1::8000", *mounts(env)]
    variables = [f"--env={name}={value}" for name, value in env.items()]
    container = docker("run", "--detach", *options, *variables, built(worker))
    try:
        url = f"http://{docker('port', container, '8000/tcp')}"
        wait_until(lambda: http_status(f"{url}/ping") == 200, READY)
        answer = requests.post(f"{url}/runsync", json=test_input(worker), timeout=300)
        assert (answer.status_code, answer.json()["status"]) == (200, "COMPLETED"), answer.text
        assert http_status(f"{url}/openapi.json") == http_status(f"{url}/metrics") == 200
        docker("stop", "--timeout=60", container)
        assert docker("inspect", "--format={{.State.ExitCode}}", container) == "0", docker("logs", container)
    finally:
        docker("rm", "--force", container)


@each_worker
@pytest.mark.parametrize(
    "options",
    [("--read-only", "--tmpfs=/tmp:exec"), ("--user=12345:12345",)],
    ids=["read-only root", "not root"],
)
def test_writes_nowhere_but_to_tmp_and_the_volume(
    worker: str, options: tuple[str, ...], built: Callable[[str], str], tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    with serving(worker, built(worker), *options, f"--volume={tmp_path}:/runpod-volume") as (platform, _):
        answer = post(platform, "runsync", test_input(worker))
    assert answer["status"] == "COMPLETED", answer


@each_worker
def test_labels(worker: str, built: Callable[[str], str]) -> None:
    labels = json.loads(docker("image", "inspect", "--format={{json .Config.Labels}}", built(worker)))
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}title"] == f"worker-{worker}"
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    for name in ("description", "source", "version", "base.name"):
        assert labels[prefix + name]
    if commit := os.environ.get("REVISION"):
        assert labels[f"{prefix}revision"] == commit


# ---- it ends -------------------------------------------------------------------------------------------


@each_worker
def test_sigterm_lets_jobs_finish(worker: str, built: Callable[[str], str]) -> None:
    with serving(worker, built(worker)) as (platform, process):
        jobs = [post(platform, "run", test_input(worker))["id"] for _ in range(100)]
        wait_until(lambda: any(status(platform, job) == "IN_PROGRESS" for job in reversed(jobs)), READY)
        begun = [job for job in jobs if status(platform, job) in ("IN_PROGRESS", "COMPLETED")]
        process.terminate()
        begin = time.monotonic()
        wait_until(lambda: process.returncode is not None, READY)
        print(f"{worker}: {time.monotonic() - begin:.1f} s from SIGTERM to the end")
        assert process.returncode == 0, process.tail()
        assert {status(platform, job) for job in begun} == {"COMPLETED"}
        assert {status(platform, job) for job in jobs} <= {"COMPLETED", "IN_QUEUE"}


@each_worker
def test_sigterm_ends_a_start(worker: str, built: Callable[[str], str]) -> None:
    """Also while the model loads, where the SDK does not listen yet."""
    env = image_env(worker)
    options = ["--detach", *mounts(env), *(f"--env={name}={value}" for name, value in env.items())]
    container = docker("run", *options, built(worker))
    try:
        wait_until(lambda: "versions worker=" in docker("logs", container), READY)
        docker("stop", "--timeout=60", container)
        assert docker("inspect", "--format={{.State.ExitCode}}", container) in ("143", "0")
    finally:
        docker("rm", "--force", container)


@each_worker
def test_a_killed_handler_takes_its_container_along(worker: str, built: Callable[[str], str]) -> None:
    """Else the SDK's heartbeat process goes on telling the platform that its jobs are well."""
    with serving(worker, built(worker)) as (platform, process):
        name = Container.name(process.id)
        running_there = docker("top", name, "-eo", "pid,args").splitlines()[1:]
        pids = [int(line.split()[0]) for line in running_there]
        assert len(pids) > 1, "a heartbeat beside the handler"
        kill_handler(name)
        wait_until(lambda: process.returncode is not None, READY)
        assert process.returncode == 128 + signal.SIGKILL
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), READY)
        # The platform puts another one in its place, which works.
        assert post(platform, "runsync", test_input(worker))["status"] == "COMPLETED"


def kill_handler(container: str) -> None:
    """kill -9. Where the handler is process 1, only the engine can do that."""
    script = (
        "import os, signal\n"
        "mine = [int(p) for p in os.listdir('/proc') if p.isdigit() and p != str(os.getpid())]\n"
        "mine = [p for p in sorted(mine) if b'.handler' in open(f'/proc/{p}/cmdline', 'rb').read()]\n"
        "os.kill(mine[0], signal.SIGKILL) if mine[0] != 1 else print('first')"
    )
    if docker("exec", container, "python3", "-c", script) == "first":
        docker("kill", "--signal=KILL", container)


# ---- what is in it -------------------------------------------------------------------------------------


@each_worker
@needs_containerd
def test_a_gated_model_is_baked_in_and_its_token_is_nowhere(
    worker: str, built: Callable[[str], str], tmp_path: Path
) -> None:
    built(worker)
    model, token = Path(image_env(worker)["MODEL_NAME"]), "hf_" + secrets.token_hex(17)
    files = {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    mark = secrets.token_hex(20)  # A control of the search below: this one has to be found.
    files["README.md"] = files["mark.json"] = json.dumps({"mark": mark}).encode()
    exported, name = tmp_path / "image.tar", f"localhost/test-images/{worker}:baked"
    with Hub() as hub:
        hub.push("acme/gated", files, gated=token)
        options: dict[str, Any] = {
            "network": "host",
            "args": {"MODEL_NAME": "acme/gated", "HF_ENDPOINT": hub.url},
            "secret": ["id=HF_TOKEN,env=HF_TOKEN"],
        }
        env = {"HF_TOKEN": token, "NETWORK": "host"}
        bake([worker], "--load", f"--set={worker}.tags={name}", env=env, **options)
        assert {request["token"] for request in hub.requests() if request["file"]} >= {token}
        # Again, from the cache: as it is pushed, with what is known of its making.
        flags = [f"--set=*.output=type=oci,dest={exported}", "--provenance=mode=max", "--sbom=false"]
        bake([worker], *flags, release=True, env=env, **options)
    try:
        found = search(exported, [token.encode(), mark.encode(), b"acme/gated", b"slsa.dev/provenance"])
        exported.unlink()
        assert found == {mark.encode(), b"acme/gated", b"slsa.dev/provenance"}
        assert token not in docker("history", "--no-trunc", name)
        # Without a hub, a volume or a variable, it answers with the model that it holds.
        own = {key: value for key, value in image_env(worker).items() if "MODEL_NAME" not in key}
        with serving(worker, name, env=own) as (platform, process):
            answer = post(platform, "runsync", test_input(worker))
            assert answer["status"] == "COMPLETED", answer
            assert any("model=acme/gated" in line for line in process.lines)
    finally:
        docker("image", "rm", "--force", name)


def search(archive: Path, wanted: list[bytes]) -> set[bytes]:
    """Those of `wanted` that are in an image's files: its layers unpacked, its manifests, its history."""
    found = set[bytes]()
    with tarfile.open(archive) as blobs:
        for blob in blobs:
            if blob.isfile():
                file = blobs.extractfile(blob)
                assert file is not None
                zipped = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                content = gzip.GzipFile(fileobj=file) if zipped else file
                rest = b""
                while chunk := content.read(1 << 22):
                    found.update(words for words in wanted if words in rest + chunk)
                    rest = chunk[-200:]
    return found


@each_worker
def test_an_edited_handler_reuses_every_layer_below(
    worker: str, built: Callable[[str], str], tmp_path: Path
) -> None:
    before = layers_of(built(worker))
    copy, name = tmp_path / "copy", f"localhost/test-images/{worker}:edited"
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    for path in ("workers", "serving", "shared"):
        shutil.copytree(ROOT / path, copy / path, ignore=ignored)
    for path in ("docker-bake.hcl", ".dockerignore"):
        shutil.copy2(ROOT / path, copy)
    with (copy / "workers" / worker / "handler.py").open("a") as handler:
        handler.write(f"# edited {secrets.token_hex(8)}\n")
    begin = time.monotonic()
    bake([worker], "--load", f"--set={worker}.tags={name}", cwd=copy)
    print(f"{worker}: {time.monotonic() - begin:.1f} s to build again after an edit of the handler")
    try:
        after = layers_of(name)
    finally:
        docker("image", "rm", "--force", name)
    # Its folder and, above it, its test_input.json: the layers from the first one's instruction on.
    first = next(number for number, layer in enumerate(before) if f"COPY workers/{worker} " in layer.made_by)
    assert [layer.digest for layer in after[:first]] == [layer.digest for layer in before[:first]]
    assert after[first].digest != before[first].digest
    assert sum(layer.bytes for layer in after[first:]) < 500_000


TORCH = [
    worker
    for worker in WORKERS
    if "source=workers/torch.txt" in (ROOT / "workers" / worker / "Dockerfile").read_text()
]
OTHERS = [[worker] for worker in WORKERS if worker not in TORCH]


@pytest.mark.parametrize("workers", [TORCH, *OTHERS] if TORCH else OTHERS, ids="+".join)
@needs_containerd
def test_two_builds_give_the_same_digests(
    workers: list[str], built: Callable[[str], str], tmp_path: Path
) -> None:
    """The second without any cache, at another time.

    Together, so that torch is installed once more only: that takes some 16 GB of disk, and 2 for each further
    worker. Later builds here reuse the layers of the second, which differ from the first's in their times.
    """
    for worker in workers:
        built(worker)
    found: list[dict[str, str]] = []
    # As releases are exported, save for the compression: this one takes a fraction of gzip's time.
    output = "type=image,oci-mediatypes=true,rewrite-timestamp=true,store=false"
    output += ",compression=zstd,compression-level=1,force-compression=true"
    for number, flags in enumerate([(), ("--no-cache",)]):
        metadata = tmp_path / f"{number}.json"
        bake(
            workers,
            f"--metadata-file={metadata}",
            *(f"--set={worker}.tags=localhost/test-images/{worker}:{number}" for worker in workers),
            f"--set=*.output={output}",
            # When something was built, and with what cache, is another matter.
            "--provenance=false",
            "--sbom=false",
            *flags,
        )
        said = json.loads(metadata.read_text())
        found.append({worker: said[worker]["containerimage.digest"] for worker in workers})
    assert found[0] == found[1]
    print(found[0])


# ---- llava ---------------------------------------------------------------------------------------------

# torchvision is in no other environment of this repository. The last of these cannot be made without it, and
# the others have a slower fallback.
PROCESS = """
import numpy as np, transformers as hf
picture = np.zeros((64, 64, 3), np.uint8)
for kind in (hf.Qwen2VLImageProcessor, hf.SmolVLMImageProcessor):
    assert not type(processor := kind()).__name__.endswith("Pil")
    assert processor(images=[picture], return_tensors="pt")["pixel_values"].numel()
hf.Qwen2VLVideoProcessor()
"""


@pytest.mark.skipif("llava" not in WORKERS, reason="another worker's")
def test_llava_has_torchvision(built: Callable[[str], str]) -> None:
    docker("run", "--rm", "--network=none", "--entrypoint=python", built("llava"), "-c", PROCESS)
