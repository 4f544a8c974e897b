"""A small random XTTS v2 for `make run-xtts`, tests and benchmarks: real classes and files, made in seconds.

It babbles: no text is to be heard in it. The decoder of latents is as large as XTTS's own, since the library
has its size in the code; sounds are short instead, one frame a token where XTTS has four.
"""

from __future__ import annotations

from pathlib import Path

SPEAKERS = ("Claribel Dervla", "Daisy Studious", "Ana Florence")
LANGUAGES = [
    "en",
    "es",
    "fr",
    "de",
    "it",
    "pt",
    "pl",
    "tr",
    "ru",
    "nl",
    "cs",
    "ar",
    "zh-cn",
    "hu",
    "ko",
    "ja",
    "hi",
]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzàâäçèéêëîïñôöùûüßœæ0123456789!'(),-.:;?\"¿¡"


def make(
    folder: Path, *, layers: int = 2, width: int = 64, tokens: int = 40, ends: bool = True, seed: int = 0
) -> None:
    """Write config.json, model.pth, vocab.json and speakers_xtts.pth into `folder`.

    layers, width: of the transformer. tokens: the most in a piece of speech, of 11 ms each; without `ends`,
    what every piece has.
    """
    import torch
    from tokenizers import Tokenizer, models
    from TTS.tts.configs.xtts_config import XttsArgs, XttsConfig
    from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
    from TTS.tts.models.xtts import Xtts

    folder.mkdir(parents=True, exist_ok=True)
    special = ["[STOP]", "[UNK]", "[SPACE]", *(f"[{name}]" for name in LANGUAGES), "[START]"]
    vocabulary = {token: number for number, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))  # noqa: S106
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "vocab.json"))

    arguments = XttsArgs(
        gpt_layers=layers, gpt_n_model_channels=width, gpt_n_heads=max(2, width // 64),
        decoder_input_dim=width, gpt_max_audio_tokens=tokens + 3, gpt_num_audio_tokens=1026,
        gpt_start_audio_token=1024, gpt_stop_audio_token=1025, gpt_use_perceiver_resampler=True,
        gpt_code_stride_len=256,
    )  # fmt: skip
    config = XttsConfig(model_args=arguments)
    config.languages = list(LANGUAGES)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Xtts(config)
        model.tokenizer = VoiceBpeTokenizer(vocab_file=folder / "vocab.json")
        model.init_models()  # the transformer too, now that the size of the vocabulary is known
        with torch.no_grad():
            # Pieces end anywhere, and the voice can be heard.
            model.gpt.mel_head.bias[arguments.gpt_stop_audio_token] += 1.0 if ends else -1e4
            model.hifigan_decoder.waveform_decoder.conv_post.weight *= 20
        speakers = {
            name: {
                "gpt_cond_latent": torch.randn(1, 32, width) * 0.1,
                "speaker_embedding": torch.nn.functional.normalize(torch.randn(1, 512, 1), dim=1),
            }
            for name in SPEAKERS
        }
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    torch.save(speakers, folder / "speakers_xtts.pth")
    config.save_json(str(folder / "config.json"))
