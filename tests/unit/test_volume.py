"""Where models are found, what is downloaded, and what a start says when it can not be.

Against a hub on loopback and the unmodified huggingface_hub.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from shared import volume
from shared.errors import StartError
from shared.volume import HubUnreachable, ModelPath, resolve_model, use_volume
from tests.hub import Hub, safetensors

NAME = "Org/Some-Model"
WEIGHTS = safetensors(50_000)
NEEDED = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": WEIGHTS}
NEEDLESS = {"pytorch_model.bin": b"x" * 9, "onnx/model.onnx": b"x", "tf_model.h5": b"x", "README.md": b"x"}
TOKEN = "hf_ThisIsTheTokenOfATest"
DEAD = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def the_hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(the_hub: Hub) -> Hub:
    the_hub.mend()
    return the_hub


@pytest.fixture(autouse=True)
def place(tmp_path: Path, the_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: `volume` is mounted; `models`, `store` and `cache` (the disk) may be made."""
    (tmp_path / "volume").mkdir()
    variables = {
        "RUNPOD_VOLUME_PATH": "volume",
        "BAKED_MODEL_DIR": "models",
        "RUNPOD_MODEL_STORE": "store",
        "XDG_CACHE_HOME": "cache",
    }
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", the_hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(volume, "_offline_is_ours", False)
    monkeypatch.setattr(volume, "RETRY_S", (0.01, 0.01, 0.01))
    return tmp_path


def volume_cache(place: Path) -> Path:
    return place / "volume" / "huggingface-cache" / "hub"


def disk_cache(place: Path) -> Path:
    return place / "cache" / "huggingface" / "hub"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, files: dict[str, bytes] = NEEDED) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def cached(
    hub_cache: Path, name: str = NAME, commit: str = "c" * 40, files: dict[str, bytes] = NEEDED
) -> Path:
    """A copy in a hub cache that no list came with."""
    repo = hub_cache / f"models--{name.replace('/', '--')}"
    write(repo / "refs", {"main": commit.encode()})
    return write(repo / "snapshots" / commit, files)


def failing(name: str = NAME, revision: str | None = None, token: str | None = None) -> StartError:
    with pytest.raises(StartError) as caught:
        resolve_model(name, revision, token=token)
    said = "".join(traceback.format_exception(caught.value))
    assert "\n" not in caught.value.message
    assert token is None or token not in said
    assert os.environ.get("HF_HUB_OFFLINE", "0") == "0"
    return caught.value


# ---- download -------------------------------------------------------------------------------------------


def test_downloads_what_is_needed_and_no_more(hub: Hub, place: Path) -> None:
    commit = hub.push(NAME, {**NEEDED, **NEEDLESS, "1_Pooling/config.json": b"[]"})
    model = resolve_model(NAME)
    snapshot = volume_cache(place) / "models--Org--Some-Model" / "snapshots" / commit
    size = sum(map(len, NEEDED.values())) + 2
    assert model == ModelPath(snapshot, NAME, commit, "download", size)
    assert content(snapshot) == {**NEEDED, "1_Pooling/config.json": b"[]"}
    assert [hub.got(path) for path in (*NEEDED, "1_Pooling/config.json")] == [1, 1, 1, 1]
    assert sum(hub.got(path) for path in NEEDLESS) == 0


def test_a_whole_copy_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(NAME, {**NEEDED, **NEEDLESS})
    first = resolve_model(NAME)
    asked = len(hub.requests())
    again = resolve_model(NAME)
    assert (again.path, again.revision, again.source) == (first.path, first.revision, "volume")
    assert len(hub.requests()) == asked
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    assert resolve_model(NAME) == again
    assert resolve_model(NAME, "main") == again
    assert resolve_model(NAME, first.revision) == again


def test_pickled_weights_where_there_are_no_others(hub: Hub) -> None:
    hub.push("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x" * 99, "onnx/model.onnx": b"x"})
    assert set(content(resolve_model("org/pickled").path)) == {"config.json", "pytorch_model.bin"}


