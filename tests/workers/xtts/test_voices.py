"""Built-in voices, and voices of recordings."""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from shared.errors import JobError
from tests.helpers import until
from tests.workers.xtts.sounds import Samples, alike, decoded, recording, wav
from tools.models.tiny_xtts import SPEAKERS
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


@pytest.mark.parametrize(
    ("samples", "rate", "seconds"),
    [
        (recording(2.5, rate=8000), 8000, 2.5),
        (np.stack([recording(2.5, rate=48000)] * 2, axis=1), 48000, 2.5),
        (np.pad(recording(2.5, rate=44100), (44100, 88200)), 44100, 2.5),
        (recording(40.0), 22050, 40),
    ],
    ids=["8 kHz", "stereo", "silence around", "long"],
)
def test_recordings_become_samples_at_one_rate(samples: Samples, rate: int, seconds: float) -> None:
    """tests/serving/test_audio.py has the file formats."""
    read = read_recording(base64.b64decode(wav(samples, rate)), "speaker_wav")
    assert read.dtype == np.float32
    assert len(read) / RECORDING_RATE == pytest.approx(seconds, abs=0.1)
    assert np.abs(read).max() <= 1


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
async def test_a_cloned_voice(synthesizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
