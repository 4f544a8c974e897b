"""Texts in segments, and segments as token ids."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from shared.errors import JobError
from tools.models.tiny_xtts import LANGUAGES
from workers.xtts.schemas import MAX_TEXT
from workers.xtts.text import TextTokenizer, remove_unspeakable, split_text, spoken_text


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("Hello 👋🏽 world 👨‍👩‍👧 ❤️!", "Hello world !"),
        ("5 € & 10 % @ 20 °", "5 € & 10 % @ 20 °"),
        ("a\x00b\u200bc\ufeffd", "a bcd"),
        ("caf\u0065\u0301", "café"),
        ("नमस्ते", "नमस्ते"),
        ("\U0001f1e9\U0001f1ea ★ → ©", ""),
        ("1️⃣ first", "1 first"),
        ("1\u202f234\u00a0€", "1234 €"),
    ],
)
def test_unspeakable_characters_are_removed(text: str, spoken: str) -> None:
    assert " ".join(remove_unspeakable(text).split()) == spoken


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Smith met Dr. J. R. Jones. He left.", ["Mr. Smith met Dr. J. R. Jones.", "He left."]),
        ("It costs 3.50 dollars. Or 4.", ["It costs 3.50 dollars.", "Or 4."]),
        ("Am 3. Mai kam er. Dann ging er.", ["Am 3. Mai kam er.", "Dann ging er."]),
        ('Well... yes. «Oui.» "No." End', ["Well...", "yes.", "«Oui.»", '"No."', "End"]),
        ("e.g. this, approx. five. Fine.", ["e.g. this, approx. five.", "Fine."]),
        ("今日は。元気ですか？はい", ["今日は。", "元気ですか？", "はい"]),
        ("नमस्ते। कैसे हो?", ["नमस्ते।", "कैसे हो?"]),
        ("كيف حالك؟ بخير.", ["كيف حالك؟", "بخير."]),
        ("In 1999. Then", ["In 1999.", "Then"]),
        ("Take no. 5. No. 6. No. Not that.", ["Take no. 5. No. 6. No.", "Not that."]),
        ("One.\n\n\nTwo\nthree", ["One.", "Two", "three"]),
        ("?! ... -- \n , .", []),
        ("", []),
        ("Yes. ... No.", ["Yes.", "No."]),
    ],
)
def test_a_text_is_split_at_its_sentences(text: str, segments: list[str]) -> None:
    assert [segment.text for segment in split_text(text, 250)] == segments


def test_segments_know_what_ends_them() -> None:
    long = "Word " + "word " * 19 + "and, then; " + "word " * 30
    segments = split_text(f"One. {long.strip()}. Three.\nFour.", 120)
    assert [segment.end for segment in segments] == [
        "sentence", "clause", "word", "sentence", "paragraph", "paragraph",
    ]  # fmt: skip
    assert segments[1].text.endswith("then;")


@pytest.mark.parametrize("limit", [71, 250])
@pytest.mark.parametrize(
    "text",
    [
        "word " * 500,
        "x" * 500,
        "one, two; three: " * 100,
        "。".join("日本語の文章" * n for n in range(1, 20)),
        "，".join(["中文"] * 300),
        " ".join("a" * n for n in range(1, 90)),
    ],
    ids=["words", "one word", "clauses", "japanese", "chinese", "growing words"],
)
def test_nothing_is_lost_and_no_segment_is_over_the_limit(text: str, limit: int) -> None:
    segments = split_text(text, limit)
    assert max(len(segment.text) for segment in segments) <= limit
    assert "".join("".join(segment.text for segment in segments).split()) == "".join(text.split())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["a", ".", "Mr. ", "a. ", '."', "x, ", "。", "\n"])
def test_time_grows_with_the_text_only(unit: str) -> None:
    """The largest text that a job may have, of what makes patterns slow."""
    segments = split_text((unit * MAX_TEXT)[:MAX_TEXT], 250)
    assert all(len(segment.text) <= 250 for segment in segments)


# ---- with the library's tokenizer ----------------------------------------------------------------------


@pytest.fixture
def tokenizer(synthesizer: Any) -> TextTokenizer:
    found: TextTokenizer = synthesizer.text_tokenizer
    return found


@pytest.mark.engine
@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_spoken(tokenizer: TextTokenizer, language: str) -> None:
    """spoken.tsv has twenty texts of each language, and what a speaker of it says."""
    if language == "ja" and not find_spec("cutlet"):
        pytest.skip("cutlet needs mojimoji, which has no wheels for this Python")
    library, base = tokenizer.tokenizer, language.partition("-")[0]
    lines = [line.split("\t") for line in (Path(__file__).parent / "spoken.tsv").read_text().splitlines()]
    wanted, read = {}, {}
    for _, text, spoken in (line for line in lines if line[0] == language):
        read[text] = library.preprocess_text(spoken_text(remove_unspeakable(text), language), base)
        # The library writes these in Latin letters.
        latin = language in ("ja", "ko", "zh-cn")
        wanted[text] = library.preprocess_text(spoken, base) if latin else spoken
    assert len(wanted) == 20
    assert read == wanted
    (segment,) = tokenizer.encode(next(iter(wanted)), language)
    assert segment.token_ids[0] == library.tokenizer.token_to_id(f"[{language}]")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("x" * 500, 2),
        ("9" * 400, None),  # larger than any number with a name
        ("12345678901234567890 " * 12, None),  # much longer when read out
        ("Hello 👋 world!", 1),
        ("𝕳𝖊𝖑𝖑𝖔 ﬁ Å \u202e abc", 1),
    ],
    ids=["a word of 500 letters", "a number of 400 digits", "long numbers", "emoji", "odd letters"],
)
def test_odd_texts(tokenizer: TextTokenizer, text: str, segments: int | None) -> None:
    encoded = tokenizer.encode(text, "en")
    assert segments is None or len(encoded) == segments
    assert all(0 < len(segment.token_ids) <= tokenizer.max_tokens for segment in encoded)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("text", "language", "param", "code"),
    [
        *((text, "en", "text", "nothing_to_say") for text in ("", " \n\t", "👋🎉", "...!?", "— « »")),
        ("Ave.", "la", "language", "unsupported"),
    ],
)
def test_unspeakable_texts(tokenizer: TextTokenizer, text: str, language: str, param: str, code: str) -> None:
    with pytest.raises(JobError) as caught:
        tokenizer.encode(text, language)
    assert (caught.value.param, caught.value.code) == (param, code)
