"""base64 and data: URIs, compared with the standard library's strict decoder."""

from __future__ import annotations

import base64
import string
import urllib.parse
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.decoding import decode_base64, load_bytes
from shared.errors import JobError
from tests.helpers import least_stall

SPACES = " \t\n\r\v\f"
STANDARD = string.ascii_letters + string.digits + "+/"
URL_SAFE = string.ascii_letters + string.digits + "-_"


def with_spaces(text: str, spaces: list[tuple[int, str]]) -> str:
    """`text` with white space inserted at each index."""
    for index, space in spaces:
        index %= len(text) + 1
        text = text[:index] + space + text[index:]
    return text


def strict(text: str) -> bytes:
    """The standard library's strict decoding of the text that `decode_base64` normalises."""
    text = "".join(character for character in text if character not in SPACES)
    text = text.replace("-", "+").replace("_", "/")
    text += "=" * (-len(text) % 4)
    return base64.b64decode(text, validate=True)


@given(
    data=st.binary(max_size=200),
    encode=st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]),
    padded=st.booleans(),
    spaces=st.lists(st.tuples(st.integers(0, 400), st.sampled_from(SPACES)), max_size=5),
)
async def test_base64_data(data: bytes, encode: Any, padded: bool, spaces: list[tuple[int, str]]) -> None:
    text = encode(data).decode()
    text = with_spaces(text if padded else text.rstrip("="), spaces)
    assert decode_base64(text, param="x", max_bytes=len(data)) == data
    if data:
        assert await load_bytes(text, param="x") == data
        for head in ("data:;base64,", "DATA:image/png;charset=x;BASE64,"):
            assert await load_bytes(head + text, param="x") == data
            assert await load_bytes(head + urllib.parse.quote(text, safe=""), param="x") == data
        assert await load_bytes("data:," + urllib.parse.quote(data, safe=""), param="x") == data


NEARLY_BASE64 = st.text(st.sampled_from("AZaz09+/-_==" + SPACES + ":;,%é\u00a0\u2028\ud800"), max_size=12)


@given(st.one_of(st.text(), NEARLY_BASE64, st.text(st.sampled_from(STANDARD + "=")), st.text(URL_SAFE)))
def test_any_text_decodes_as_the_strict_decoder_does_or_is_refused(text: str) -> None:
    refused = None
    try:
        data = decode_base64(text, param="audio.data")
    except JobError as error:
        refused = error
    if refused:
        assert (refused.param, refused.code) == ("audio.data", "bad_base64")
        assert refused.message.startswith("audio.data: ")
    else:
        assert data == strict(text)


@given(st.text(STANDARD, max_size=30), st.text(URL_SAFE, max_size=30))
def test_of_one_alphabet_only_a_lone_last_character_is_refused(standard: str, url_safe: str) -> None:
    for text in (standard, url_safe):
        if len(text) % 4 == 1:
            with pytest.raises(JobError):
                decode_base64(text, param="x")
        else:
            assert decode_base64(text, param="x") == strict(text)


NOT_BASE64 = ["=", "====", "A", "A=", "A===", "QQ===", "QUJD=", "QQ==QQ==", "Q=Q=", "=QQ=", "Q*==", "é"]


@pytest.mark.parametrize("text", [*NOT_BASE64, "Q\u00a0Q", "\ud800", "+-AA"])
def test_text_that_is_not_base64_is_refused(text: str) -> None:
    cause = "mixed" if text == "+-AA" else ""
    with pytest.raises(JobError, match=rf"^x: not valid base64.*{cause}"):
        decode_base64(text, param="x")


@pytest.mark.parametrize(
    ("text", "data"), [("", b""), (" \n", b""), ("QQ", b"A"), ("QQ=", b"A"), ("QR==", b"A")]
)
def test_corner_cases_that_decode(text: str, data: bytes) -> None:
    """The last one has bits behind the last byte; the strict decoder drops them, so it is accepted."""
    assert decode_base64(text, param="x") == data


@pytest.mark.parametrize("padded", [True, False])
def test_the_limit_is_exact_and_comes_before_decoding(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = base64.b64encode(b"x" * 100).decode()
    text = text if padded else text.rstrip("=")
    assert len(decode_base64(text, param="x", max_bytes=100)) == 100
    monkeypatch.setattr(base64, "b64decode", None)
    with pytest.raises(JobError) as caught:
        decode_base64(text, param="x", max_bytes=99)
    assert caught.value.code == "too_large"
    assert "99 bytes" in caught.value.message


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("data:,", "empty"),
        ("data:;base64,", "empty"),
        ("data:image/png;base64", "bad_url"),
        ("data:;base64,Q*==", "bad_base64"),
        ("data:;base64,%ff", "bad_base64"),
        ("file:///etc/passwd", "bad_url"),
        ("ftp://example.com/a.png", "bad_url"),
        ("C:\\pictures\\cat.png", "bad_url"),
        ("/etc/passwd.png", "bad_base64"),
        ("s3://bucket/key", "bad_url"),
        ("javascript:alert(1)", "bad_url"),
    ],
)
async def test_other_sources_are_refused(source: str, code: str) -> None:
    with pytest.raises(JobError) as caught:
        await load_bytes(source, param="image")
    assert (caught.value.code, caught.value.param) == (code, "image")
    assert caught.value.message.startswith("image: ")


@pytest.mark.parametrize("source", ["data:,aaaa", "data:,%61%61%61%61", "data:;base64,YWFhYQ", "YWFhYQ=="])
async def test_the_limit_holds_for_every_inline_source(source: str) -> None:
    assert await load_bytes(source, param="x", max_bytes=4) == b"aaaa"
    with pytest.raises(JobError) as caught:
        await load_bytes(source, param="x", max_bytes=3)
    assert caught.value.code == "too_large"


async def test_non_ascii_in_a_percent_encoded_uri_is_utf_8() -> None:
    assert await load_bytes("data:text/plain,é%C3%A9", param="x") == "éé".encode()


async def test_a_large_text_is_decoded_in_parts_that_do_not_block_the_event_loop() -> None:
    data = bytes(range(256)) * 2**17  # 32 MiB
    text = base64.b64encode(data).decode()
    assert await load_bytes(text, param="x") == data
    assert await least_stall(lambda: load_bytes(text, param="x")) < 0.1
    with pytest.raises(JobError, match="padding"):
        decode_base64("A" * (2**20 - 2) + "==" + "QQ==", param="x")


async def test_bytes_of_a_form_are_taken_as_they_are_within_the_limit() -> None:
    data = b" http://not-a-url\x00\xff "
    assert await load_bytes(data, param="file") == data
    assert await load_bytes(data, param="file", max_bytes=len(data)) == data
    for wrong, limit, code in ((data, len(data) - 1, "too_large"), (b"", 10, "empty")):
        with pytest.raises(JobError) as refused:
            await load_bytes(wrong, param="file", max_bytes=limit)
        assert (refused.value.code, refused.value.param) == (code, "file")
