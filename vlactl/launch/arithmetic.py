"""The sums of a step that must come out even.

Pure arithmetic on the configuration and the number of ranks. A sum that does not come out is a
`ConfigError` that shows it, with the nearest values that would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError


def check_batches(config: RunConfig, roles: Mapping[str, Sequence[int]], chunks: int) -> None:
    """The sums that must come out even, in the order a person would fix them."""
    episodes, group = config.rollout.episodes_per_step, config.algorithm.group_size
    env, actor = len(roles["env"]), len(roles["actor"])
    _check_multiple("rollout.episodes_per_step", episodes, "algorithm.group_size", group)
    groups = episodes // group
    if config.rollout.min_groups > groups:
        raise ConfigError(
            f"rollout.min_groups = {config.rollout.min_groups}: a step has {groups} groups "
            f"({episodes} episodes / group size {group})",
            hint=f"at most {groups}",
        )
    for role in ("env", "actor"):
        sharers = len(roles[role])
        if groups % sharers:
            valid = _either(nearest_multiples(episodes, group * math.lcm(env, actor)))
            raise ConfigError(
                f"{groups} groups ({episodes} episodes / group size {group}) cannot be shared by "
                f"{sharers} {_sharers(roles, role)}: {_division(groups, sharers)}",
                hint=f"nearest rollout.episodes_per_step: {valid}{_ways_out(config, roles)}",
            )
    stages, sharers_name = config.rollout.pipeline_stages, _sharers(roles, "env")
    _check_multiple(
        "env.num_envs", config.env.num_envs, sharers_name, env, ways_out=_ways_out(config, roles)
    )
    _check_multiple(
        "env.num_envs",
        config.env.num_envs,
        f"{sharers_name} x rollout.pipeline_stages",
        env * stages,
    )
    _check_global_batch(config.optim.global_batch_size, episodes, chunks, actor)


def nearest_multiples(value: int, unit: int) -> tuple[int, ...]:
    """The multiples of `unit` just below and above a value; at least one unit."""
    below = value // unit * unit
    return tuple(number for number in (below, below + unit) if number > 0)


def nearest_divisors(value: int, total: int, unit: int = 1) -> tuple[int, ...]:
    """The divisors of `total` just below and above a value, among multiples of `unit`."""
    fitting = [n for n in range(unit, total + 1, unit) if total % n == 0]
    below, above = [n for n in fitting if n < value], [n for n in fitting if n > value]
    return tuple(below[-1:] + above[:1])


def _check_global_batch(batch: int, episodes: int, chunks: int, actors: int) -> None:
    samples = episodes * chunks
    if samples % batch == 0 and batch % actors == 0:
        return
    message = (
        f"optim.global_batch_size = {batch} cannot be shared by {actors} actor ranks: "
        f"{_division(batch, actors)}"
    )
    if samples % batch:
        message = (
            f"optim.global_batch_size = {batch} does not divide the {samples} samples of a step "
            f"({episodes} episodes x {chunks} chunks): {_division(samples, batch)}"
        )
    raise ConfigError(message, hint=f"nearest: {_either(nearest_divisors(batch, samples, actors))}")


def _check_multiple(key: str, value: int, of: str, unit: int, *, ways_out: str = "") -> None:
    if value % unit:
        raise ConfigError(
            f"{key} = {value} is not a multiple of {of} = {unit}: {_division(value, unit)}",
            hint=f"nearest {key}: {_either(nearest_multiples(value, unit))}{ways_out}",
        )


def _sharers(roles: Mapping[str, Sequence[int]], role: str) -> str:
    """What the members of a role are called: several processes may live on a rank."""
    is_repeated = len(set(roles[role])) < len(roles[role])
    return f"{role} processes" if is_repeated else f"{role} ranks"


def _ways_out(config: RunConfig, roles: Mapping[str, Sequence[int]]) -> str:
    """Numbers of devices near the given one that everything can be shared by, as a hint.

    Only where every device plays every role: else there is more than one number to choose.
    """
    if len({tuple(ranks) for ranks in roles.values()}) > 1:
        return ""
    groups = config.rollout.episodes_per_step // config.algorithm.group_size
    total = math.gcd(groups, config.env.num_envs, config.optim.global_batch_size)
    sizes = nearest_divisors(len(roles["env"]), total)
    return f"; or use {_either(sizes)} devices" if sizes else ""


def _division(value: int, unit: int) -> str:
    return f"{value} = {value // unit} x {unit} + {value % unit}"


def _either(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
