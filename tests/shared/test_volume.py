"""Which copy of a model is used, what is downloaded, and the errors of a start without one.

Against a hub on loopback and the unmodified huggingface_hub.
"""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from shared import hub as hub_module
from shared.errors import StartError
from shared.hub import HubUnreachable
from shared.volume import ModelPath, lease, resolve_model, use_volume
from tests.hub import Hub, safetensors
from tests.machine import CACHES, DEAD_HUB, MODEL, content, use_machine, write

WEIGHTS = safetensors(50_000)
NEEDED = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": WEIGHTS}
NEEDLESS = {"pytorch_model.bin": b"x" * 9, "onnx/model.onnx": b"x", "tf_model.h5": b"x", "README.md": b"x"}
TOKEN = "hf_ThisIsTheTokenOfATest"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub_module, "RETRY_S", (0.01, 0.01, 0.01))
    return use_machine(tmp_path, hub, monkeypatch)


@pytest.fixture
def dead(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", DEAD_HUB)


def volume_cache(machine: Path) -> Path:
    return machine / "volume" / "huggingface-cache" / "hub"


def disk_cache(machine: Path) -> Path:
    return machine / "cache" / "huggingface" / "hub"


def cached(
    cache: Path,
    name: str = MODEL,
    commit: str = "c" * 40,
    files: dict[str, bytes] = NEEDED,
    ref: str | None = "main",
) -> Path:
    """A copy in a hub cache without the hub's tree."""
    repo = cache / f"models--{name.replace('/', '--')}"
    write(repo / "refs", {ref: commit.encode()} if ref else {})
    return write(repo / "snapshots" / commit, files)


def start_error(name: str = MODEL, revision: str | None = None, token: str | None = None) -> StartError:
    with pytest.raises(StartError) as caught:
        resolve_model(name, revision, token=token)
    assert "\n" not in caught.value.message
    assert token is None or token not in "".join(traceback.format_exception(caught.value))
    return caught.value


# ---- download -------------------------------------------------------------------------------------------


def test_downloads_what_is_needed_and_no_more(hub: Hub, machine: Path) -> None:
    commit = hub.push(MODEL, {**NEEDED, **NEEDLESS, "1_Pooling/config.json": b"[]"})
    model = resolve_model(MODEL)
    snapshot = volume_cache(machine) / "models--Org--Some-Model" / "snapshots" / commit
    size = sum(map(len, NEEDED.values())) + 2
    assert model == ModelPath(snapshot, MODEL, commit, "download", size)
    assert content(snapshot) == {**NEEDED, "1_Pooling/config.json": b"[]"}
    assert [hub.got(path) for path in (*NEEDED, "1_Pooling/config.json")] == [1, 1, 1, 1]
    assert sum(hub.got(path) for path in NEEDLESS) == 0


def test_a_complete_copy_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, {**NEEDED, **NEEDLESS})
    first = resolve_model(MODEL)
    asked = len(hub.requests())
    again = resolve_model(MODEL)
    assert (again.path, again.revision, again.source) == (first.path, first.revision, "volume")
    assert len(hub.requests()) == asked
    monkeypatch.setenv("HF_ENDPOINT", DEAD_HUB)
    assert resolve_model(MODEL) == again
    assert resolve_model(MODEL, "main") == again
    assert resolve_model(MODEL, first.revision) == again


def test_extra_files_are_downloaded(hub: Hub) -> None:
    hub.push("org/extra", {**NEEDED, "sparse_linear.pt": b"x", "a.gguf": b"x"})
    assert "sparse_linear.pt" not in content(resolve_model("org/extra").path)
    model = resolve_model("org/extra", extra=["sparse_*"])
    assert model.source == "download"
    assert set(content(model.path)) == {*NEEDED, "sparse_linear.pt"}
    assert hub.got("model.safetensors") == 1


def test_a_file_name_is_no_pattern(hub: Hub) -> None:
    hub.push("org/brackets", {**NEEDED, "voice[a].json": b"{}"})
    assert "voice[a].json" in content(resolve_model("org/brackets").path)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.push("org/private", NEEDED, private=TOKEN)
    model = resolve_model("org/private", token=TOKEN)
    sent = {request["line"].split("/")[1]: request["token"] for request in hub.requests()}
    assert sent == {"api": TOKEN, "org": TOKEN, "cdn": ""}
    assert TOKEN not in repr(model)
    assert TOKEN not in capsys.readouterr().out
    assert all(TOKEN.encode() not in data for data in content(model.path.parents[2]).values())


