"""Which names a server answers to, against DNS rebinding.

A page of a stranger's site can let its name become 127.0.0.1, and then send requests to a server on this machine that
its browser takes for the site's own: no CORS rule stops them, but `Host` still has the site's name.
"""

from __future__ import annotations

import ipaddress

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def allowed_hosts(host: str, flag: str, address: str) -> frozenset[str] | None:
    """The names of --allowed_hosts, else those of a server that this machine alone reaches; None is any.

    Args:
        host: what --host says, a name perhaps.
        address: the address that is listened on.
    """
    names = {name.strip().lower().strip("[]") for name in flag.split(",") if name.strip()}
    if "*" in names or (not names and not is_loopback(address)):
        return None
    return frozenset(names | {host.lower()}) | LOOPBACK_NAMES


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def name_of(header: str) -> str:
    """The name in a Host header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].strip().lower().removesuffix(".")
