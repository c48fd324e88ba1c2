"""Machines that run one job together: where they meet, and through which network interface.

Node 0 leads. Every machine runs the same command with another --node-rank, and sees the same run
directory.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil

from vlactl.errors import ConfigError
from vlactl.launch.torchrun import Rendezvous

GLOO_INTERFACE, NCCL_INTERFACE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_PORTS = range(1024, 65536)
_PORTS_OF_A_RUN = 25
_ELSEWHERE = "192.0.2.1"  # an address that nobody has
_EXAMPLE = "--rdzv node0:29500"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """This machine's place among those of a job; `host` is node 0, and meets the others at `port`.

    `interface` is "" where the libraries choose one themselves.
    """

    nnodes: int = 1
    node_rank: int = 0
    host: str = ""
    port: int = 0
    interface: str = ""

    @property
    def is_leader(self) -> bool:
        """Whether this machine plans and supervises the job."""
        return self.node_rank == 0

    @property
    def options(self) -> str:
        """What a command line needs to go on with the job on these machines."""
        if self.nnodes == 1:
            return ""
        return f" --nnodes {self.nnodes} --node-rank R --rdzv {self.host}:{self.port}"

    def rendezvous(self, port: int) -> Rendezvous | None:
        """Where this machine's torchrun meets others; None = it is the only one."""
        if self.nnodes == 1:
            return None
        return Rendezvous(nnodes=self.nnodes, node_rank=self.node_rank, host=self.host, port=port)

    def variables(self) -> dict[str, str]:
        """Environment variables by which workers find each other."""
        if self.interface:
            return {GLOO_INTERFACE: self.interface, NCCL_INTERFACE: self.interface}
        # By itself gloo takes the address that the machine's name stands for: often 127.0.1.1.
        if self.nnodes == 1 or os.environ.get(GLOO_INTERFACE):
            return {}
        found = _interface_towards(self.host, self.port)
        return {GLOO_INTERFACE: found} if found else {}


ALONE = Cluster()
"""A job on one machine."""


def find_cluster(nnodes: int, node_rank: int, rdzv: str, interface: str) -> Cluster:
    """What the options of a command line mean.

    Raises:
        ConfigError: they contradict each other or name what does not exist.
    """
    check_nnodes(nnodes)
    if not 0 <= node_rank < nnodes:
        raise ConfigError(
            f"--node-rank {node_rank}: {nnodes} {'node has' if nnodes == 1 else 'nodes have'} "
            f"ranks 0-{nnodes - 1}",
            hint="each machine has a rank of its own, and --nnodes is the same on all",
        )
    if nnodes > 1 and not rdzv:
        raise ConfigError(
            f"--nnodes {nnodes}: where do they meet?",
            hint=f"a name or address of node 0 and a free port on it: {_EXAMPLE}",
        )
    host, port = _host_and_port(rdzv) if rdzv else ("", 0)
    if interface:
        _check_interface(interface)
    return Cluster(nnodes=nnodes, node_rank=node_rank, host=host, port=port, interface=interface)


def check_nnodes(nnodes: int) -> None:
    """Check a number of machines.

    Raises:
        ConfigError: it is none.
    """
    if nnodes < 1:
        raise ConfigError(f"--nnodes {nnodes}: at least 1", hint="leave it out for one machine")


def find_port(cluster: Cluster, attempt: int) -> int:
    """A free port for the attempt-th start, counted from 0: each start has another one.

    A start would else meet what is left of the one before.

    Raises:
        ConfigError: this machine is not the host, or the port is taken.
    """
    if cluster.nnodes == 1:
        return 0
    for turn in range(_PORTS_OF_A_RUN if attempt else 1):
        port = min(cluster.port + (attempt + turn) % _PORTS_OF_A_RUN, _PORTS.stop - 1)
        if _is_free(cluster, port):
            return port
    raise ConfigError(
        f"--rdzv {cluster.host}:{cluster.port}: port {port} is in use on this machine",
        hint=f"choose another on all nodes, such as --rdzv {cluster.host}:{_any_free_port()}",
    )


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, number = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # as IPv6 addresses are written before a port
    if not host or not number.isascii() or not number.isdigit():
        raise ConfigError(f"--rdzv {text!r} is not HOST:PORT", hint=_EXAMPLE)
    if int(number) not in _PORTS:
        raise ConfigError(
            f"--rdzv {text}: port {number} cannot be used",
            hint=f"choose a free one from {_PORTS.start} to {_PORTS.stop - 1}: {_EXAMPLE}",
        )
    try:
        socket.getaddrinfo(host, int(number), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--rdzv {text}: this machine knows no host {host!r}",
            hint="use the address of node 0 instead of its name",
        ) from error
    return host, int(number)


def _check_interface(name: str) -> None:
    known = sorted(psutil.net_if_addrs())
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f'did you mean "{near[0]}"?  ' if near else ""
    raise ConfigError(
        f'--interface: this machine has no network interface "{name}"',
        hint=f"{guess}interfaces: {', '.join(known)}",
    )


def _is_free(cluster: Cluster, port: int) -> bool:
    family, kind, protocol, _, address = socket.getaddrinfo(
        cluster.host, port, type=socket.SOCK_STREAM
    )[0]
    _check_is_here(cluster, family, address[0])
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _check_is_here(cluster: Cluster, family: int, address: str | int) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError as error:
            raise ConfigError(
                f"--rdzv: {cluster.host} ({address}) is not this machine, which is node 0",
                hint="name the machine that has --node-rank 0, by an address that others reach",
            ) from error


def _any_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _interface_towards(host: str, port: int) -> str:
    """The interface whose address this machine has for others on the way to `host`, if any.

    Many machines call themselves 127.0.1.1, where others do not find them: then it is the one that
    leads out.
    """
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    own = _own_address(family, target)
    if _is_loopback(own) and not (host == "localhost" or _is_loopback(host)):
        own = _own_address(socket.AF_INET, (_ELSEWHERE, port))
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own for address in addresses):
            return str(name)
    return ""


def _own_address(family: int, target: tuple[Any, ...]) -> str:
    """From where this machine would speak to another one; "" = there is no way."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)  # sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