def test_without_a_volume_the_disk_is_used(hub: Hub, machine: Path) -> None:
    hub.push(MODEL, NEEDED)
    (machine / "volume").rmdir()
    assert resolve_model(MODEL).path.is_relative_to(disk_cache(machine))
    assert resolve_model(MODEL).source == "disk"
    assert not (machine / "volume").exists()


def test_hf_home_on_a_full_volume(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, NEEDED)
    monkeypatch.setenv("HF_HOME", str(machine / "volume" / "huggingface-cache"))
    free(monkeypatch, machine / "volume", 10)
    assert resolve_model(MODEL).path.is_relative_to(disk_cache(machine))


# ---- revisions ------------------------------------------------------------------------------------------


def test_a_branch_or_a_commit_can_be_named(hub: Hub) -> None:
    old = hub.push("org/branches", {**NEEDED, "config.json": b'{"v": 1}'})
    new = hub.push("org/branches", {**NEEDED, "config.json": b'{"v": 2}'}, branch="refs/pr/1")
    assert resolve_model("org/branches", "refs/pr/1").revision == new
    assert resolve_model("org/branches", old).revision == old
    asked = len(hub.requests())
    for revision, commit in (("refs/pr/1", new), (new, new), (old, old)):
        assert resolve_model("org/branches", revision).revision == commit
    assert len(hub.requests()) == asked
    assert hub.got("model.safetensors") == 1, "the same blob in both"


def test_an_incomplete_newer_snapshot(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, NEEDED)
    old = resolve_model(MODEL)
    cached(volume_cache(machine), commit="d" * 40, files={"config.json": b"{}"})
    monkeypatch.setenv("HF_ENDPOINT", DEAD_HUB)
    assert resolve_model(MODEL).path == old.path


