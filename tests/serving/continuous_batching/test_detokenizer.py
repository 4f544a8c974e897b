"""The text half of generation: characters stay whole, stop strings never show, however tokens are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serving.continuous_batching.detokenizer import Detokenizer, StopStrings

LETTERS = "ab<>"


def byte_level() -> Tokenizer:
    """GPT-2's way: every token is some bytes of UTF-8, and a token may end within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama's way: words with a mark for the space before them, and single bytes for what has no token."""
    words = ["\u2581", "\u2581the", "\u2581cat", "s", "\u00e9", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


def ids_of(name: str, text: str) -> list[int]:
    tokenizer = TOKENIZERS[name]
    if name == "byte-level":
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        return [tokenizer.token_to_id(letter) for word, _ in letters for letter in word]
    known = {" the": 1, " cat": 2, "s": 3, "\u00e9": 4}
    ids, rest = [], text
    while rest:
        word = next((w for w in known if rest.startswith(w)), rest[0])
        if word in known:
            ids.append(known[word])
        else:
            ids += [5 + byte for byte in word.encode()]
        rest = rest[len(word) :]
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_text_in_parts_is_the_text_of_all_tokens(name: str, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("a \u00e9\u20ac\U0001f600\ufffdthe cats"), max_size=30))
    ids = ids_of(name, text)
    whole = TOKENIZERS[name].decode(ids)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    detokenizer = Detokenizer(TOKENIZERS[name].decode)
    pieces = [detokenizer.feed(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)] + [
        detokenizer.feed([], last=True)
    ]
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert "\ufffd" not in "".join(pieces[:-1]), "a piece ended within a character"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_answer_is_the_text_after_the_prompts(size: int) -> None:
    """Its first space too, which the decoder strips from a text."""
    prompt, answer = ids_of("byte-fallback", " cats the cats"), ids_of("byte-fallback", " the cat s")
    decode = TOKENIZERS["byte-fallback"].decode
    detokenizer = Detokenizer(decode, prompt[-size:])
    assert "".join(detokenizer.feed([token_id]) for token_id in answer) == " the cat s"
    assert Detokenizer(decode, prompt).feed(answer, last=True) == " the cat s"


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZERS["byte-level"].decode)
    emoji = ids_of("byte-level", "\U0001f600")
    assert detokenizer.feed(ids_of("byte-level", "a")) == "a"
    assert [detokenizer.feed([token]) for token in emoji[:3]] == ["", "", ""]
    assert detokenizer.feed([], last=True) == "\ufffd"


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first stop string that is complete cuts; of two, the longer."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


@given(
    st.text(LETTERS, max_size=30),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_across_any_chunks(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, expected_hit = reference(text, stops)
    cutter = StopStrings(stops)
    out, hit = "", False
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for a, b in pairwise(edges):
        piece, hit = cutter.feed(text[a:b])
        out += piece
        assert expected.startswith(out), "part of a stop string went out"
        if hit:
            break
    else:
        out += cutter.rest()
    assert (out, hit) == (expected, expected_hit)


def test_hidden_text_is_part_of_a_stop_string_and_not_emitted() -> None:
    cutter = StopStrings(["b<|x|>c"])
    assert cutter.feed("a") == ("a", False)
    assert cutter.feed("<|x|>", hidden=True) == ("", False)
    assert cutter.feed("ab") == ("a", False)
    assert cutter.feed("<|x|>", hidden=True) == ("", False)
    assert cutter.rest() == "b"
    assert cutter.feed("db") == ("bd", False)
    assert cutter.feed("<|x|>", hidden=True) == ("", False)
    assert cutter.feed("c") == ("", True)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    cutter = StopStrings(["</s>"])
    assert cutter.feed("a < b </") == ("a < b ", False)
    assert cutter.feed("b>") == ("</b>", False)
    assert cutter.rest() == ""
