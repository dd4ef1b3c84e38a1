"""Which network interface leads to the other nodes, where the name of this host does not say it; without torch.

gloo listens on the address of the host's own name. Many distributions let that be 127.0.1.1, where no other node can
connect; gloo then needs `GLOO_SOCKET_IFNAME`, which only a person who knows the machine could set.
"""

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping
from typing import Protocol

VARIABLE = "GLOO_SOCKET_IFNAME"
KEY = "dpo/an address of another node than rank 0's"
NO_ADDRESS = "none that could be reached"
_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


class Store(Protocol):
    """What is needed of torch's store, which all ranks share; `get` waits until there is a value."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


def gloo_interface(environment: Mapping[str, str], store: Store) -> str | None:
    """The interface that gloo must be told of, by torchrun's environment of this rank; None where it needs no help.

    It is that of the route to rank 0's node; on this node itself, of the route to another one, which tells its address.
    Nodes that share a host find each other without. Every rank must get here, or those of rank 0's node wait for ever.
    """
    if environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"]:
        return None
    is_first_node = int(environment["RANK"]) < int(environment["LOCAL_WORLD_SIZE"])
    own = None if is_first_node else address_towards(environment["MASTER_ADDR"])
    own = None if own is None or is_loopback(own) else own
    if not is_first_node:
        store.set(KEY, own or NO_ADDRESS)
    if VARIABLE in environment or not is_loopback(address_of_this_host()):
        return None
    if is_first_node:
        own = address_towards(store.get(KEY).decode())
    return None if own is None else interface_of(own)


def address_towards(host: str) -> str | None:
    """The IPv4 address that this host has on its route to another; None where there is no such route. Nothing is
    sent.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:  # IPv6 alone
            return None
        address: str = probe.getsockname()[0]
        return address


def address_of_this_host() -> str:
    """What the host's own name resolves to; 127.0.0.1, as gloo takes it, where it does not."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except socket.gaierror:
        return "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Whether an address leads nowhere but to this host."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """The name of the interface with this IPv4 address; None where it is no interface's first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
