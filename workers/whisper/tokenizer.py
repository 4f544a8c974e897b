"""Whisper's tokenizer for both engines: faster-whisper's, for every language and task of one model."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from faster_whisper.tokenizer import Tokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from shared.errors import invalid

from .schemas import Task


class WhisperTokenizer:
    """The tokenizer of one model, and the ids of its special tokens.

    max_length: tokens that the decoder has positions for. timestamps: whether the model makes timestamp
    tokens. languages: code by token id; empty for an English-only model.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, multilingual: bool, max_length: int, timestamps: bool
    ) -> None:
        self.max_length, self.timestamps = max_length, timestamps
        self._english = Tokenizer(tokenizer, multilingual=False)
        self.eot: int = self._english.eot
        self.sot: int = self._english.sot
        self.no_timestamps: int = self._english.no_timestamps
        self.timestamp_begin: int = self._english.timestamp_begin
        self.no_speech: int = self._english.no_speech or self.no_timestamps - 1
        ids = {code: tokenizer.token_to_id(f"<|{code}|>") for code in LANGUAGES} if multilingual else {}
        self.languages: dict[int, str] = {token: code for code, token in ids.items() if token is not None}
        tasks: tuple[Task, ...] = ("transcribe", "translate")
        self._by_language = {
            (code, task): Tokenizer(tokenizer, True, task, code)
            for code in self.languages.values()
            for task in tasks
        }

    def language_code(self, requested: str | None, task: Task) -> str | None:
        """The code of the language that a request names; None: to be detected.

        Raises JobError for a language or a task that the model does not have.
        """
        name = None if requested is None else requested.strip("<|> ").lower()
        if not self.languages:
            if task == "translate":
                raise invalid("task", "this model only transcribes English. Use transcribe.")
            if name not in (None, "", "en", "english"):
                raise invalid("language", f"{requested!r}, and this model knows only English.")
            return "en"
        if name is None:
            return None
        code = str(TO_LANGUAGE_CODE.get(name, name))
        if code not in self.languages.values():
            known = ", ".join(sorted(self.languages.values()))
            raise invalid("language", f"{str(requested)[:40]!r} is not known. Use one of {known}.")
        return code

    def language_name(self, code: str | None) -> str:
        """`french` for `fr`."""
        return str(LANGUAGES.get(code or "", code or ""))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._english.encode(text)
        return ids

    def encode_prompt(self, text: str | None) -> list[int]:
        """The token ids of a request's `prompt`, cut to its end where it is longer than the model takes."""
        if not text or not text.strip():
            return []
        ids = [token for token in self.encode(f" {text.strip()}") if token < self.eot]
        return [self._english.sot_prev, *ids[-(self.max_length // 2 - 1) :]]

    def sot_sequence(self, language: str | None, task: Task) -> list[int]:
        """The token ids before the transcript, without a prompt."""
        if not self.languages:
            sequence: list[int] = self._english.sot_sequence
        else:
            sequence = self._by_language[language or "en", task].sot_sequence
        return sequence if self.timestamps else [*sequence, self.no_timestamps]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens left out."""
        text: str = self._english.decode(tokens)
        return text

    def split_to_words(self, tokens: Sequence[int], language: str | None) -> list[tuple[str, int]]:
        """The words and punctuation marks of text tokens, and how many tokens each has."""
        tokenizer = self._by_language.get((language or "en", "transcribe"), self._english)
        words, word_tokens = tokenizer.split_to_word_tokens(list(tokens))
        return [(word, len(ids)) for word, ids in zip(words, word_tokens, strict=True)]