def test_extra_files_are_fetched_besides(hub: Hub) -> None:
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


def test_without_a_volume_the_disk_is_used(hub: Hub, place: Path) -> None:
    hub.push(NAME, NEEDED)
    (place / "volume").rmdir()
    assert resolve_model(NAME).path.is_relative_to(disk_cache(place))
    assert resolve_model(NAME).source == "disk"
    assert not (place / "volume").exists()


def test_the_users_own_cache_counts_as_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(place / "mine" / "hub")
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    monkeypatch.setenv("HF_HOME", str(place / "mine"))
    assert resolve_model(NAME).source == "disk"


def test_home_on_a_volume_that_is_full_is_not_the_disk(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(NAME, NEEDED)
    monkeypatch.setenv("HF_HOME", str(place / "volume" / "huggingface-cache"))
    free(monkeypatch, place / "volume", 10)
    assert resolve_model(NAME).path.is_relative_to(disk_cache(place))


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


def test_a_model_that_moved_is_fetched_when_its_revision_is_named(hub: Hub) -> None:
    old = hub.push("org/moving", {**NEEDED, "config.json": b'{"v": 1}'})
    assert resolve_model("org/moving").revision == old
    new = hub.push("org/moving", {**NEEDED, "config.json": b'{"v": 2}'})
    assert resolve_model("org/moving").revision == old
    assert resolve_model("org/moving", new).revision == new


def test_a_broken_newer_snapshot_does_not_hide_a_whole_older_one(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(NAME, NEEDED)
    old = resolve_model(NAME)
    cached(volume_cache(place), commit="d" * 40, files={"config.json": b"{}"})
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    assert resolve_model(NAME).path == old.path


# ---- found ----------------------------------------------------------------------------------------------


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", DEAD)


@pytest.mark.usefixtures("dead")
def test_a_local_folder_comes_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(place / "here" / NAME)
    cached(volume_cache(place))
    model = resolve_model(str(folder))
    assert (model.path, model.name, model.source, model.revision) == (folder, str(folder), "local", None)
    assert model.bytes == sum(map(len, NEEDED.values()))
    monkeypatch.chdir(place / "here")
    assert resolve_model(NAME).source == "local"


@pytest.mark.usefixtures("dead")
def test_the_order(place: Path) -> None:
    """Each place is emptied in turn, and the next one takes over."""
    lower = NAME.lower()
    places = {
        write(place / "models" / NAME): "baked",
        cached(place / "models"): "baked",
        write(place / "store" / lower / "main"): "host-cache",
        cached(volume_cache(place), lower): "host-cache",
        cached(disk_cache(place)): "disk",
    }
    for folder, source in places.items():
        model = resolve_model(NAME)
        assert (model.path, model.source, model.name) == (folder, source, NAME)
        shutil.rmtree(folder)
    with pytest.raises(HubUnreachable):
        resolve_model(NAME)


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("name", [NAME, NAME.lower(), NAME.upper()])
def test_the_host_cache_is_found_in_any_case_and_left_as_it_is(place: Path, name: str) -> None:
    folder = cached(volume_cache(place), "org/some-model")
    before = content(place)
    model = resolve_model(name)
    assert (model.path, model.name, model.revision) == (folder, name, "c" * 40)
    assert content(place) == before


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize(
    ("folder", "revision"), [("main", None), ("v1", "v1"), ("a" * 40, "a" * 40), ("a" * 40, None)]
)
def test_the_second_host_cache(place: Path, folder: str, revision: str | None) -> None:
    write(place / "store" / "org" / "some-model" / folder)
    model = resolve_model(NAME, revision)
    assert (model.source, model.revision) == ("host-cache", folder if folder == "a" * 40 else None)
    with pytest.raises(HubUnreachable):
        resolve_model(NAME, "another")


@pytest.mark.usefixtures("dead")
def test_a_copy_of_another_revision_is_not_taken(place: Path) -> None:
    cached(volume_cache(place))
    with pytest.raises(HubUnreachable):
        resolve_model(NAME, "v2")


def test_a_host_cache_that_is_not_whole_is_not_taken_and_not_touched(hub: Hub, place: Path) -> None:
    hub.push(NAME, NEEDED)
    half = cached(volume_cache(place), NAME.lower(), files={**NEEDED, "model.safetensors": WEIGHTS[:-1]})
    before = content(half.parents[1])
    model = resolve_model(NAME)
    assert model.source == "download"
    assert content(model.path) == NEEDED
    assert content(half.parents[1]) == before


def test_a_copy_without_a_list_gets_one_from_the_hub_once(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push(NAME, {**NEEDED, **NEEDLESS})
    cached(volume_cache(place), commit=commit)
    assert resolve_model(NAME).source == "volume"
    assert [request["line"].split("?")[0] for request in hub.requests()] == [
        f"GET /api/models/{NAME}/revision/{commit}"
    ]
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    assert resolve_model(NAME).source == "volume"


def test_what_only_the_hub_knows_to_be_missing_is_fetched(hub: Hub, place: Path) -> None:
    """Another tool's download was killed before it came to the tokenizer."""
    commit = hub.push(NAME, NEEDED)
    half = {path: data for path, data in NEEDED.items() if path != "tokenizer.json"}
    cached(volume_cache(place), commit=commit, files=half)
    model = resolve_model(NAME)
    assert (model.source, content(model.path)) == ("download", NEEDED)
    assert (hub.got("tokenizer.json"), hub.got("model.safetensors")) == (1, 0)


@pytest.mark.parametrize("damage", ["cut", "longer", "dangling", "gone"])
def test_a_listed_file_of_another_size_is_fetched_again(
    hub: Hub, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(NAME, NEEDED)
    pointer = resolve_model(NAME).path / "model.safetensors"
    blob = pointer.resolve()
    if damage in ("dangling", "gone"):
        (blob if damage == "dangling" else pointer).unlink()
    else:
        blob.write_bytes(WEIGHTS[:-1] if damage == "cut" else WEIGHTS + b"\0")
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", DEAD)
        with pytest.raises(HubUnreachable):
            resolve_model(NAME)
    assert content(resolve_model(NAME).path) == NEEDED


def test_what_killed_downloads_left_is_swept_when_nobody_writes_it(hub: Hub, place: Path) -> None:
    hub.push(NAME, NEEDED)
    blobs = volume_cache(place) / "models--Org--Some-Model" / "blobs"
    write(blobs, {"a.incomplete": b"old", "b.incomplete": b"new"})
    os.utime(blobs / "a.incomplete", (1e9, 1e9))
    resolve_model(NAME)
    assert [path.name for path in blobs.glob("*.incomplete")] == ["b.incomplete"]


# ---- a hub in trouble -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", ["GET /api/models", "HEAD /Org/Some-Model/resolve", "GET /Org/Some-Model/resolve", "GET /cdn"]
)
def test_503s_are_retried(hub: Hub, part: str) -> None:
    hub.push(NAME, NEEDED)
    hub.fault(part, status=503, times=2)
    assert content(resolve_model(NAME).path) == NEEDED


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second before it goes on with a broken connection."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)


@pytest.mark.usefixtures("_no_pause")
def test_cut_connections_are_retried(hub: Hub) -> None:
    hub.push(NAME, NEEDED)
    hub.fault("GET /cdn", cut=10_000, times=4)
    assert content(resolve_model(NAME).path) == NEEDED
    assert hub.got("model.safetensors") == 5


def test_retries_begin_anew_when_a_download_gets_on(hub: Hub) -> None:
    """The file that fails most does so seven times; a try and three more would not do."""
    files = {f"{number}.safetensors": safetensors(100, number) for number in range(8)}
    hub.push("org/stony", {**files, "config.json": b"{}"})
    for number, path in enumerate(files):
        hub.fault(f"/{path}?", status=503, times=number)
    assert set(content(resolve_model("org/stony").path)) == {*files, "config.json"}
    assert len(hub.requests()) < 100


def test_a_hub_that_stays_down_is_a_plain_error(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.push(NAME, NEEDED)
    hub.fault("GET /api/models", status=503)
    with pytest.raises(HubUnreachable, match="HTTPStatusError 503") as caught:
        resolve_model(NAME, token=TOKEN)
    assert not isinstance(caught.value, StartError)
    assert len(hub.requests()) == 4, "one try and three more"
    said = "".join(traceback.format_exception(caught.value)) + capsys.readouterr().out
    assert TOKEN not in said
    assert os.environ.get("HF_HUB_OFFLINE", "0") == "0"


def test_a_hub_that_dies_in_the_middle_leaves_nothing_whole(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(NAME, NEEDED)
    hub.fault("GET /cdn", status=503)
    with pytest.raises(HubUnreachable):
        resolve_model(NAME)
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", DEAD)
        with pytest.raises(HubUnreachable):
            resolve_model(NAME)
    hub.mend()
    assert content(resolve_model(NAME).path) == NEEDED
    assert hub.got("config.json") == 0, "what was there is kept"


# ---- permanent errors -----------------------------------------------------------------------------------


def test_no_such_model(hub: Hub) -> None:
    error = failing("org/nothing")
    assert error.code == "model_not_found"
    assert "org/nothing" in error.message
    assert "HF_TOKEN is not set" in error.message
    error = failing("org/nothing", token=TOKEN)
    assert (error.code, "HF_TOKEN has no access" in error.message) == ("model_not_found", True)
    assert failing("not/a/name").code == "model_not_found"
    hub.push("org/hidden", NEEDED, private=TOKEN)
    assert failing("org/hidden", token="hf_AnotherTokenOfATest").code == "model_not_found"


def test_no_such_folder(place: Path) -> None:
    assert failing(f"{place}/nothing").code == "model_not_found"
    write(place / "half", {"config.json": b"{}", "model.safetensors": WEIGHTS[:-1]})
    error = failing(f"{place}/half")
    assert (error.code, "model.safetensors" in error.message) == ("incomplete", True)


def test_no_such_revision(hub: Hub) -> None:
    hub.push(NAME, NEEDED)
    error = failing(NAME, "v9")
    assert error.code == "revision_not_found"
    assert "v9" in error.message
    assert "MODEL_REVISION" in error.message
    assert failing(NAME, "f" * 40).code == "revision_not_found"


def test_a_gated_model(hub: Hub) -> None:
    hub.push("org/gated", NEEDED, gated=TOKEN)
    error = failing("org/gated")
    assert (error.code, "HF_TOKEN is not set" in error.message) == ("gated", True)
    error = failing("org/gated", token="hf_AnotherTokenOfATest")
    assert (error.code, "no access" in error.message) == ("gated", True)
    assert content(resolve_model("org/gated", token=TOKEN).path) == NEEDED


def test_a_token_that_expired(hub: Hub) -> None:
    hub.push(NAME, NEEDED)
    assert failing(NAME, token="expired-token-of-a-test").code == "bad_token"


def test_nothing_to_load(hub: Hub) -> None:
    hub.push("org/other-formats", {"config.json": b"{}", "model.gguf": b"x", "onnx/model.onnx": b"x"})
    assert failing("org/other-formats").code == "no_weights"
    assert hub.got("model.gguf") == 0


def free(monkeypatch: pytest.MonkeyPatch, below: Path, size: int) -> None:
    """The disk says that it has `size` bytes left for what lies below a folder."""
    real = shutil.disk_usage

    def usage(path: str | Path) -> object:
        return real(path)._replace(free=size) if Path(path).is_relative_to(below) else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_volume_without_room_is_passed_over(hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(NAME, NEEDED)
    free(monkeypatch, place / "volume", len(WEIGHTS) - 1)
    model = resolve_model(NAME)
    assert model.path.is_relative_to(disk_cache(place))
    assert hub.got("model.safetensors") == 1


def test_no_room_anywhere(hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {**NEEDED, "model.safetensors": safetensors(1_500_000)}
    hub.push("org/large", files)
    free(monkeypatch, place, 1_000_000)
    error = failing("org/large")
    assert error.code == "no_space"
    assert "1.5 MB needed, 1.0 MB free" in error.message
    assert hub.got("model.safetensors") == 0


def test_an_unwritable_volume_is_passed_over(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/sys takes no new folder, not even root's."""
    hub.push(NAME, NEEDED)
    monkeypatch.setenv("RUNPOD_VOLUME_PATH", "/sys")
    assert resolve_model(NAME).path.is_relative_to(disk_cache(place))
    assert "no download into /sys" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", "/sys")
    assert failing().code == "read_only"


# ---- offline --------------------------------------------------------------------------------------------


def test_offline_flags_are_set_when_a_model_was_found(hub: Hub) -> None:
    hub.push(NAME, NEEDED)
    resolve_model(NAME)
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        huggingface_hub.model_info(NAME)


def test_a_second_model_is_downloaded_all_the_same(hub: Hub) -> None:
    hub.push(NAME, NEEDED)
    hub.push("org/second", NEEDED)
    resolve_model(NAME)
    assert resolve_model("org/second").source == "download"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_who_asks_for_offline_gets_it(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    hub.push(NAME, NEEDED)
    monkeypatch.setenv(variable, "1")
    for _ in range(2):
        with pytest.raises(StartError) as caught:
            resolve_model(NAME)
        assert caught.value.code == "offline"
    cached(volume_cache(place))
    assert resolve_model(NAME).source == "volume"
    with pytest.raises(StartError):
        resolve_model("org/other")
    assert hub.requests() == []


# ---- the volume's caches, and baking ---------------------------------------------------------------------

CACHES = ("HF_HOME", "HF_MODULES_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")


def test_compile_caches_live_on_the_volume(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert use_volume() == place / "volume"
    assert os.environ["HF_HOME"] == str(place / "volume" / "huggingface-cache")
    assert os.environ["VLLM_CACHE_ROOT"].startswith(str(place / "volume"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(place / "volume"))
    assert not os.environ["HF_MODULES_CACHE"].startswith(str(place / "volume"))
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


def test_without_a_volume_they_stay(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    (place / "volume").rmdir()
    assert use_volume() is None
    assert not set(CACHES) & set(os.environ)


@pytest.mark.parametrize("secret", [True, False])
def test_a_baked_model_needs_no_hub(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch, secret: bool
) -> None:
    commit = hub.push("org/baked", {**NEEDED, **NEEDLESS}, gated=TOKEN)
    if secret:
        (place / "secret").write_text(TOKEN + "\n")
        monkeypatch.setattr(volume, "_SECRET", place / "secret")
    else:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert volume.main(["bake", "org/baked", "--to", str(place / "models")]) == 0
    assert {path.name for path in (place / "models").iterdir()} == {"models--org--baked", "CACHEDIR.TAG"}
    assert all(TOKEN.encode() not in data for data in content(place / "models").values())
    assert list((place / "volume").iterdir()) == []
    assert not Path(os.environ["HF_HOME"]).exists()
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    model = resolve_model("org/baked")
    assert (model.source, model.revision, content(model.path)) == ("baked", commit, NEEDED)


def test_baking_says_in_one_line_what_is_wrong(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bake", "org/nothing", "--revision", "v1", "--to", str(place / "models")]
    assert volume.main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
