"""The tokenizer beside transformers' own."""

import pytest
from transformers import WhisperTokenizerFast

from shared.errors import JobError
from tests.workers.whisper.support import engine_test
from tools.models import made
from tools.models import tiny_whisper as tiny
from workers.whisper.tokenizer import WhisperTokenizer

pytestmark = engine_test


@pytest.fixture(scope="module")
def library() -> WhisperTokenizerFast:
    return WhisperTokenizerFast.from_pretrained(made("whisper", tiny.make))


@pytest.fixture(scope="module")
def tokenizer(library: WhisperTokenizerFast) -> WhisperTokenizer:
    return WhisperTokenizer(library.backend_tokenizer, multilingual=True, max_length=448, timestamps=True)


def test_text_and_prompt_tokens(library: WhisperTokenizerFast, tokenizer: WhisperTokenizer) -> None:
    ids = library(" ceci est un test, déjà", add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(" ceci est un test, déjà") == ids
    assert tokenizer.decode([tokenizer.timestamp_begin, *ids, tokenizer.eot]) == " ceci est un test, déjà"
    assert tokenizer.encode_prompt(" hello ") == library.get_prompt_ids("hello").tolist()
    assert tokenizer.encode_prompt(" ") == tokenizer.encode_prompt(None) == []
    long = tokenizer.encode_prompt("hello, you " * 90)
    assert len(long) == 224
    assert long[1:] == tokenizer.encode(" hello, you" * 90)[-223:]


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        (" hello, world!", "en", [" hello", ",", " world", "!"]),
        (" déjà", "fr", [" déjà"]),
        (" déjà", None, [" déjà"]),
        ("你好。", "zh", ["你", "好", "。"]),
    ],
)
def test_word_split(tokenizer: WhisperTokenizer, text: str, language: str | None, words: list[str]) -> None:
    tokens = tokenizer.encode(text)
    split = tokenizer.split_to_words(tokens, language)
    assert [word for word, _ in split] == words
    assert sum(count for _, count in split) == len(tokens)


@pytest.mark.parametrize("name", ["fr", "French", " french ", "<|fr|>"])
def test_languages_are_codes_or_names(tokenizer: WhisperTokenizer, name: str) -> None:
    assert tokenizer.language_code(name, "transcribe") == "fr"
    assert tokenizer.language_name("fr") == "french"


def test_unknown_languages_are_refused_with_the_known_ones(tokenizer: WhisperTokenizer) -> None:
    assert tokenizer.language_code(None, "transcribe") is None
    with pytest.raises(JobError, match=r"'klingon'.* de, ") as caught:
        tokenizer.language_code("klingon", "transcribe")
    assert (caught.value.param, caught.value.code) == ("language", "invalid_value")
