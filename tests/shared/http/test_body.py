"""Bodies: JSON, forms with files, and those that are too large, too slow or malformed."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from shared import http_body
from shared.errors import JobError
from shared.http_body import read_fields
from tests.shared.http.test_app import client


def request(*messages: Message, **headers: str) -> Request:
    """A request whose body arrives in these messages; the last one repeats for ever."""
    left = list(messages)

    async def receive() -> Message:
        await asyncio.sleep(0)
        return left.pop(0) if len(left) > 1 else left[0]

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def chunk(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


async def problem(asked: Request) -> tuple[str | int | None, int]:
    with pytest.raises(JobError) as refused:
        await read_fields(asked)
    return refused.value.code, refused.value.status


async def test_json_arrives_in_any_number_of_chunks_under_any_type() -> None:
    for kind in ("application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded", ""):
        split = [b' {"a": ', b"", '"\u00e9"'.encode()[:2], b'\xa9"}']
        asked = request(*map(chunk, split), chunk(b"", more=False), content_type=kind)
        assert await read_fields(asked) == ({"a": "\u00e9"}, False)
    assert await read_fields(request(chunk(b" ", more=False))) == ({}, False)


LARGE = {
    "10,000 texts": {"input": ["a text of some words, and a comma " * 6] * 10_000},
    "a file of 20 MB": {"file": "QUJD" * (7 * 2**20)},
    "numbers in a text": {"input": "1," * 5_000_000 + '\\"'},
}


@pytest.mark.parametrize("case", LARGE)
async def test_a_large_body_leaves_the_event_loop_free(case: str) -> None:
    """The time that this thread computes counts: other processes may hold the cores."""
    body = json.dumps(LARGE[case]).encode()
    begin = time.thread_time()
    fields, _ = await read_fields(request(chunk(body, more=False)))
    assert time.thread_time() - begin < 0.1
    assert fields == LARGE[case]


async def test_a_body_of_too_many_values_is_refused() -> None:
    body = b'{"input": [%s]}' % b",".join([b"1"] * (http_body.MAX_VALUES + 1))
    assert await problem(request(chunk(body, more=False))) == ("too_large", 413)


@pytest.mark.parametrize("body", [b"{", b"[1]", b'"a"', b"\xff\xfe", b"<a/>", b"[" * 100_000, b"null"])
async def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    asked = request(chunk(body, more=False), content_type="application/xml")
    assert await problem(asked) == ("invalid_json", 400)


async def test_a_body_that_stalls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "UPLOAD_TIMEOUT_S", 0.05)
    asked = request(chunk(b""))  # no data, for ever
    assert await problem(asked) == ("body_timeout", 408)


def form(*parts: tuple[str, str | bytes | None], boundary: str = "b") -> bytes:
    """Files are bytes."""
    made = b""
    for name, value in parts:
        file = '; filename="a.wav"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else (value or "").encode()
        made += f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        made += data + b"\r\n"
    return made + f"--{boundary}--\r\n".encode()


async def test_a_form_gives_text_and_the_bytes_of_its_files() -> None:
    file = bytes(range(256)) * 8192  # 2 MiB, with line ends in it
    body = form(("file", file), ("model", "t\u00f6y"), ("tags[]", "one"), ("twice", "1"), ("twice", "2"),
                ("empty", ""))  # fmt: skip
    chunks = [chunk(body[start : start + 65536]) for start in range(0, len(body), 65536)]
    fields = await read_fields(
        request(*chunks, chunk(b"", more=False), content_type='multipart/form-data; boundary="b"')
    )
    expected = {"file": file, "model": "t\u00f6y", "tags[]": ["one"], "twice": ["1", "2"], "empty": ""}
    assert fields == (expected, True)


async def test_an_urlencoded_form_gives_text() -> None:
    kind = "application/x-www-form-urlencoded"
    asked = request(chunk(b"a=1%20x&b=&c[]=2&d=3&d=4", more=False), content_type=kind)
    assert await read_fields(asked) == ({"a": "1 x", "b": "", "c[]": ["2"], "d": ["3", "4"]}, True)
    asked = request(chunk(b"&".join([b"a=1"] * 101), more=False), content_type=kind)
    assert await problem(asked) == ("invalid_form", 400)


GOOD = form(("file", b"RIFF"))
MALFORMED = {
    "no boundary": ("multipart/form-data", GOOD),
    "another boundary": ("multipart/form-data; boundary=other", GOOD),
    "no name": ("multipart/form-data; boundary=b", GOOD.replace(b'name="file"; ', b"")),
    "garbage": ("multipart/form-data; boundary=b", b"\x00\xff" * 100),
    "header without an end": ("multipart/form-data; boundary=b", b"--b\r\n" + b"a" * 100_000),
    "too many fields": ("multipart/form-data; boundary=b", form(*[("a", "1")] * 101)),
    "too many files": ("multipart/form-data; boundary=b", form(*[("a", b"1")] * 9)),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_form_is_refused(case: str) -> None:
    kind, body = MALFORMED[case]
    assert await problem(request(chunk(body, more=False), content_type=kind)) == ("invalid_form", 400)


@pytest.mark.parametrize("body", [b"", GOOD[:-10], GOOD[:40], b"--b--\r\n"])
async def test_a_form_that_is_cut_off_ends_in_a_400(body: bytes) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = await client().post("/v1/audio/transcriptions", content=body, headers=kind)
    assert answer.status_code == 400


TRANSCRIBE = "/v1/audio/transcriptions"


@pytest.mark.parametrize(
    ("data", "files", "expected"),
    [
        ({}, {"file": b"\xff" * 5}, {"text": "5 bytes", "temperature": 0.0}),
        ({"temperature": "0.5", "model": "m"}, {"file": b"12"}, {"text": "2 bytes", "temperature": 0.5}),
        ({"file": "aGk=", "stream": "false"}, None, {"text": "2 bytes", "temperature": 0.0}),
    ],
)
async def test_form_field_types(data: dict[str, str], files: Any, expected: dict[str, Any]) -> None:
    answer = await client().post(TRANSCRIBE, data=data, files=files)
    assert answer.json() == expected


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({"temperature": "warm"}, {"file": b"1"}, "temperature"),
        ({"model": "m"}, {"other": b"1"}, "file"),
        ({"response_format": "xml"}, {"file": b"1"}, "response_format"),
        ({}, {"file": b""}, "file"),
        ({}, {"file": b"1", "model": b"\xff\xfe" * 10_000}, "model"),  # a file where text belongs
    ],
)
async def test_a_wrong_field_of_a_form_is_named(data: dict[str, str], files: Any, param: str) -> None:
    answer = await client().post(TRANSCRIBE, data=data, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert len(answer.text) < 1000


@pytest.mark.parametrize(
    ("response_format", "text", "media_type"),
    [
        ("json", '{"text":"2 bytes","temperature":0.0}', "application/json"),
        ("text", "2 bytes", "text/plain; charset=utf-8"),
        ("wav", "hi", "audio/wav"),
    ],
)
async def test_an_answer_has_its_own_content_type(response_format: str, text: str, media_type: str) -> None:
    body = {"file": "aGk=", "response_format": response_format}
    answer = await client().post(TRANSCRIBE, json=body)
    assert (answer.text, answer.headers["content-type"]) == (text, media_type)
    wrapped = {"input": {"openai_route": TRANSCRIBE, "openai_input": body}}
    answer = await client().post("/runsync", json=wrapped)
    if response_format == "text":
        assert answer.json()["output"] == text


KINDS = ["application/json", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded",
         "text/xml; charset=nonsense", 'multipart/form-data; boundary="', ""]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {}, optional={name: VALUES for name in ("input", "messages", "file", "model", "temperature", "stream")}
)
BODIES = st.one_of(
    st.binary(max_size=200),
    FIELDS.map(json.dumps).map(str.encode),
    st.binary(max_size=60).map(lambda data: form(("file", data))),
    st.tuples(st.binary(max_size=20), st.binary(max_size=20)).map(lambda ends: ends[0].join([GOOD, ends[1]])),
)


HTTP = client()


@given(st.sampled_from(["/runsync", TRANSCRIBE, "/v1/chat/completions"]), st.sampled_from(KINDS), BODIES)
async def test_no_body_is_the_workers_fault(path: str, kind: str, body: bytes) -> None:
    answer = await HTTP.post(path, content=body, headers={"content-type": kind})
    assert answer.status_code < 500, answer.text
