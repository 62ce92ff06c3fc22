"""Bytes from http(s), for hosts the caller has named and for no others.

Every hop of a redirect is checked anew: its host must be named, and every address it resolves to must be public (no loopback,
private, link-local, multicast or otherwise reserved address). The connection goes to the address that was checked, so that a
second look-up cannot change it. Bytes, seconds and hops are capped.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import SplitResult, urljoin, urlsplit

MAX_REDIRECTS = 3
TIMEOUT_S = 10.0  # for one read
DEADLINE_S = 60.0  # for the whole transfer
CHUNK = 1 << 16
# Ranges that carry an IPv4 address of their own to a gateway: 6to4 and NAT64.
TUNNELS = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


def is_url(source: object) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def url_name(url: str) -> str:
    """The address without user, query and fragment, which may hold secrets; for messages."""
    parts = _split(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"[:200]


def fetch(url: str, allowed_hosts: Collection[str], max_bytes: int) -> bytes:
    """The body behind `url`. allowed_hosts: names, or name:port for another port than the scheme's own.

    Raises ValueError naming the address (without its query) when it is not allowed, not reachable or larger than max_bytes.
    """
    deadline = time.monotonic() + DEADLINE_S
    name = url_name(url)
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url)
        _require_allowed(parts, allowed_hosts)
        try:
            status, location, body = _get(parts, max_bytes, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{name} could not be fetched: {type(error).__name__}") from None
        if status == 200:
            return body
        if status not in (301, 302, 303, 307, 308) or not location:
            raise ValueError(f"{name} could not be fetched: HTTP status {status}")
        url = urljoin(url, location)
        if not is_url(url):
            raise ValueError(f"{name} redirects to something that is not http or https")
    raise ValueError(f"{name} redirects more than {MAX_REDIRECTS} times")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("an http(s) address could not be read: its host or port is malformed") from None
    if not parts.hostname or port == 0:
        raise ValueError("an http(s) address could not be read: it names no host")
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme.lower() == "https" else 80)


def _require_allowed(parts: SplitResult, allowed_hosts: Collection[str]) -> None:
    host = str(parts.hostname).lower()
    default = 443 if parts.scheme.lower() == "https" else 80
    name = host if _port(parts) == default else f"{host}:{_port(parts)}"
    if name not in {allowed.lower() for allowed in allowed_hosts}:
        raise ValueError(f"{parts.scheme}://{name} is not fetched: its host is not among allowed_media_hosts {sorted(allowed_hosts)}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{parts.scheme}://{name} is not fetched: the address holds a user name or password")


def resolve(host: str, port: int) -> list[str]:
    """Every address of a host."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in tunnel for tunnel in TUNNELS):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not ip.is_unspecified


def connect(address: str, port: int) -> socket.socket:
    return socket.create_connection((address, port), timeout=TIMEOUT_S)


def _get(parts: SplitResult, max_bytes: int, deadline: float) -> tuple[int, str | None, bytes]:
    host, port = str(parts.hostname), _port(parts)
    addresses = resolve(host, port)
    private = [address for address in addresses if not is_public(address)]
    if private or not addresses:
        raise ValueError(
            f"{url_name(parts.geturl())} is not fetched: {host} resolves to {', '.join(private) or 'no address'}, which is not public"
        )
    raw = connect(addresses[0], port)
    try:
        # The connection is given its socket, already bound to the checked address; TLS still checks the host's own name.
        sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if parts.scheme.lower() == "https" else raw
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        connection.sock = sock
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            host_header = host if port in (80, 443) else f"{host}:{port}"
            headers = {"Host": host_header, "User-Agent": "llava_fast", "Accept-Encoding": "identity", "Connection": "close"}
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as response:
                body = _read(response, max_bytes, deadline, parts) if response.status == 200 else b""
                return response.status, response.getheader("Location"), body
        finally:
            connection.close()
    finally:
        raw.close()


def _read(response: http.client.HTTPResponse, max_bytes: int, deadline: float, parts: SplitResult) -> bytes:
    name = url_name(parts.geturl())
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise ValueError(f"{name} came compressed although it was asked for as it is")
    body = bytearray()
    while chunk := response.read1(CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"{name} is larger than the cap of {max_bytes} bytes")
        if time.monotonic() > deadline:
            raise ValueError(f"{name} took longer than {DEADLINE_S:.0f} s")
    return bytes(body)
