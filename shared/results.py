"""A handler's result as plain JSON within the platform's limit, or uploaded to a bucket."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

from shared.errors import JobError, not_finite, replace_lone_surrogates
from shared.logs import log

JSON, EVENTS = "application/json", "text/event-stream"

T = TypeVar("T")
_PART = 256  # items of a list that are dumped at a time
_BUCKET = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")


class Result(dict[str, Any]):
    """A finished result. The SDK formats results for its debug log even while that log is off."""

    def __init__(self, content: Mapping[str, Any], size: int) -> None:
        super().__init__(content)
        self.size = size

    def __repr__(self) -> str:
        return f"<result of {self.size} bytes>"


class PlainList(list[T]):
    """Objects that JSON has a form for, and nothing else: a long one in an answer is not copied."""


@dataclass(frozen=True, slots=True)
class Media:
    """An answer, or a part of one, that HTTP sends as it is. data: bytes of the type `media_type`."""

    data: bytes
    media_type: str


async def to_plain(result: Any) -> tuple[Any, bytes]:
    """`result` as plain objects and as JSON: models dumped, numpy arrays and scalars as lists and numbers.

    Raises JobError(type="server_error") for a value that JSON has no form for: NaN, infinities, bytes that
    are not UTF-8, objects. Writing the JSON blocks the event loop, for about 25 ms with 9 MB of floats.
    """
    try:
        # The objects first: a model's own JSON has null for NaN, and the plain objects' has NaN.
        content = await _plain_objects(result)
        try:
            data = to_json(content)
        except PydanticSerializationError:  # a lone surrogate
            data = replace_lone_surrogates(json.dumps(content, ensure_ascii=False)).encode()
            content = from_json(data)
    except (TypeError, ValueError) as error:
        cause = f"The result holds a value that JSON has no form for: {error}."
        raise JobError(cause, code="not_json", type="server_error") from None
    if b"NaN" in data or b"Infinity" in data:  # perhaps only within a string
        json.loads(data, parse_constant=_refuse_constant)
    return content, data


async def _plain_objects(result: Any) -> Any:
    """`result` dumped; long lists, which come last, in parts between which the event loop runs."""
    lists = list(_long_lists(result, ()))
    exclude: dict[Any, Any] = {}
    for path, _ in lists:
        inner = exclude
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = True
    content = to_jsonable_python(result, exclude=exclude or None, fallback=_numpy)
    for path, items in lists:
        owner = content
        for key in path[:-1]:
            owner = owner[key]
        if isinstance(items, PlainList):
            owner[path[-1]] = items
            continue
        owner[path[-1]] = plain = []
        for start in range(0, len(items), _PART):
            await asyncio.sleep(0)
            plain += to_jsonable_python(items[start : start + _PART], fallback=_numpy)
    return content


def _long_lists(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    """The lists of more than _PART items in models, and the field names and indices that lead to each."""
    if isinstance(value, BaseModel):
        for name, field in vars(value).items():
            if isinstance(field, list) and len(field) > _PART:
                yield (*path, name), field
            else:
                yield from _long_lists(field, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, BaseModel):
                yield from _long_lists(item, (*path, index))


def _numpy(value: Any) -> Any:
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _refuse_constant(_: str) -> None:
    raise not_finite("Try another DTYPE, such as float32.")


# ---- results over the platform's limit -----------------------------------------------------------------


def posted_size(data: bytes) -> int:
    """An upper bound of the bytes that the SDK posts: its JSON has spaces after commas and colons."""
    return len(data) + data.count(b",") + data.count(b":")


def has_bucket(job: Mapping[str, Any]) -> bool:
    """Whether a result of this job that exceeds the limit can be uploaded."""
    return _own_bucket(job) is not None or all(os.environ.get(name) for name in _BUCKET)


def _own_bucket(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """The bucket in the job's s3Config, where that is complete."""
    config, keys = job.get("s3Config"), ("endpointUrl", "accessId", "accessSecret")
    return config if isinstance(config, dict) and all(config.get(key) for key in keys) else None


def too_large(size: int, limit: int, advice: str = "", *, bucket: bool = True) -> JobError:
    """The error for a result of `size` bytes. advice: a sentence that ends in a space.

    bucket: whether the way that the answer is sent can upload it instead.
    """
    upload = (
        ", or set BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY to have large "
        "results uploaded"
    )
    return JobError(
        f"The result would be {size / 1e6:.1f} MB, and the platform takes {limit / 1e6:g} MB. {advice}Split "
        f"the job{upload if bucket else ''}.",
        code="result_too_large",
    )


def upload(data: bytes, job: Mapping[str, Any]) -> str:
    """The URL of `data` in the bucket of BUCKET_* or of the job's s3Config. Blocks while it uploads."""
    from runpod.serverless.utils import rp_upload

    bucket = _own_bucket(job)
    try:
        url: str = rp_upload.upload_in_memory_object(
            f"{job['id']}.json",
            data,
            bucket_creds=bucket,
            bucket_name=(bucket or {}).get("bucketName") or os.environ.get("BUCKET_NAME"),
            prefix="results",
        )
    except Exception as error:
        log.exception("upload failed")
        raise JobError(
            f"The result of {len(data) / 1e6:.1f} MB could not be uploaded ({type(error).__name__}). Check "
            f"{'s3Config' if bucket else 'BUCKET_ENDPOINT_URL, its keys and BUCKET_NAME'}.",
            code="upload_failed",
            type="server_error",
        ) from None
    return url
