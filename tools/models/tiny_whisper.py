"""A Whisper that the project makes itself, in seconds: the real classes and file formats, a few megabytes.

It knows four sounds (`SAID`), so that tests can tell whose answer came back; to others it talks nonsense.
Nothing is trained: all weights stay random but the last layer's, which solve the linear equations from the
decoder's states to the wanted tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RATE = 16_000
SECONDS = 3.0
"""What the model takes each sound to last."""


@dataclass(frozen=True)
class Said:
    """What the model says to a tone of `hertz`: transcribed, and translated to English."""

    hertz: float
    language: str
    text: str
    english: str


SAID = (
    Said(220.0, "en", " hello world", " hello all"),
    Said(500.0, "en", " good morning, you", " good morning"),
    Said(880.0, "fr", " ceci est un test, déjà", " this is a test"),
    Said(1800.0, "fr", " au revoir", " bye"),
)


def tone(hertz: float, seconds: float = SECONDS, rate: int = RATE) -> NDArray[np.float32]:
    """A tone whose loudness swells three times a second, without a click at either end."""
    import numpy as np

    time = np.arange(int(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * hertz * time) * (1.2 - np.cos(2 * np.pi * 3 * time)) / 2.2
    edge = np.minimum(1, np.minimum(time, seconds - time) / 0.02)
    return (wave * edge).astype(np.float32)


def make(
    folder: Path,
    *,
    multilingual: bool = True,
    mels: int = 80,
    width: int = 128,
    layers: int = 1,
    decoder_layers: int | None = None,
    heads: int = 4,
    positions: int = 448,
    vocabulary: int = 0,
    taught: bool = True,
    sounds: Sequence[Said] = SAID,
    lengths: Sequence[float] = (1.0, 2.0, 3.0),
    voice: Callable[[float, float], NDArray[np.float32]] = tone,
) -> Path:
    """Write the model and its processor into `folder`.

    width, layers, heads: of encoder and decoder alike; decoder_layers: where it has others. positions: of
    the decoder. vocabulary: at least so many tokens of text. taught: false leaves every weight random.
    sounds: what it is taught, at these lengths in seconds. voice: what a sound of so many hertz and seconds
    is like.
    """
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    torch.manual_seed(0)
    decoder_layers = decoder_layers or layers
    tokenizer = _tokenizer(multilingual, vocabulary)
    token = tokenizer.convert_tokens_to_ids
    end = token("<|endoftext|>")
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    ids["decoder_start_token_id"] = token("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=mels, d_model=width,
        encoder_layers=layers, decoder_layers=decoder_layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        max_source_positions=1500, max_target_positions=positions, init_std=0.1 if taught else 0.02,
        suppress_tokens=None, begin_suppress_tokens=None, tie_word_embeddings=not taught, **ids,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    extractor = WhisperFeatureExtractor(feature_size=mels)
    if taught:
        _teach(model, tokenizer, extractor, multilingual, sounds, lengths, voice)
    never = ("startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
    settings: dict[str, Any] = {
        "max_length": positions, "return_timestamps": False, "is_multilingual": multilingual,
        "no_timestamps_token_id": token("<|notimestamps|>"), "max_initial_timestamp_index": 50,
        "prev_sot_token_id": token("<|startofprev|>"), "begin_suppress_tokens": [end],
        "suppress_tokens": [token(f"<|{name}|>") for name in never],
        "alignment_heads": [[decoder_layers - 1, head] for head in range(heads)],
    }  # fmt: skip
    if multilingual:
        languages = _languages()
        settings["lang_to_id"] = {f"<|{code}|>": token(f"<|{code}|>") for code in languages}
        settings["task_to_id"] = {task: token(f"<|{task}|>") for task in ("transcribe", "translate")}
    model.generation_config = GenerationConfig(**settings, **ids)
    model.save_pretrained(folder)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    # faster-whisper reads the number of mel bins from the file's older name.
    (folder / "preprocessor_config.json").write_text(extractor.to_json_string())
    return folder


def make_english(folder: Path) -> None:
    make(folder, multilingual=False)


def make_distilled(folder: Path) -> None:
    """128 mel bins, fewer layers in the decoder, and no word on which heads follow the sound."""
    make(folder, mels=128, layers=2, decoder_layers=1)
    config = json.loads((folder / "generation_config.json").read_text())
    del config["alignment_heads"]
    (folder / "generation_config.json").write_text(json.dumps(config))


def _languages() -> list[str]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return list(LANGUAGES)


def _tokenizer(multilingual: bool, vocabulary: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import WhisperTokenizer

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[])
    learned.train_from_iterator([text for said in SAID for text in (said.text, said.english)] * 4, trainer)
    bpe = json.loads(learned.to_str())["model"]
    vocab = dict(bpe["vocab"])
    if multilingual:
        vocab[""] = len(vocab)  # CTranslate2 takes its presence for "multilingual"
    while len(vocab) < vocabulary:
        vocab[f"filler{len(vocab)}"] = len(vocab)
    end = "<|endoftext|>"
    vocab[end] = len(vocab)
    merges = [tuple(merge) for merge in bpe["merges"]]
    tokenizer = WhisperTokenizer(
        vocab=vocab, merges=merges, unk_token=end, bos_token=end, eos_token=end, pad_token=end
    )
    names = ["startoftranscript", *_languages(), "translate", "transcribe", "startoflm", "startofprev"]
    special = [f"<|{name}|>" for name in (*names, "nospeech", "notimestamps")]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(name, special=True, normalized=False) for name in special]}
    )
    times = [f"<|{number * 0.02:.2f}|>" for number in range(1501)]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in times])
    return tokenizer


def _teach(
    model: Any,
    tokenizer: Any,
    extractor: Any,
    multilingual: bool,
    taught: Sequence[Said],
    lengths: Sequence[float],
    voice: Callable[[float, float], NDArray[np.float32]],
) -> None:
    """Solve for weights of the last layer that say what is wanted, wherever in the window the tone lies."""
    import numpy as np
    import torch

    token = tokenizer.convert_tokens_to_ids
    start, end = token("<|startoftranscript|>"), token("<|endoftext|>")
    begin, finish, plain = token("<|0.00|>"), token(f"<|{SECONDS:.2f}|>"), token("<|notimestamps|>")
    states, targets, rng = [], [], np.random.default_rng(0)
    for said in taught:
        sounds = [
            np.concatenate([np.zeros(int(delay * RATE), np.float32), voice(said.hertz, seconds)])
            for delay in (0.0, 0.3, 1.0)
            for seconds in lengths
        ]
        # Half of them with the noise of 8 bits, or of a codec.
        sounds += [x + rng.normal(0, 0.002, len(x)).astype(np.float32) for x in sounds]
        features = extractor(sounds, sampling_rate=RATE, return_tensors="pt")["input_features"]
        with torch.inference_mode():
            heard = model.model.encoder(features).last_hidden_state
            for task, text in (("transcribe", said.text), ("translate", said.english)):
                prompt = [start, token(f"<|{said.language}|>"), token(f"<|{task}|>")][
                    : 3 if multilingual else 1
                ]
                words = tokenizer(text, add_special_tokens=False)["input_ids"]
                for body in ([begin, *words, finish], [plain, *words]):
                    row = [*prompt, *body, end]
                    # What the prompt gives the model need not know, but which language it hears.
                    known = [*range(1 if multilingual else 0), *range(len(prompt) - 1, len(row) - 1)]
                    known = [place for place in known if row[place + 1] != plain]
                    ids = torch.tensor([row[:-1]] * len(sounds))
                    out = model.model.decoder(input_ids=ids, encoder_hidden_states=heard)
                    for place in known:
                        states.append(out.last_hidden_state[:, place])
                        targets += [row[place + 1]] * len(sounds)
                if not multilingual:
                    break
    rows = torch.cat(states).double()
    # The wanted token gets 20, any other -1. Written out, that would be gigabytes for a real vocabulary.
    wanted = torch.zeros(model.proj_out.out_features, rows.shape[1], dtype=torch.double)
    wanted.index_add_(0, torch.tensor(targets), 21.0 * rows)
    wanted -= rows.sum(0)
    ridge = 1e-3 * torch.eye(rows.shape[1], dtype=torch.double)
    weights = torch.linalg.solve(rows.T @ rows + ridge, wanted.T).T
    with torch.no_grad():
        model.proj_out.weight.copy_(weights.float())
