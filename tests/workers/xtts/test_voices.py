"""Built-in voices, and voices of recordings."""

from __future__ import annotations

import asyncio
import base64
import itertools
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from shared.errors import JobError
from tests.helpers import error, until
from tests.workers.xtts.sounds import Samples, alike, decoded, recording, wav
from tools.tiny_xtts import SPEAKERS
from workers.xtts.voices import (
    RECORDING_RATE,
    Voice,
    VoiceCache,
    Voices,
    clone_voice,
    noise_recording,
    read_recording,
)

engine = pytest.mark.engine


def m4a(samples: Samples, rate: int) -> str:
    """As a telephone records it; its index is at the end, so that ffmpeg needs a file to write."""
    import imageio_ffmpeg

    with tempfile.NamedTemporaryFile(suffix=".m4a") as file:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", "pipe:0", file.name]
        subprocess.run(command, input=base64.b64decode(wav(samples, rate)), check=True)
        return base64.b64encode(Path(file.name).read_bytes()).decode()


@cache
def recordings() -> dict[str, str]:
    sound = recording(2.5, rate=44100)
    stereo = np.stack([sound, sound * 0.5], axis=1)
    return {
        "16 bit": wav(sound, 44100, subtype="PCM_16"),
        "24 bit stereo": wav(stereo, 44100, subtype="PCM_24"),
        "8 bit": wav(recording(2.5, rate=8000), 8000, subtype="PCM_U8"),
        "float": wav(sound, 44100, subtype="FLOAT"),
        "flac": wav(sound, 44100, format="FLAC"),
        "mp3": wav(sound, 44100, format="MP3"),
        "ogg": wav(sound, 44100, format="OGG"),
        "opus": wav(recording(2.5, rate=48000), 48000, format="OGG", subtype="OPUS"),
        "m4a": m4a(sound, 44100),
        "48 kHz": wav(recording(2.5, rate=48000), 48000),
        "long": wav(recording(40.0)),
        "with silence around": wav(np.pad(sound, (44100, 88200)), 44100),
    }  # fmt: skip


@pytest.mark.parametrize("name", recordings())
def test_recordings_of_many_kinds(name: str) -> None:
    samples = read_recording(base64.b64decode(recordings()[name]), "speaker_wav")
    assert samples.dtype == np.float32
    assert len(samples) / RECORDING_RATE == pytest.approx(40 if name == "long" else 2.5, abs=0.1)
    assert np.abs(samples).max() <= 1


def test_the_noise_of_the_prewarm_is_a_recording() -> None:
    assert len(read_recording(base64.b64decode(noise_recording()), "speaker_wav")) > 5 * RECORDING_RATE


@pytest.fixture
def voices() -> Voices:
    async def clone(recordings: list[Samples]) -> Voice:
        return Voice(torch.tensor([len(recordings)]), torch.zeros(1))

    executor = ThreadPoolExecutor(1)
    return Voices({}, default=None, cache_size=4, clone=clone, executor=executor)


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (wav(recording(0.2)), "too_short"),
        (wav(np.concatenate([recording(0.5), np.zeros(22050 * 5, np.float32)])), "too_short"),
        (wav(np.zeros(22050 * 4, np.float32)), "silent"),
        (wav(np.full(22050 * 4, 5e-4, np.float32)), "silent"),
        (base64.b64encode(b"%PDF-1.7 named voice.wav").decode(), "bad_audio"),
        (wav(recording(3.0))[:40], "bad_audio"),
        ("no base64!", "bad_base64"),
        (" ", "empty"),
        ("http://127.0.0.1:9/voice.wav", "download_failed"),
        ("file:///etc/passwd", "bad_url"),
    ],
)
async def test_recordings_without_a_voice(voices: Voices, source: str, code: str) -> None:
    for sources, param in (([source], "speaker_wav"), ([wav(recording()), source], "speaker_wav.1")):
        with pytest.raises(JobError) as caught:
            await voices.from_recordings(sources)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert "root:" not in str(caught.value)


# ---- the cache -----------------------------------------------------------------------------------------


@pytest.fixture
def made() -> list[str]:
    return []


