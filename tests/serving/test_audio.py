"""Sound in every format that soundfile writes, and that browsers and phones record."""

import gc
import io
import os
import struct
import subprocess
import tempfile
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.audio import FFMPEG_FORMATS, encode_audio, load_audio
from shared.decoding import decode_base64
from shared.errors import JobError

SECONDS = 2


def tone(rate: int, channels: int = 1, seconds: float = SECONDS, hertz: float = 440) -> np.ndarray:
    """A sine of half scale; a second channel carries silence, so that mono has a quarter of the scale."""
    wave = (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype("float32")
    return wave if channels == 1 else np.stack([wave, *[wave * 0] * (channels - 1)], axis=1)


def encoded(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def check_tone(
    samples: np.ndarray, rate: int, *, peak: float = 0.5, hertz: float = 440, slack_s: float = 0.1
):
    """It is the tone: length, type, pitch to 1 Hz, loudness to 5 percent, no other sound above 1 percent."""
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert samples.flags.writeable, "torch.from_numpy warns of arrays that are not"
    assert abs(len(samples) / rate - SECONDS) <= slack_s
    middle = samples[rate // 2 : rate // 2 + rate]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(rate))) * 4 / rate
    assert spectrum.argmax() == hertz
    assert spectrum.max() == pytest.approx(peak, rel=0.05)
    spectrum[int(hertz) - 3 : int(hertz) + 4] = 0
    assert spectrum.max() < 0.01 * peak


def refusal(data: bytes, **limits) -> JobError:
    with pytest.raises(JobError) as caught:
        load_audio(data, rate=16_000, param="audio_base64", **limits)
    assert caught.value.param == "audio_base64"
    assert caught.value.message.startswith("audio_base64: ")
    return caught.value


@pytest.mark.parametrize(
    ("format", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("WAV", "ULAW"),
        ("WAV", "PCM_U8"),
        ("FLAC", "PCM_16"),
        ("AIFF", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
@pytest.mark.parametrize(("channels", "rate"), [(1, 16_000), (2, 48_000)])
def test_every_format_becomes_mono_at_the_asked_rate(format, subtype, channels, rate):
    data = encoded(tone(rate, channels), rate, format, subtype)
    noisy = subtype in ("ULAW", "PCM_U8")
    samples = load_audio(data, rate=16_000)
    if noisy:
        assert len(samples) == SECONDS * 16_000
    else:
        check_tone(samples, 16_000, peak=0.5 / channels)


@pytest.mark.parametrize("source", [8_000, 11_025, 22_050, 44_100, 96_000, 192_000])
@pytest.mark.parametrize("target", [16_000, 24_000])
def test_resampling_keeps_pitch_and_length(source, target):
    samples = load_audio(encoded(tone(source), source, "WAV", "FLOAT"), rate=target)
    assert abs(len(samples) - SECONDS * target) <= 1
    check_tone(samples, target)


def test_resampling_does_not_fold_high_sounds_into_low_ones():
    """10 kHz is above what 16 kHz can carry: taken sample by sample it would come back as 6 kHz."""
    samples = load_audio(encoded(tone(48_000, hertz=10_000), 48_000), rate=16_000)
    assert np.abs(samples[2_000:-2_000]).max() < 0.001


def test_pieces_join_without_a_seam():
    """Longer than the blocks it is read in; the same as in one piece."""
    import soxr

    wave = tone(44_100, seconds=7)
    samples = load_audio(encoded(wave, 44_100, "WAV", "FLOAT"), rate=16_000)
    np.testing.assert_allclose(samples, soxr.resample(wave, 44_100, 16_000), atol=1e-6)


def test_same_rate_leaves_the_samples_alone():
    wave = tone(16_000)
    assert np.array_equal(load_audio(encoded(wave, 16_000, "WAV", "FLOAT"), rate=16_000), wave)


def test_many_channels_are_averaged():
    samples = load_audio(encoded(tone(16_000, 12), 16_000), rate=16_000)
    assert samples.max() == pytest.approx(0.5 / 12, rel=0.01)


def unknown_length(format: str, seconds: float = SECONDS, length: bytes = b"\xff" * 4) -> bytes:
    """What a program writes to a pipe, where it cannot go back to put the length in."""
    data = bytearray(encoded(tone(16_000, seconds=seconds), 16_000, format))
    if format == "WAV":
        data[4:8] = data[40:44] = length
    else:
        data[21] &= 0xF0
        data[22:26] = bytes(4)
    return bytes(data)


@pytest.mark.parametrize(("format", "length"), [("WAV", b"\xff" * 4), ("WAV", bytes(4)), ("FLAC", b"")])
def test_a_header_without_a_length_is_read_to_its_end(format, length):
    check_tone(load_audio(unknown_length(format, length=length), rate=16_000), 16_000)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_too_long_is_known_from_the_header(format, monkeypatch):
    data = encoded(tone(16_000, seconds=20), 16_000, format)
    assert len(load_audio(data, rate=16_000, max_seconds=20)) == pytest.approx(20 * 16_000, abs=16)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    error = refusal(data, max_seconds=19)
    assert error.code == "too_large"
    assert "19 seconds" in error.message


@pytest.mark.parametrize("format", ["WAV", "FLAC"])
def test_too_long_is_noticed_while_decoding(format):
    data = unknown_length(format, seconds=20)
    assert refusal(data, max_seconds=19).code == "too_large"
    assert len(load_audio(data, rate=16_000, max_seconds=20)) == 20 * 16_000


def test_a_header_that_claims_hours_costs_nothing():
    """A FLAC of two seconds whose header says 2**36 - 1 samples."""
    data = bytearray(encoded(tone(16_000), 16_000, "FLAC"))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    assert refusal(bytes(data)).code == "too_large"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(value):
    wave = tone(16_000)
    wave[100] = value
    assert "not numbers" in refusal(encoded(wave, 16_000, "WAV", "FLOAT")).message


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_absurd_sample_rates_are_refused(rate):
    data = bytearray(encoded(tone(16_000), 16_000))
    data[24:28] = struct.pack("<I", rate)
    assert str(rate) in refusal(bytes(data)).message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(1000),
        b"%PDF-1.7\n" + bytes(range(256)) * 4,
        b"RIFF\0\0\0\0WAVE",
        b"<html>",
        b"ID3" + bytes(9),
    ],
)
def test_what_is_no_sound_is_refused_with_what_to_send(data):
    error = refusal(data)
    assert error.code == "bad_audio"
    assert "WAV, FLAC, MP3" in error.message


@pytest.mark.parametrize("format", ["WAV", "OGG", "AIFF"])
def test_a_file_without_samples_is_refused(format):
    assert refusal(encoded(tone(16_000)[:0], 16_000, format)).code == "bad_audio"


@pytest.mark.parametrize("format", ["WAV", "MP3", "OGG"])
def test_a_file_cut_short_gives_the_sound_that_is_whole(format):
    data = encoded(tone(16_000, seconds=20), 16_000, format)
    samples = load_audio(data[: len(data) // 2], rate=16_000)
    assert 4 < len(samples) / 16_000 < 14


SAMPLES = [
    encoded(tone(16_000, seconds=0.2), 16_000, format) for format in ("WAV", "FLAC", "MP3", "OGG", "AIFF")
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=6))
def test_a_damaged_file_is_read_or_refused(sample, damage):
    data = bytearray(sample)
    for place, value in damage:
        data[place % len(data)] = value
    try:
        assert load_audio(bytes(data), rate=16_000).dtype == np.float32
    except JobError as error:
        assert error.code in ("bad_audio", "too_large")  # noqa: PT017


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "ogg", "opus"])
@pytest.mark.parametrize("channels", [1, 2])
def test_encoded_sound_comes_back(format, channels):
    text = encode_audio(tone(24_000, channels), 24_000, format)
    check_tone(load_audio(decode_base64(text, param="x"), rate=24_000), 24_000, peak=0.5 / channels)


def test_pcm_is_16_bits_without_a_header_and_clips():
    data = decode_base64(encode_audio(np.array([0, 0.5, 2, -2], "float32"), 24_000, "pcm"), param="x")
    assert np.frombuffer(data, "<i2").tolist() == [0, 16384, 32767, -32768]


def test_minutes_of_vorbis_do_not_crash_libsndfile():
    """Written in one piece they overflow its stack and kill the process, measured with libsndfile 1.2.2."""
    text = encode_audio(tone(24_000, seconds=100), 24_000, "ogg")
    assert len(text) > 30_000


RECORDINGS = {
    "m4a": "-f mp4 -c:a aac",
    "m4a streamed": "-f mp4 -c:a aac -movflags frag_keyframe+empty_moov",
    "webm": "-f webm -c:a libopus",
    "mkv": "-f matroska -c:a libvorbis",
    "aac": "-f adts -c:a aac",
    "wma": "-f asf -c:a wmav2",
    "mpegts": "-f mpegts -c:a aac",
    "avi": "-f avi -c:a ac3",
    "flv": "-f flv -c:a aac",
    "mpeg": "-f mpeg -c:a mp2",
    "ac3": "-f ac3 -c:a ac3",
}


def recording(path: Path, options: str, seconds: float = SECONDS) -> bytes:
    """The tone as ffmpeg writes it to a file; an mp4 then has its index at the end."""
    (path / "tone.f32").write_bytes(tone(44_100, seconds=seconds).tobytes())
    argv = f"-v error -y -f f32le -ar 44100 -ac 1 -i tone.f32 {options} recording".split()
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *argv], check=True, cwd=path, stdin=subprocess.DEVNULL)
    return (path / "recording").read_bytes()


@pytest.mark.parametrize("kind", RECORDINGS)
def test_what_soundfile_cannot_read_pyav_does(kind, tmp_path):
    data = recording(tmp_path, RECORDINGS[kind])
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.SoundFile(io.BytesIO(data))
    check_tone(load_audio(data, rate=16_000), 16_000, slack_s=0.2)


@pytest.mark.parametrize("layout", ["", "-ac 2"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_two_channels_are_as_loud_as_soundfile_makes_them(layout, rate, tmp_path):
    lossless = "-c:a flac -sample_fmt s16"
    ours = load_audio(recording(tmp_path, f"{layout} {lossless} -f matroska"), rate=rate)
    theirs = load_audio(recording(tmp_path, f"{layout} {lossless} -f flac"), rate=rate)
    check_tone(ours, rate, peak=np.abs(theirs).max())


@pytest.mark.parametrize("kind", RECORDINGS)
def test_too_long_is_noticed_while_it_is_decoded(kind, tmp_path, monkeypatch):
    """The decoder itself stops soon behind the limit: the rest is never in memory."""
    frames, resampler = [], av.AudioResampler

    class Resampler:
        def __init__(self, *options):
            self.inner = resampler(*options)

        def resample(self, frame):
            frames.append(frame)
            return self.inner.resample(frame)

    monkeypatch.setattr(av, "AudioResampler", Resampler)
    data = recording(tmp_path, RECORDINGS[kind], seconds=30)
    error = refusal(data, max_seconds=10)
    assert error.code == "too_large"
    assert "10 seconds" in error.message
    assert 10 < sum(frame.samples / frame.sample_rate for frame in frames) < 11
    assert 29 < len(load_audio(data, rate=16_000, max_seconds=31)) / 16_000 < 31


def test_a_recording_cut_in_the_middle_gives_what_is_whole_or_is_refused(tmp_path):
    """An mp4 with its index at the end has nothing whole without it; a streamed one has."""
    cut = {kind: recording(tmp_path, RECORDINGS[kind], seconds=20) for kind in RECORDINGS}
    cut = {kind: data[: len(data) // 2] for kind, data in cut.items()}
    assert refusal(cut["m4a"]).code == "bad_audio"
    for kind in ("m4a streamed", "webm", "aac"):
        assert 4 < len(load_audio(cut[kind], rate=16_000)) / 16_000 < 16


def test_the_sound_of_a_video_is_taken(tmp_path):
    picture = "-f lavfi -i testsrc=size=64x64:rate=5:duration=2 -c:v mpeg4 -f mp4"
    check_tone(load_audio(recording(tmp_path, f"{picture} -c:a aac"), rate=16_000), 16_000)
    assert refusal(recording(tmp_path, f"{picture} -map 1:v")).code == "bad_audio"


def test_formats_outside_the_list_are_not_tried(tmp_path):
    """PyAV reads NUT, the list does not name it: so the list works, and it names no playlist."""
    data = recording(tmp_path, "-f nut -c:a pcm_s16le")
    assert refusal(data).code == "bad_audio"
    assert not {"hls", "concat", "dash", "image2", "nut"} & set(FFMPEG_FORMATS.split(","))


@pytest.mark.parametrize(
    "playlist", ["#EXTM3U\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n"]
)
def test_a_playlist_does_not_open_local_files(tmp_path, playlist):
    (tmp_path / "recording.aac").write_bytes(recording(tmp_path, RECORDINGS["aac"]))
    assert refusal(playlist.format(tmp_path / "recording.aac").encode()).code == "bad_audio"


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    data = recording(tmp_path, RECORDINGS["m4a"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    gc.collect()  # what earlier tests have left open is closed before it is counted
    open_files = len(os.listdir("/proc/self/fd"))
    load_audio(data, rate=16_000)
    refusal(b"garbage")
    assert len(os.listdir("/proc/self/fd")) <= open_files
    assert list((tmp_path / "tmp").iterdir()) == []
