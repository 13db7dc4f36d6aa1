"""What a server may do and how much of it: every limit that does not belong to one field of a request."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgelm.errors import ConfigError, pass_interrupts_on, shown

ANY_HOST = "*"


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Settings of a server, checked; raises ConfigError."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = 8000
    """0 for a free one."""
    keys: tuple[str, ...] = field(default=(), repr=False)
    """API keys; without any, every request is allowed, and `host` must be a loopback address."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request's Host header may have, beside loopback names, `host` and IP addresses; ANY_HOST for all."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call this server, such as "https://example.org"."""

    max_rows: int = 8
    """Texts that a model decodes side by side."""
    max_waiting: int = 128
    """Texts that wait for a model before further ones are refused."""
    max_seconds: float = 300.0
    """The longest time of a generation, waiting included."""
    drafts: bool = True
    """Whether small models in bundles draft for the large ones."""
    prefix_cache_bytes: int = 64 * 10**6
    """Memory of each model for keys and values of earlier prompts."""
    memory_bytes: int | None = None
    """Memory that all models together may be forecast to take; None for what the machine has."""
    idle_unload_seconds: float | None = None
    """A model that nobody used for so long is unloaded; None for never."""
    drain_seconds: float = 30.0
    """How long running texts may go on after the server was told to stop."""

    max_body_bytes: int = 1 << 20
    max_bodies_bytes: int = 64 << 20
    """Bodies of all requests together that are not answered yet."""
    max_header_bytes: int = 16 << 10
    max_headers: int = 100
    max_json_depth: int = 32
    max_connections: int = 512
    idle_seconds: float = 20.0
    """A connection that has sent no whole request for so long is closed."""
    body_seconds: float = 20.0
    """A request's body has to arrive within this time."""
    send_seconds: float = 30.0
    """A client that takes nothing of its answer for so long is dropped."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_rows", 1, 1024),
            ("max_waiting", 1, 100_000),
            ("max_connections", 1, 100_000),
            ("prefix_cache_bytes", 0, 2**50),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, int) and low <= value <= high):
                raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
        for name in ("max_seconds", "drain_seconds", "idle_seconds", "body_seconds", "send_seconds"):
            value = getattr(self, name)
            if not 0 < value <= 10**6:
                raise ConfigError(f"{name} must be a number of seconds in (0, 1e6], got {shown(value)}")
        for number, key in enumerate(self.keys, 1):
            if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"API key {number} cannot be used: give 16 or more printable ASCII characters without spaces, "
                    "such as the output of: python -c 'import secrets; print(secrets.token_urlsafe())'"
                )
        if not self.keys and not is_loopback(self.host):
            raise ConfigError(
                f"everybody who reaches {self.host} could use this server: give API keys (--api-key-file), or serve on "
                "127.0.0.1"
            )
        if not self.keys and (ANY_HOST in self.allowed_hosts or ANY_HOST in self.cors_origins):
            raise ConfigError("'*' would let every web page use this server: name the hosts, or give API keys")

    def allows_host(self, header: str) -> bool:
        """Whether a Host header names this server.

        A web page that has its own name resolve to this machine (DNS rebinding) sends its own name. An address cannot
        be resolved to another one, so every address is allowed.
        """
        name = _host_name(header)
        return (
            ANY_HOST in self.allowed_hosts
            or name == "localhost"
            or name == self.host.lower()
            or name in {allowed.lower() for allowed in self.allowed_hosts}
            or _address(name) is not None
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def read_keys(texts: Sequence[str]) -> tuple[str, ...]:
    """The API keys in `texts`: one on each line or between commas; lines that begin with # are comments."""
    lines = [line for text in texts for line in text.splitlines() if not line.lstrip().startswith("#")]
    keys = [key.strip() for line in lines for key in line.split(",")]
    return tuple(dict.fromkeys(key for key in keys if key))


def _host_name(header: str) -> str:
    """The name in a Host header, in lower case, without the port and the brackets of an IPv6 address."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError as error:
        pass_interrupts_on(error)
        return None
