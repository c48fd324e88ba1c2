"""Which rank plays which role on which device of which machine, and which combinations work.

Devices are numbered through all machines, node 0 first; every device in use has one worker rank,
and ranks are numbered in the same order. The forms that have a name:

    shared      every rank plays all three roles
    hybrid      env and rollout on devices of their own, actors on all of them
    separate    three disjoint sets
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlactl.config.run import PlacementConfig
from vlactl.errors import ConfigError
from vlactl.launch.placement import Processes, check_overlaps, join_ranges, parse_placement

ROLES = ("actor", "rollout", "env")
Roles = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Ranks of roles, and where they are.

    Attributes:
        roles: ranks of each role; a rank is repeated where it holds several processes of "env".
        devices: of each rank, as numbered on its own machine.
        nodes: machines, with equal numbers of ranks.
        notes: what a placement was taken for.
    """

    roles: dict[str, tuple[int, ...]]
    devices: tuple[int, ...]
    nodes: int = 1
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks."""
        return len(self.devices)

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a machine."""
        return self.world_size // self.nodes

    def kinds(self) -> dict[tuple[str, ...], list[int]]:
        """Ranks by the roles they play."""
        found: dict[tuple[str, ...], list[int]] = {}
        members = {role: set(self.roles[role]) for role in ROLES}
        for rank in range(self.world_size):
            played = tuple(role for role in ROLES if rank in members[role])
            found.setdefault(played, []).append(rank)
        return found

    def most_per_node(self, role: str) -> int:
        """Processes of a role on the machine that has most of them."""
        counts = Counter(rank // self.ranks_per_node for rank in self.roles[role])
        return max(counts.values(), default=0)

    def share_of_fullest(self, role: str) -> float:
        """Part of a role's processes that is on the machine with most of them."""
        return self.most_per_node(role) / max(1, len(self.roles[role]))


def everywhere(num_ranks: int) -> Layout:
    """Every rank of one machine plays every role."""
    ranks = tuple(range(num_ranks))
    return Layout(roles=dict.fromkeys(ROLES, ranks), devices=ranks)


def make_layout(placement: PlacementConfig, devices_per_node: int, nodes: int) -> Layout:
    """The layout that the placement strings describe.

    Raises:
        ConfigError: devices that are not there, or a combination of roles that cannot work.
    """
    num_devices = devices_per_node * nodes
    processes = {role: parse_placement(getattr(placement, role), num_devices) for role in ROLES}
    for role in ("actor", "rollout"):
        _check_one_each(role, processes[role])
    devices = {role: [d for owned in each for d in owned] for role, each in processes.items()}
    check_overlaps(devices, range(num_devices))
    used = sorted({owned[0] for each in processes.values() for owned in each})
    _check_nodes(used, devices_per_node, nodes)
    rank_of = {device: rank for rank, device in enumerate(used)}
    roles = {role: tuple(rank_of[owned[0]] for owned in each) for role, each in processes.items()}
    _check_players(roles)
    return Layout(
        roles=roles,
        devices=tuple(device % devices_per_node for device in used),
        nodes=nodes,
        notes=tuple(_notes(processes["env"])),
    )


def form_of(roles: Roles) -> str:
    """The name of the form, or "mixed"."""
    actor, rollout, env = (set(roles[role]) for role in ROLES)
    if actor == rollout == env:
        return "shared"
    if not actor & (env | rollout):
        return "separate"
    return "hybrid" if actor >= env | rollout and not env & rollout else "mixed"


def _check_one_each(role: str, processes: Processes) -> None:
    owners = Counter(device for owned in processes for device in owned)
    crowded = [device for device, count in owners.items() if count > 1]
    if not crowded and all(len(owned) == 1 for owned in processes):
        return
    devices = join_ranges(set(owners))
    what = f"{role} processes own several devices each"
    if crowded:
        what = f"several {role} processes share device {crowded[0]}"
    raise ConfigError(
        f"placement.{role}: {what}, but one worker computes on one device",
        hint=f'placement.{role} = "{devices}"; only env may have several processes on a device',
    )


def _check_nodes(used: Sequence[int], devices_per_node: int, nodes: int) -> None:
    counts = Counter(device // devices_per_node for device in used)
    if len(counts) == nodes and len(set(counts.values())) == 1:
        return
    shown = ", ".join(f"node {node} {counts[node]}" for node in range(nodes))
    raise ConfigError(
        f"placement uses different numbers of devices on the {nodes} machines: {shown}",
        hint=f"devices are numbered through all machines, {devices_per_node} each: use as many "
        "on every one, or fewer machines (--nnodes)",
    )


def _check_players(roles: Roles) -> None:
    env, rollout = set(roles["env"]), set(roles["rollout"])
    if env == rollout:
        return
    if env & rollout:
        raise ConfigError(
            f"placement.env (ranks {join_ranges(env)}) and placement.rollout (ranks "
            f"{join_ranges(rollout)}) share some ranks and not others",
            hint="give env and rollout the same devices, or disjoint ones",
        )
    few, many = sorted((env, rollout), key=len)
    if len(many) % len(few):
        raise ConfigError(
            f"{len(env)} env ranks and {len(rollout)} rollout ranks cannot be paired: "
            f"{len(many)} = {len(many) // len(few)} x {len(few)} + {len(many) % len(few)}",
            hint="make one number a multiple of the other: every rollout rank serves equally many",
        )


def _notes(env: Processes) -> Iterator[str]:
    if any(len(owned) > 1 for owned in env):
        firsts = join_ranges([owned[0] for owned in env])
        yield f"placement.env: processes that own several devices live on the first: {firsts}"
