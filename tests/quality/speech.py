"""Speech whose words and times are known: a real telephone call, and espeak-ng in six languages."""

from __future__ import annotations

import ctypes
import ctypes.util
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from tools.demos import telephone_call

RATE = 16_000
PAUSE_S = 0.8
Samples = NDArray[np.float32]
SENTENCES = {
    "en": [
        "The old harbour is quiet in winter, and only a few boats are left.",
        "My sister bought three bottles of milk and a loaf of bread this morning.",
        "Please close the window before you leave the house.",
        "The train to the city leaves every twenty minutes.",
    ],
    "de": [
        "Im Winter ist der alte Hafen still, und nur wenige Boote liegen dort.",
        "Meine Schwester hat heute Morgen drei Flaschen Milch und ein Brot gekauft.",
        "Bitte schließe das Fenster, bevor du das Haus verlässt.",
        "Der Zug in die Stadt fährt alle zwanzig Minuten.",
    ],
    "es": [
        "En invierno el viejo puerto está tranquilo y quedan pocos barcos.",
        "Mi hermana compró tres botellas de leche y una barra de pan esta mañana.",
        "Por favor, cierra la ventana antes de salir de casa.",
        "El tren a la ciudad sale cada veinte minutos.",
    ],
    "fr": [
        "En hiver, le vieux port est calme et il ne reste que quelques bateaux.",
        "Ma soeur a acheté trois bouteilles de lait et une baguette ce matin.",
        "Fermez la fenêtre avant de quitter la maison, merci.",
        "Le train pour la ville part toutes les vingt minutes.",
    ],
    "it": [
        "In inverno il vecchio porto è tranquillo e restano poche barche.",
        "Mia sorella ha comprato tre bottiglie di latte e un pezzo di pane stamattina.",
        "Per favore, chiudi la finestra prima di uscire di casa.",
        "Il treno per la città parte ogni venti minuti.",
    ],
    "pt": [
        "No inverno o velho porto está calmo e restam poucos barcos.",
        "Minha irmã comprou três garrafas de leite e um pão esta manhã.",
        "Por favor, feche a janela antes de sair de casa.",
        "O trem para a cidade sai a cada vinte minutos.",
    ],
}


@dataclass(frozen=True)
class SpokenWord:
    """start: seconds; None where it is not known."""

    text: str
    start: float | None


@dataclass(frozen=True)
class Recording:
    """samples: mono, at RATE. language: of its words."""

    name: str
    samples: Samples
    language: str
    words: list[SpokenWord]

    def wav(self) -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, self.samples, RATE, format="WAV", subtype="PCM_16")
        return buffer.getvalue()


def call() -> Recording:
    """The telephone call. Of each utterance the first word's start is known."""
    wav, utterances = telephone_call()
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    assert rate == RATE
    words = [
        SpokenWord(word, None if i else said.start)
        for said in utterances
        for i, word in enumerate(said.text.split())
    ]
    return Recording("telephone call", samples, "en", words)


def non_speech(seconds: float = 30.0) -> list[Recording]:
    """Silence, noise, and chords of six tones that change every second."""
    rng, times = np.random.default_rng(0), np.arange(int(seconds * RATE)) / RATE
    music = np.zeros_like(times)
    for beat in range(int(seconds)):
        root, inside = 220 * 2 ** (rng.integers(12) / 12), (times >= beat) & (times < beat + 1)
        fading = np.exp(-2 * (times[inside] - beat))
        for step in (0, 4, 7, 12, 16, 19):
            music[inside] += fading * np.sin(2 * np.pi * root * 2 ** (step / 12) * times[inside])
    sounds = {
        "silence": np.zeros_like(times),
        "noise": rng.normal(0, 0.05, len(times)),
        "music": 0.08 * music,
    }
    return [Recording(name, sound.astype(np.float32), "en", []) for name, sound in sounds.items()]


def espeak_missing() -> str | None:
    """Why espeak-ng's library cannot speak here; None where it can."""
    return None if ctypes.util.find_library("espeak-ng") else "no espeak-ng: apt-get install espeak-ng"


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


WORD, SYNCHRONOUS, BY_CHARACTER, UTF8 = (
    1,
    2,
    1,
    1,
)  # espeakEVENT_WORD, AUDIO_OUTPUT_..., POS_..., espeakCHARS_


def spoken(language: str) -> Recording:
    """The language's sentences with pauses, and when espeak-ng begins each word."""
    parts, words, length = [], [], 0
    for sentence in SENTENCES[language]:
        pause = np.zeros(int(PAUSE_S * RATE), np.float32)
        samples, starts = _speak(language, sentence)
        for text, start in starts:
            words.append(SpokenWord(text, (length + len(pause)) / RATE + start))
        parts += [pause, samples]
        length += len(pause) + len(samples)
    return Recording(f"espeak-ng, {language}", np.concatenate(parts), language, words)


def _speak(language: str, text: str) -> tuple[Samples, list[tuple[str, float]]]:
    library = ctypes.CDLL(ctypes.util.find_library("espeak-ng") or "")
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, None, 0)
    blocks: list[NDArray[np.int16]] = []
    begins: list[tuple[int, float]] = []  # position in the text, from 1, and seconds

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
    def receive(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type:
            if events[index].type == WORD:
                begins.append((events[index].text_position, events[index].audio_position / 1000))
            index += 1
        return 0

    library.espeak_SetSynthCallback(receive)
    assert library.espeak_SetVoiceByName(language.encode()) == 0
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, BY_CHARACTER, 0, UTF8, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(blocks).astype(np.float32) / 32768
    starts, position = [], 0
    for word in text.split():
        position = text.index(word, position) + 1
        starts.append((word, min(begins, key=lambda begin: abs(begin[0] - position))[1]))
    return soxr.resample(samples, rate, RATE).astype(np.float32), starts
