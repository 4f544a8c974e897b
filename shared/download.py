"""Downloads from URLs that clients send. Addresses that are not public are refused (SSRF).

The check stands where the socket is made, so it holds for every redirect, and between it and the connection
no name is resolved again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import aiohttp
import certifi
from aiohttp.abc import AbstractResolver, ResolveResult

SOCKET_TIMEOUT_S = 10.0
MAX_REDIRECTS = 5
# A separate pool: slow name servers must not occupy the threads that decode other jobs' input.
_lookups = ThreadPoolExecutor(16, thread_name_prefix="lookup")


class TooLarge(Exception):
    """The body is over the limit."""


class DownloadFailed(Exception):
    """The text names the cause without the URL, which may hold passwords and signatures."""


class _NotPublic(OSError):
    pass


async def download(url: str, max_bytes: int) -> bytes:
    """The body at an http(s) URL, of status 200. Raises DownloadFailed or TooLarge.

    RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS, the SDK's variable, lifts the check of addresses. Proxies are used
    only then: with one, this process does not see the address.
    """
    private = os.environ.get("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "").strip().lower() in ("1", "true", "yes")
    connector = aiohttp.TCPConnector(
        resolver=_Resolver(), ssl=await asyncio.to_thread(_tls), socket_factory=None if private else _connect
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SOCKET_TIMEOUT_S, sock_read=SOCKET_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=private) as session:
        try:
            headers = {"Accept-Encoding": "identity"}
            async with session.get(url, max_redirects=MAX_REDIRECTS, headers=headers) as response:
                if response.status == 200:
                    return await _read(response, max_bytes)
                cause = f"the server answered {response.status}"
        except aiohttp.ClientConnectorError as error:
            public = not isinstance(error.os_error, _NotPublic)
            cause = type(error).__name__ if public else str(error.os_error)
        except (aiohttp.ClientError, OSError, ValueError) as error:  # their texts quote the URL
            cause = type(error).__name__
    raise DownloadFailed(cause)


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if (response.content_length or 0) > max_bytes:
        raise TooLarge
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise TooLarge
    return b"".join(parts)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet's, for one host."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _connect(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, _, target = address
    if not is_public(target[0]):
        raise _NotPublic("the host has a non-public address")
    return socket.socket(family, kind, protocol)


class _Resolver(AbstractResolver):
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop, kind = asyncio.get_running_loop(), socket.SOCK_STREAM
        found = await loop.run_in_executor(_lookups, socket.getaddrinfo, host, port, family, kind)
        return [
            {"hostname": host, "host": str(target[0]), "port": port, "family": family, "proto": protocol,
             "flags": socket.AI_NUMERICHOST}
            for family, _, protocol, _, target in found
        ]  # fmt: skip

    async def close(self) -> None:
        pass


@cache
def _tls() -> ssl.SSLContext:
    """As requests: its certificates, or those of REQUESTS_CA_BUNDLE."""
    return ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE") or certifi.where())