# ---- copies ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("dead")
def test_a_local_folder_comes_first(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(machine / "here" / MODEL, NEEDED)
    cached(volume_cache(machine))
    model = resolve_model(str(folder))
    assert (model.path, model.name, model.source, model.revision) == (folder, str(folder), "local", None)
    assert model.bytes == sum(map(len, NEEDED.values()))
    monkeypatch.chdir(machine / "here")
    assert resolve_model(MODEL).source == "local"


@pytest.mark.usefixtures("dead")
def test_the_order_of_the_copies(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = MODEL.lower()
    monkeypatch.setenv("HF_HUB_CACHE", str(machine / "own"))
    copies = {
        cached(machine / "own"): "disk",
        write(machine / "models" / MODEL, NEEDED): "baked",
        cached(machine / "models"): "baked",
        write(machine / "store" / lower / "main", NEEDED): "host-cache",
        cached(volume_cache(machine), lower): "host-cache",
        cached(disk_cache(machine)): "disk",
    }
    for folder, source in copies.items():
        model = resolve_model(MODEL)
        assert (model.path, model.source, model.name) == (folder, source, MODEL)
        shutil.rmtree(folder)
    with pytest.raises(HubUnreachable):
        resolve_model(MODEL)


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("variable", CACHES)
@pytest.mark.parametrize(("root", "source"), [("own", "disk"), ("volume/own", "volume")])
def test_the_cache_of_the_user_comes_first(
    machine: Path, monkeypatch: pytest.MonkeyPatch, variable: str, root: str, source: str
) -> None:
    cached(volume_cache(machine))
    folder = cached(machine / root / "hub", commit="d" * 40)
    monkeypatch.setenv(variable, str(machine / root if variable == "HF_HOME" else machine / root / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = resolve_model(MODEL)
    assert (model.path, model.source) == (folder, source)


def test_where_downloads_go(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, NEEDED)
    monkeypatch.setenv("HF_HUB_CACHE", str(machine / "own"))
    assert resolve_model(MODEL).path.is_relative_to(volume_cache(machine))
    shutil.rmtree(machine / "volume")
    assert resolve_model(MODEL).path.is_relative_to(machine / "own")


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("name", [MODEL, MODEL.lower(), MODEL.upper()])
def test_the_host_cache_matches_in_any_case_and_stays_unchanged(machine: Path, name: str) -> None:
    folder = cached(volume_cache(machine), "org/some-model")
    before = content(machine)
    model = resolve_model(name)
    assert (model.path, model.name, model.revision) == (folder, name, "c" * 40)
    assert content(machine) == before


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize(
    ("folder", "revision"), [("main", None), ("v1", "v1"), ("a" * 40, "a" * 40), ("a" * 40, None)]
)
def test_the_second_host_cache(machine: Path, folder: str, revision: str | None) -> None:
    write(machine / "store" / "org" / "some-model" / folder, NEEDED)
    model = resolve_model(MODEL, revision)
    assert (model.source, model.revision) == ("host-cache", folder if folder == "a" * 40 else None)
    with pytest.raises(HubUnreachable):
        resolve_model(MODEL, "another")


def test_an_incomplete_host_cache_is_neither_used_nor_changed(hub: Hub, machine: Path) -> None:
    hub.push(MODEL, NEEDED)
    shard = {"config.json": b"{}", "model-00001-of-00002.safetensors": WEIGHTS}
    half = cached(volume_cache(machine), MODEL.lower(), files=shard)
    before = content(half.parents[1])
    model = resolve_model(MODEL)
    assert model.source == "download"
    assert content(model.path) == NEEDED
    assert content(half.parents[1]) == before


def test_a_missing_tree_is_fetched_once(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.push(MODEL, {**NEEDED, **NEEDLESS})
    cached(volume_cache(machine), commit=commit)
    assert resolve_model(MODEL).source == "volume"
    requests = [request["line"].split("?")[0] for request in hub.requests()]
    assert requests == [f"GET /api/models/{MODEL}/{kind}/{commit}" for kind in ("revision", "tree")]
    monkeypatch.setenv("HF_ENDPOINT", DEAD_HUB)
    assert resolve_model(MODEL).source == "volume"


def test_what_only_the_hub_lists_is_downloaded(hub: Hub, machine: Path) -> None:
    """Another tool's download was killed before it came to the tokenizer."""
    commit = hub.push(MODEL, NEEDED)
    half = {path: data for path, data in NEEDED.items() if path != "tokenizer.json"}
    cached(volume_cache(machine), commit=commit, files=half)
    model = resolve_model(MODEL)
    assert (model.source, content(model.path)) == ("download", NEEDED)
    assert (hub.got("tokenizer.json"), hub.got("model.safetensors")) == (1, 0)


@pytest.mark.parametrize("damage", ["cut", "longer", "dangling", "gone"])
def test_a_damaged_file_is_downloaded_again(hub: Hub, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, NEEDED)
    pointer = resolve_model(MODEL).path / "model.safetensors"
    blob = pointer.resolve()
    if damage in ("dangling", "gone"):
        (blob if damage == "dangling" else pointer).unlink()
    else:
        blob.write_bytes(WEIGHTS[:-1] if damage == "cut" else WEIGHTS + b"\0")
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", DEAD_HUB)
        with pytest.raises(HubUnreachable):
            resolve_model(MODEL)
    assert content(resolve_model(MODEL).path) == NEEDED


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("offline", [True, False])
def test_a_stale_incomplete_file(machine: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    folder = cached(volume_cache(machine))
    write(folder.parents[1] / "blobs", {f"{'a' * 64}.incomplete": b"x"})
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model(MODEL).path == folder


def test_partial_files_of_killed_downloads_are_removed(hub: Hub, machine: Path) -> None:
    hub.push(MODEL, NEEDED)
    blobs = volume_cache(machine) / "models--Org--Some-Model" / "blobs"
    write(blobs, {"a.incomplete": b"old", "b.incomplete": b"new"})
    os.utime(blobs / "a.incomplete", (1e9, 1e9))
    resolve_model(MODEL)
    assert [path.name for path in blobs.glob("*.incomplete")] == ["b.incomplete"]


# ---- a failing hub -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", ["GET /api/models", "HEAD /Org/Some-Model/resolve", "GET /Org/Some-Model/resolve", "GET /cdn"]
)
def test_503s_are_retried(hub: Hub, part: str) -> None:
    hub.push(MODEL, NEEDED)
    hub.fault(part, status=503, times=2)
    assert content(resolve_model(MODEL).path) == NEEDED


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second before it goes on with a broken connection."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)


@pytest.mark.usefixtures("_no_pause")
def test_cut_connections_are_retried(hub: Hub) -> None:
    hub.push(MODEL, NEEDED)
    hub.fault("GET /cdn", cut=10_000, times=4)
    assert content(resolve_model(MODEL).path) == NEEDED
    assert hub.got("model.safetensors") == 5


def test_waits_start_over_after_progress(hub: Hub) -> None:
    """The file that fails most does so seven times; a try and three more would not do."""
    files = {f"{number}.safetensors": safetensors(100, number) for number in range(8)}
    hub.push("org/stony", {**files, "config.json": b"{}"})
    for number, path in enumerate(files):
        hub.fault(f"/{path}?", status=503, times=number)
    assert set(content(resolve_model("org/stony").path)) == {*files, "config.json"}
    assert len(hub.requests()) < 100


def test_a_hub_that_stays_down_is_a_plain_error(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.push(MODEL, NEEDED)
    hub.fault("GET /api/models", status=503)
    with pytest.raises(HubUnreachable, match="HTTPStatusError 503") as caught:
        resolve_model(MODEL, token=TOKEN)
    assert not isinstance(caught.value, StartError)
    assert len(hub.requests()) == 4, "one try and three more"
    text = "".join(traceback.format_exception(caught.value)) + capsys.readouterr().out
    assert TOKEN not in text
    assert os.environ.get("HF_HUB_OFFLINE", "0") == "0"


@pytest.mark.parametrize(("token", "advice"), [(None, "Set HF_TOKEN"), (TOKEN, "fewer workers")])
def test_too_many_requests(hub: Hub, token: str | None, advice: str) -> None:
    hub.push(MODEL, NEEDED)
    hub.fault("GET /api/models", status=429)
    with pytest.raises(HubUnreachable, match="too many requests") as caught:
        resolve_model(MODEL, token=token)
    assert advice in str(caught.value)
    assert "no answer" not in str(caught.value)


@pytest.mark.parametrize(("longest", "seconds"), [(300.0, 1.0), (0.2, 0.2)])
def test_retry_after(hub: Hub, monkeypatch: pytest.MonkeyPatch, longest: float, seconds: float) -> None:
    hub.push(MODEL, NEEDED)
    hub.fault("GET /api/models", status=429, retry_after=1, times=1)
    monkeypatch.setattr(hub_module, "RATE_LIMIT_S", longest)
    begin = time.monotonic()
    assert content(resolve_model(MODEL).path) == NEEDED
    assert seconds <= time.monotonic() - begin < seconds + 0.7


def test_a_download_that_fails_midway(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, NEEDED)
    hub.fault("GET /cdn", status=503)
    with pytest.raises(HubUnreachable):
        resolve_model(MODEL)
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", DEAD_HUB)
        with pytest.raises(HubUnreachable):
            resolve_model(MODEL)
    hub.mend()
    assert content(resolve_model(MODEL).path) == NEEDED
    assert hub.got("config.json") == 0, "what was there is kept"


# ---- permanent errors -----------------------------------------------------------------------------------


def test_no_such_model(hub: Hub) -> None:
    error = start_error("org/nothing")
    assert error.code == "model_not_found"
    assert "org/nothing" in error.message
    assert "HF_TOKEN is not set" in error.message
    error = start_error("org/nothing", token=TOKEN)
    assert (error.code, "HF_TOKEN has no access" in error.message) == ("model_not_found", True)
    assert start_error("not/a/name").code == "model_not_found"
    hub.push("org/hidden", NEEDED, private=TOKEN)
    assert start_error("org/hidden", token="hf_AnotherTokenOfATest").code == "model_not_found"


def test_no_such_folder(machine: Path) -> None:
    assert start_error(f"{machine}/nothing").code == "model_not_found"
    write(machine / "half", {"config.json": b"{}"})
    error = start_error(f"{machine}/half")
    assert (error.code, "weights are missing" in error.message) == ("incomplete", True)
    write(machine / "llama.cpp", {"model.gguf": b"0"})
    assert "use the model's safetensors files" in start_error(f"{machine}/llama.cpp").message


def test_no_such_revision(hub: Hub) -> None:
    hub.push(MODEL, NEEDED)
    error = start_error(MODEL, "v9")
    assert error.code == "revision_not_found"
    assert "v9" in error.message
    assert "MODEL_REVISION" in error.message
    assert start_error(MODEL, "f" * 40).code == "revision_not_found"


def test_a_gated_model(hub: Hub) -> None:
    hub.push("org/gated", NEEDED, gated=TOKEN)
    error = start_error("org/gated")
    assert (error.code, "HF_TOKEN is not set" in error.message) == ("gated", True)
    error = start_error("org/gated", token="hf_AnotherTokenOfATest")
    assert (error.code, "no access" in error.message) == ("gated", True)
    assert content(resolve_model("org/gated", token=TOKEN).path) == NEEDED


def test_a_token_that_expired(hub: Hub) -> None:
    hub.push(MODEL, NEEDED)
    assert start_error(MODEL, token="expired-token-of-a-test").code == "bad_token"


def test_nothing_to_load(hub: Hub) -> None:
    hub.push("org/other-formats", {"config.json": b"{}", "model.gguf": b"x", "onnx/model.onnx": b"x"})
    assert start_error("org/other-formats").code == "no_weights"
    assert hub.got("model.gguf") == 0


def free(monkeypatch: pytest.MonkeyPatch, below: Path, size: int) -> None:
    """The free space below a folder is reported as `size` bytes."""
    real = shutil.disk_usage

    def usage(path: str | Path) -> object:
        return real(path)._replace(free=size) if Path(path).is_relative_to(below) else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_volume_without_space_is_skipped(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, NEEDED)
    free(monkeypatch, machine / "volume", len(WEIGHTS) - 1)
    model = resolve_model(MODEL)
    assert model.path.is_relative_to(disk_cache(machine))
    assert hub.got("model.safetensors") == 1


def test_no_space_anywhere(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {**NEEDED, "model.safetensors": safetensors(1_500_000)}
    hub.push("org/large", files)
    free(monkeypatch, machine, 1_000_000)
    error = start_error("org/large")
    assert error.code == "no_space"
    assert "1.5 MB needed, 1.0 MB free" in error.message
    assert hub.got("model.safetensors") == 0


def test_an_unwritable_volume_is_skipped(
    hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/sys takes no new folder, not even root's."""
    hub.push(MODEL, NEEDED)
    monkeypatch.setenv("RUNPOD_VOLUME_PATH", "/sys")
    assert resolve_model(MODEL).path.is_relative_to(disk_cache(machine))
    assert "no download into /sys" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", "/sys")
    error = start_error()
    assert error.code == "read_only"
    assert "writable" in error.message
    assert "larger" not in error.message


# ---- offline --------------------------------------------------------------------------------------------


def test_offline_flags_are_set_afterwards(hub: Hub) -> None:
    hub.push(MODEL, NEEDED)
    resolve_model(MODEL)
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        huggingface_hub.model_info(MODEL)
    hub.push("org/second", NEEDED)
    assert resolve_model("org/second").source == "download"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    hub.push(MODEL, NEEDED)
    monkeypatch.setenv(variable, "1")
    for _ in range(2):
        with pytest.raises(StartError) as caught:
            resolve_model(MODEL)
        assert caught.value.code == "offline"
    cached(volume_cache(machine))
    assert resolve_model(MODEL).source == "volume"
    with pytest.raises(StartError):
        resolve_model("org/other")
    assert hub.requests() == []


def test_offline_names_what_an_incomplete_copy_lacks(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached(volume_cache(machine), files={"config.json": b"{}"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StartError) as caught:
        resolve_model(MODEL)
    assert caught.value.code == "offline"
    assert f"{folder} is incomplete: weights are missing" in caught.value.message


@pytest.mark.parametrize("layout", ["cache", "store"])
def test_main_without_a_ref_offline(machine: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    def copy(commit: str) -> Path:
        if layout == "store":
            return write(machine / "store" / MODEL / commit, NEEDED)
        return cached(volume_cache(machine), commit=commit, ref=None)

    folder = copy("c" * 40)
    monkeypatch.setenv("HF_ENDPOINT", DEAD_HUB)
    with pytest.raises(HubUnreachable):
        resolve_model(MODEL, "main")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model(MODEL, "main").path == folder
    with pytest.raises(StartError):
        resolve_model(MODEL, "v2")
    copy("d" * 40)
    with pytest.raises(StartError):
        resolve_model(MODEL, "main")


# ---- the volume's caches ---------------------------------------------------------------------

VARIABLES = ("HF_HOME", "HF_MODULES_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")


@pytest.fixture
def _no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_caches")
def test_compile_caches_live_on_the_volume(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert use_volume() == machine / "volume"
    assert os.environ["HF_HOME"] == str(machine / "volume" / "huggingface-cache")
    assert os.environ["VLLM_CACHE_ROOT"].startswith(str(machine / "volume"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(machine / "volume"))
    assert not os.environ["HF_MODULES_CACHE"].startswith(str(machine / "volume"))
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


@pytest.mark.usefixtures("_no_caches")
def test_without_a_volume_they_stay(machine: Path) -> None:
    (machine / "volume").rmdir()
    assert use_volume() is None
    assert not set(VARIABLES) & set(os.environ)


# ---- lease ----------------------------------------------------------------------------------------------


def test_a_lease_in_an_unwritable_folder_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="sys"), lease(Path("/sys/a.lease")):
        pass
