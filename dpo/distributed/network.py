"""Finds the network interface that leads to the other nodes, for hosts whose own name resolves to a loopback address.

gloo listens on the address of the host's own name. On many distributions this is 127.0.1.1, to which no other node can
connect. gloo then needs `GLOO_SOCKET_IFNAME`, which this module finds so that users need not set it. Without torch.
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
_SIOCGIFADDR = 0x8915  # Linux's ioctl for the IPv4 address of an interface


class Store(Protocol):
    """The part of torch's store, which all ranks share, that this module uses. `get` waits until the key is set."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


def gloo_interface(environment: Mapping[str, str], store: Store) -> str | None:
    """Returns the name of the interface that gloo must use, or None if gloo finds it without help.

    A rank on rank 0's node takes the interface of the route to another node, whose address the store gives; all other
    ranks take the interface of the route to rank 0's node. Nodes that share a host need no help.

    Every rank must get here, or the ranks on rank 0's node hang.

    Args:
        environment: of this rank, as torchrun sets it.
        store: shared by all ranks.
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
    """Returns the IPv4 address of this host on its route to another host, or None if there is no such route. Sends
    nothing: connecting a UDP socket only looks up the route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:  # IPv6 only
            return None
        address: str = probe.getsockname()[0]
        return address


def address_of_this_host() -> str:
    """Returns the address that the host's own name resolves to; 127.0.0.1 if it does not resolve, as gloo does."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except socket.gaierror:
        return "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Returns whether only this host itself can reach an address."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """Returns the name of the interface whose first IPv4 address is `address`; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
