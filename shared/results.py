"""A handler's result as plain JSON within the platform's limit, or uploaded to a bucket."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

from shared.errors import JobError, not_finite, replace_lone_surrogates
from shared.logs import log

JSON, EVENTS = "application/json", "text/event-stream"

_BUCKET = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")


class Result(dict[str, Any]):
    """A finished result. The SDK formats results for its debug log even while that log is off."""

    def __init__(self, content: Mapping[str, Any], size: int) -> None:
        super().__init__(content)
        self.size = size

    def __repr__(self) -> str:
        return f"<result of {self.size} bytes>"


@dataclass(frozen=True, slots=True)
class Media:
    """An answer, or a part of one, that HTTP sends as it is. data: bytes of the type `media_type`."""

    data: bytes
    media_type: str


async def to_plain(result: Any) -> tuple[Any, bytes]:
    """`result` as plain objects and as JSON: models dumped, numpy arrays and scalars as lists and numbers.

    Raises JobError(type="server_error") for a value that JSON has no form for: NaN, infinities, bytes that
    are not UTF-8, objects. Each of the two passes blocks the event loop, for about 25 ms with 9 MB of floats.
    """
    try:
        # The objects first: a model's own JSON has null for NaN, and the plain objects' has NaN.
        content = to_jsonable_python(result, fallback=_numpy)
        await asyncio.sleep(0)
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