@pytest.fixture
def get(made: list[str]) -> Iterator[Any]:
    voice_cache = VoiceCache(4)

    def get(key: str, *, fails: bool = False) -> Any:
        async def make() -> Voice:
            made.append(key)
            await asyncio.sleep(0.01)
            if fails:
                raise ZeroDivisionError
            return Voice(torch.zeros(1), torch.zeros(1))

        return voice_cache.get(key, make)

    yield get
    assert len(voice_cache.voices) <= 4


async def test_a_voice_is_made_once_and_the_least_recently_used_is_dropped(get: Any, made: list[str]) -> None:
    first, *others = await asyncio.gather(*(get("a") for _ in range(5)))
    assert all(voice is first for voice in others), "jobs that wait for the same voice share it"
    for key in "bcd":
        await get(key)
    assert await get("a") is first, "it is now the most recently used"
    await get("e")
    assert made == list("abcde")
    assert await get("a") is first
    await get("b")
    assert made == list("abcdeb")


async def test_a_cancelled_job_leaves_the_voice_to_others(get: Any, made: list[str]) -> None:
    leaves, stays = (asyncio.create_task(get("a")) for _ in range(2))
    await until(lambda: made)
    leaves.cancel()
    assert isinstance(await stays, Voice)
    assert made == ["a"]
    assert leaves.cancelled()


async def test_a_failure_is_not_kept(get: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        await get("a", fails=True)
    assert isinstance(await get("a"), Voice)


async def test_the_key_is_the_content_of_all_recordings(voices: Voices) -> None:
    one, other = wav(recording(1.2)), wav(recording(1.2, pitch=300))
    single = await voices.from_recordings([one])
    assert await voices.from_recordings([f"data:audio/wav;base64,{one}"]) is single
    pair = await voices.from_recordings([one, other])
    assert (single.latents.item(), pair.latents.item()) == (1, 2)
    assert await voices.from_recordings([other, one]) is not pair


# ---- with the model ------------------------------------------------------------------------------------


@engine
async def test_a_clone_is_the_librarys(
    synthesizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`get_conditioning_latents` of files, whose reader would need ffmpeg's libraries, by soundfile here."""
    from TTS.tts.models import xtts as library

    def load_audio(path: str, rate: int) -> torch.Tensor:
        samples, file_rate = soundfile.read(path, dtype="float32")
        assert file_rate == rate
        return torch.from_numpy(samples)[None].clip(-1, 1)

    monkeypatch.setattr(library, "load_audio", load_audio)
    model, call = synthesizer.engine.model, synthesizer.engine.call
    sounds = [recording(3.0), recording(14.0, pitch=250)]
    paths = [str(tmp_path / f"{number}.wav") for number in range(2)]
    for path, samples in zip(paths, sounds, strict=True):
        soundfile.write(path, samples, 22050, subtype="FLOAT")
    latents, embedding = await call(
        lambda: model.get_conditioning_latents(
            paths, max_ref_length=model.config.max_ref_len, gpt_cond_len=model.config.gpt_cond_len,
            gpt_cond_chunk_len=model.config.gpt_cond_chunk_len,
        )
    )  # fmt: skip
    voice = await call(lambda: clone_voice(model, sounds))
    assert torch.allclose(voice.latents, latents, atol=1e-5)
    assert torch.allclose(voice.embedding, embedding, atol=1e-5)


@engine
async def test_voices_sound_each_like_itself(say: Any) -> None:
    voices: list[dict[str, Any]] = [{}, *({"speaker": name} for name in SPEAKERS)]
    voices += [{"speaker_wav": wav(recording(pitch=pitch))} for pitch in (120, 300)]
    sounds = [decoded(await say(temperature=0, **voice)) for voice in voices]
    assert alike(sounds[0], sounds[1 + SPEAKERS.index("Ana Florence")])
    for one, other in itertools.combinations(sounds[1:], 2):
        assert not alike(one, other)


@engine
@pytest.mark.parametrize("name", ["Nobody", "../config"])
async def test_unknown_voices_are_refused(worker: ModuleType, name: str) -> None:
    problem = await error(worker.handler, text="Hello.", speaker=name)
    assert (problem["param"], problem["code"]) == ("speaker", "unknown_voice")
    assert all(voice in problem["message"] for voice in SPEAKERS)
