"""The two engines beside each other and beside transformers' generate(), and which models they load."""

from pathlib import Path
from typing import Any

import ctranslate2
import pytest
import torch

from shared.errors import StartError
from shared.volume import ModelPath
from tests.workers.whisper.support import (
    CECI,
    ENGINES,
    HELLO,
    MORNING,
    REVOIR,
    decode_request,
    engine_test,
    load,
    sound,
)
from tools.models import made
from tools.models import tiny_whisper as tiny
from workers.whisper import alignment, engine_transformers
from workers.whisper.alignment import token_starts

Transcribers = dict[str, Any]


@pytest.fixture
def transcribers(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Transcribers:
    """By engine."""
    model = made("whisper", tiny.make)
    return {name: load(name, model, monkeypatch, cache).transcriber for name in ENGINES}


@engine_test
def test_both_engines_give_the_same_result(transcribers: Transcribers) -> None:
    compared = 0
    for hertz, language, task, prompt in [
        (HELLO.hertz, "en", "transcribe", None),
        (MORNING.hertz, "en", "translate", None),
        (CECI.hertz, "fr", "transcribe", None),
        (CECI.hertz, "en", "transcribe", "hello, you"),
        (REVOIR.hertz, "fr", "translate", "ceci est un test"),
        (650.0, "fr", "transcribe", None),
    ]:
        results = []
        for transcriber in transcribers.values():
            fields = {"language": language, "task": task}
            fields["prompt"] = transcriber.tokenizer.encode_prompt(prompt)
            results += transcriber.engine.decode([decode_request(transcriber, sound(hertz, 4), **fields)])
        a, b = results
        assert a.tokens == b.tokens
        assert a.avg_logprob == pytest.approx(b.avg_logprob, abs=0.01)
        assert a.no_speech_prob == pytest.approx(b.no_speech_prob, abs=0.01)
        if token_starts(a) and token_starts(b):
            compared += 1
            assert token_starts(a) == pytest.approx(token_starts(b), abs=0.05)
    assert compared >= 4


@engine_test
@pytest.mark.parametrize(("prompt", "most"), [(None, 224), ("hello, you " * 90, 221)])
def test_the_length_limit_of_both_engines(transcribers: Transcribers, prompt: str | None, most: int) -> None:
    """Of a model that may not end: half of its 448 positions, or what a long prompt leaves."""
    lengths = {}
    for name, transcriber in transcribers.items():
        if name == "transformers":
            transcriber.engine.model.generation_config.suppress_tokens += [transcriber.tokenizer.eot]
        else:
            transcriber.engine.suppress += [transcriber.tokenizer.eot]
        fields = {"prompt": transcriber.tokenizer.encode_prompt(prompt), "word_timestamps": False}
        (result,) = transcriber.engine.decode([decode_request(transcriber, sound(HELLO.hertz), **fields)])
        lengths[name] = len(result.tokens)
    assert lengths["transformers"] == most
    assert lengths["faster-whisper"] in (most, most + 1), "CTranslate2 makes one more after a long prompt"


@engine_test
def test_alignment_heads_one_by_one(transcribers: Transcribers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a checkpoint does not name them, a large model has 320."""
    shapes, real = [], alignment.median_filter
    monkeypatch.setattr(
        alignment, "median_filter", lambda values: shapes.append(values.shape) or real(values)
    )
    transcriber = transcribers["transformers"]
    (result,) = transcriber.engine.decode([decode_request(transcriber, sound(HELLO.hertz))])
    text = [token for token in result.tokens if token < transcriber.tokenizer.eot]
    assert len(transcriber.engine.alignment_heads) == 4
    # A token each for the start, the language, the task, no timestamps, and the end.
    assert shapes == [(len(text) + 5, 150)] * 4


@engine_test
@pytest.mark.parametrize("beams", [1, 3])
def test_a_request_alone_gives_what_generate_gives(transcribers: Transcribers, beams: int) -> None:
    transcriber = transcribers["transformers"]
    eot = transcriber.tokenizer.eot
    for said in tiny.SAID:
        samples = sound(said.hertz, 2.5)
        tokens = transcriber.engine.model.generate(
            torch.from_numpy(transcriber.log_mel(samples))[None],
            language=said.language,
            task="translate",
            num_beams=beams,
            return_timestamps=True,
        )[0].tolist()
        tokens = tokens[: tokens.index(eot)] if eot in tokens else tokens
        fields = {"language": said.language, "task": "translate", "beam_size": beams}
        (result,) = transcriber.engine.decode([decode_request(transcriber, samples, **fields)])
        assert result.tokens == tokens


@engine_test
@pytest.mark.parametrize("multilingual", [True, False])
def test_the_vocabulary_tells_whether_a_fine_tune_is_multilingual(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, multilingual: bool
) -> None:
    size = 51_865 if multilingual else 0
    tiny.make(tmp_path, width=16, heads=2, vocabulary=size, taught=False, multilingual=multilingual)
    (tmp_path / "generation_config.json").unlink()
    tokenizer = load("transformers", tmp_path, monkeypatch, cache).transcriber.tokenizer
    assert bool(tokenizer.languages) == multilingual


@engine_test
def test_conversion_to_ctranslate2_happens_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = made("whisper", tiny.make)
    runs = []
    converter = ctranslate2.converters.TransformersConverter
    real = converter.convert
    monkeypatch.setattr(
        converter, "convert", lambda self, *args, **options: runs.append(args) or real(self, *args, **options)
    )
    load("faster-whisper", model, monkeypatch, tmp_path)
    load("faster-whisper", model, monkeypatch, tmp_path)
    load("faster-whisper", model, monkeypatch, tmp_path, compute_type="int8")
    assert len(runs) == 2, "once for float32, once for the quantised one"
    folder = next((tmp_path / "ctranslate2").glob("*/*-float32-*/model.bin")).parent
    assert not list((tmp_path / "ctranslate2").glob("*/tmp*")), "no temporary folder is left"
    transcriber = load("faster-whisper", folder, monkeypatch, tmp_path).transcriber
    assert len(runs) == 2
    # Beside the original model the converted one needs no tokenizer, and none is downloaded.
    monkeypatch.setattr("faster_whisper.WhisperModel", None)
    (folder / "tokenizer.json").rename(folder / "other.json")
    load("faster-whisper", model, monkeypatch, tmp_path)
    (folder / "other.json").rename(folder / "tokenizer.json")
    (result,) = transcriber.engine.decode([decode_request(transcriber, sound(CECI.hertz), language=None)])
    assert (result.language, transcriber.tokenizer.decode(result.tokens)) == ("fr", CECI.text)
    with pytest.raises(StartError, match="ENGINE=faster-whisper") as caught:
        load("transformers", folder, monkeypatch, tmp_path)
    assert caught.value.code == "unsupported_architecture"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"model_type": "llava"}'}, "type llava"),
        # CTranslate2's format, of newer and older converters.
        ({"config.json": "{}", "model.bin": "", "vocabulary.json": "[]"}, "Set ENGINE=faster-whisper"),
        ({"config.json": "{}", "model.bin": "", "vocabulary.txt": ""}, "Set ENGINE=faster-whisper"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    model_path = ModelPath(tmp_path, "some/model", None, "local", 0)
    with pytest.raises(StartError, match=message) as caught:
        engine_transformers.load(
            model_path, name="some/model", device=torch.device("cpu"), dtype=torch.float32, timestamps=True
        )
    assert caught.value.code == "unsupported_architecture"
