"""Which interface gloo is told of. `tests/layouts/test_two_namespaces.py` has the same with real nodes."""

import socket

import pytest

from dpo.distributed import network
from dpo.distributed.network import KEY, VARIABLE, address_towards, gloo_interface, interface_of
from dpo.distributed.startup import open_world

TWO_NODES = {"RANK": "1", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "first"}
FIRST_OF_TWO = TWO_NODES | {"RANK": "0"}


class Shared(dict[str, bytes]):
    """A store; `get` of what nobody has set is a KeyError, where torch's waits."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    get = dict.__getitem__  # type: ignore[assignment]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host whose name is a loopback, 10.0.0.2 on eth0 towards everyone but itself."""
    monkeypatch.setattr(network, "address_of_this_host", lambda: "127.0.1.1")
    monkeypatch.setattr(network, "address_towards", {"first": "10.0.0.2", "10.0.0.3": "10.0.0.2"}.__getitem__)
    monkeypatch.setattr(network, "interface_of", {"10.0.0.2": "eth0"}.__getitem__)
    return monkeypatch


def test_a_node_takes_the_way_to_rank_0_and_says_where_it_is(host: pytest.MonkeyPatch) -> None:
    store = Shared()
    assert gloo_interface(TWO_NODES, store) == "eth0"
    assert store == {KEY: b"10.0.0.2"}


def test_rank_0s_node_takes_the_way_to_another_node(host: pytest.MonkeyPatch) -> None:
    """10.0.0.3 is the other node's; its own way there is eth0."""
    assert gloo_interface(FIRST_OF_TWO, Shared({KEY: b"10.0.0.3"})) == "eth0"


def test_a_user_who_knows_better_is_heard_and_rank_0s_node_is_helped_nevertheless(host: pytest.MonkeyPatch) -> None:
    store = Shared()
    assert gloo_interface(TWO_NODES | {VARIABLE: "ib0"}, store) is None
    assert store == {KEY: b"10.0.0.2"}


def test_a_host_whose_name_is_in_the_network_needs_no_help_but_gives_it(host: pytest.MonkeyPatch) -> None:
    host.setattr(network, "address_of_this_host", lambda: "10.0.0.2")
    store = Shared()
    assert gloo_interface(TWO_NODES, store) is None
    assert store == {KEY: b"10.0.0.2"}


@pytest.mark.parametrize("way", [None, "127.0.0.1"], ids=["no IPv4", "one host"])
def test_a_node_without_a_way_leaves_nobody_waiting(host: pytest.MonkeyPatch, way: str | None) -> None:
    """Neither where there is IPv6 alone, nor where two nodes are one host: it says so, and rank 0's node goes on."""
    host.setattr(network, "address_towards", {"first": way, network.NO_ADDRESS: None}.__getitem__)
    store = Shared()
    assert gloo_interface(TWO_NODES, store) is None
    assert gloo_interface(FIRST_OF_TWO, store) is None


def test_one_node_needs_no_network() -> None:
    assert gloo_interface({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, Shared()) is None


def test_addresses_and_interfaces_of_this_machine() -> None:
    """192.0.2.0/24 is kept for documentation: nobody's address."""
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


def test_ranks_without_torchrun_need_no_more_than_torch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun, mpirun and debuggers set no LOCAL_WORLD_SIZE."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with open_world(30) as world:
        assert (world.rank, world.size, world.local_size) == (0, 1, 1)
