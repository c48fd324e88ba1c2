"""Where machines meet: mistakes in the options, ports, interfaces."""

import socket

import psutil
import pytest

from vlactl.errors import ConfigError
from vlactl.launch.network import ALONE, Cluster, find_cluster, find_port

LOOPBACK = next(
    name
    for name, addresses in psutil.net_if_addrs().items()
    if any(address.address == "127.0.0.1" for address in addresses)
)


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ((0, 0, "", ""), "--nnodes 0: at least 1", "leave it out"),
        ((2, 2, "localhost:29500", ""), "--node-rank 2: 2 nodes have ranks 0-1", "--nnodes"),
        ((1, 1, "", ""), "--node-rank 1: 1 node has ranks 0-0", "--nnodes"),
        ((2, -1, "localhost:29500", ""), "--node-rank -1", "--nnodes"),
        ((2, 0, "", ""), "--nnodes 2: where do they meet?", "--rdzv node0:29500"),
        ((2, 0, "localhost", ""), "--rdzv 'localhost' is not HOST:PORT", "--rdzv node0:29500"),
        ((2, 0, ":29500", ""), "--rdzv ':29500' is not HOST:PORT", "--rdzv node0:29500"),
        ((2, 0, "localhost:x", ""), "is not HOST:PORT", "--rdzv node0:29500"),
        ((2, 0, "localhost:80", ""), "port 80 cannot be used", "1024 to 65535"),
        ((2, 0, "localhost:70000", ""), "port 70000 cannot be used", "1024 to 65535"),
        ((2, 0, "no.such.host.invalid:29500", ""), "knows no host", "address of node 0"),
        ((2, 0, "localhost:29500", "nope7"), 'no network interface "nope7"', LOOPBACK),
        ((2, 0, "localhost:29500", f"{LOOPBACK}x"), "interface", f'did you mean "{LOOPBACK}"?'),
    ],
)
def test_mistakes(options: tuple[int, int, str, str], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_cluster(*options)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_one_machine_needs_nothing_and_sets_nothing() -> None:
    assert find_cluster(1, 0, "", "") == ALONE
    assert ALONE.variables() == {}
    assert ALONE.rendezvous(1234) is None
    assert find_port(ALONE, 0) == 0


def test_address_of_the_newer_kind() -> None:
    assert find_cluster(2, 1, "[::1]:29500", "").host == "::1"


def test_gloo_takes_the_interface_that_leads_to_node_0() -> None:
    cluster = find_cluster(2, 0, "127.0.0.1:29500", "")
    assert cluster.variables() == {"GLOO_SOCKET_IFNAME": LOOPBACK}


def test_a_machine_that_calls_itself_loopback_is_found_by_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Debian's /etc/hosts says that a machine's own name is 127.0.1.1."""
    cluster = Cluster(nnodes=2, host="node0", port=29500)
    entry = (socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.1.1", 29500))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [entry])
    assert cluster.variables().get("GLOO_SOCKET_IFNAME") != LOOPBACK


def test_a_choice_of_the_users_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = find_cluster(2, 0, "127.0.0.1:29500", LOOPBACK)
    both = {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}
    assert cluster.variables() == both
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert find_cluster(2, 0, "127.0.0.1:29500", "").variables() == {}


def test_a_port_in_use_is_a_mistake_first_and_passed_over_later() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use") as caught:
            find_port(Cluster(nnodes=2, host="127.0.0.1", port=port), 0)
        assert "--rdzv 127.0.0.1:" in caught.value.hint
        assert find_port(Cluster(nnodes=2, host="127.0.0.1", port=port - 1), 1) > port


def test_every_start_has_a_port_of_its_own() -> None:
    cluster = Cluster(nnodes=2, host="127.0.0.1", port=23456)
    ports = [find_port(cluster, attempt) for attempt in range(3)]
    assert len(set(ports)) == 3


def test_node_0_is_the_machine_that_the_address_names() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7 .* is not this machine"):
        find_port(Cluster(nnodes=2, host="192.0.2.7", port=29500), 0)
