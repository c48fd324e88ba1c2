"""From trajectories to optimizer steps: the deal, padding, what is left out, meters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from vlactl_grpo.algorithm import make_algorithm
from vlactl_grpo.plugin import GrpoConfig

from vlactl.api.contracts import Advantages, End, Episode, Observation, Outcome
from vlactl.distributed.roles import World
from vlactl.rollout.collect import Collection, Trajectory
from vlactl.train.batch import Grid, Layout, pack, select_samples
from vlactl.train.meters import Averages, RolloutTally, rollout_metrics

ONE_RANK = World.alone(torch.device("cpu")).actors
GRID = Grid(
    group_size=2,
    num_trajectories=4,
    chunks_per_episode=3,
    chunk_length=2,
    max_episode_steps=6,
    global_batch_size=6,
)


def trajectory(group: int, member: int, steps: int, success: bool, later: int = 0) -> Trajectory:
    """One that solves its task at its last step, or goes on for `later` steps and loses it."""
    rewards = np.zeros(steps + later, np.float32)
    if success:
        rewards[steps - 1] = 5.0
        rewards[steps : steps + 1] = -5.0
    chunks = [rewards[start : start + 2] for start in range(0, len(rewards), 2)]
    return Trajectory(
        episode=Episode(task=group, trial=0, group=group, member=member, seed=0),
        observations=[_observation(10 * group + member, c) for c in range(len(chunks))],
        tokens_CKA=[np.full((2, 1), 10 * group + member) for _ in chunks],
        logprobs_CKA=[np.full((2, 1), -0.5, np.float32) for _ in chunks],
        actions_CKA=[np.zeros((2, 1)) for _ in chunks],
        rewards=chunks,
        outcome=Outcome(
            success_step=steps if success else None,
            success_at_end=success and not later,
            terminated=success and not later,
            num_steps=steps + later,
        ),
    )


def _observation(name: int, chunk: int) -> Observation:
    return Observation(
        images={"front": np.full((1, 1, 3), chunk, np.uint8)},
        state=np.array([name], np.float32),
        instruction=str(name),
    )


@pytest.fixture
def trajectories() -> list[Trajectory]:
    return [
        trajectory(0, 0, 3, success=True),
        trajectory(0, 1, 6, success=False),
        trajectory(1, 0, 6, success=False),
        trajectory(1, 1, 6, success=False),
    ]


def judged(trajectories, **keys):
    algorithm = make_algorithm(GrpoConfig(**{"group_size": 2, "filter_rewards": False} | keys))
    batch = pack(trajectories, GRID)
    return algorithm, batch, algorithm.advantages(batch, ONE_RANK)


def episode_at(samples, row):
    (only,) = samples.layout.trajectories[row]
    return only.episode


def test_padding_is_not_valid(trajectories):
    batch = pack(trajectories, GRID)
    assert batch.valid_BCK.sum((1, 2)).tolist() == [3, 6, 6, 6]
    assert batch.rewards_BCK[0].flatten().tolist() == [0, 0, 5, 0, 0, 0]


def lane(group: int, *parts: tuple[int, bool]) -> list[Trajectory]:
    """Episodes of so many steps, one after the other; the last one is cut unless it succeeds."""
    played, chunk = [], 0
    for member, (steps, success) in enumerate(parts):
        part = trajectory(group, member, steps, success)
        part.first_chunk, part.final_value = chunk, 10.0 * group + member
        part.values_CK = [np.array([c, c + 0.5], np.float32) for c in range(len(part.rewards))]
        chunk += len(part.rewards)
        played.append(part)
    if not success:
        played[-1].outcome = None
    return played


def test_a_lane_is_one_row():
    grid = replace(GRID, group_size=1, auto_reset=True, num_trajectories=2, value_level="action")
    played = [*lane(1, (4, False), (2, False)), *lane(0, (3, True), (1, True))]
    batch = pack(played, grid)
    assert batch.valid_BCK.flatten(1).int().tolist() == [[1, 1, 1, 0, 1, 0], [1] * 6]
    ends = [[0, 0, End.SUCCESS, 0, End.SUCCESS, 0], [0, 0, 0, End.TRUNCATED, 0, End.CUT]]
    assert batch.ends_BCK.flatten(1).tolist() == ends
    assert batch.final_values_BCK.flatten(1).tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 10, 0, 11]]
    assert batch.values_BCK.flatten(1).tolist()[1] == [0, 0.5, 1, 1.5, 0, 0.5]
    layout = Layout.of(played, grid)
    assert layout.find(0, 2) == (played[3], 0)
    assert layout.find(1, 1) == (played[0], 1)
    assert len({grid.number(t.episode) for t in played}) == len(played)


def test_the_deal_is_a_partition_that_depends_on_the_key_only():
    deal = GRID.deal(7, 3, 0)
    assert sorted(np.concatenate(deal)) == list(range(12))
    assert [part.tolist() for part in deal] == [part.tolist() for part in GRID.deal(7, 3, 0)]
    assert deal[0].tolist() != GRID.deal(7, 4, 0)[0].tolist()


def test_samples_of_all_ranks_are_those_of_one(trajectories):
    algorithm, batch, advantages = judged(trajectories)
    slots = GRID.deal(0)[0]
    together = select_samples(
        slots, trajectories, batch, advantages, GRID, algorithm, ONE_RANK, version=3
    )
    weights, names = 0.0, []
    for share in (trajectories[:2], trajectories[2:]):
        algorithm, batch, advantages = judged(share)
        part = select_samples(slots, share, batch, advantages, GRID, algorithm, ONE_RANK, version=3)
        weights += float(part.weights_SK.sum())
        names += [episode_at(part, row) for row in part.rows]
    assert weights == pytest.approx(float(together.weights_SK.sum()))
    assert sorted(map(str, names)) == sorted(
        str(episode_at(together, row)) for row in together.rows
    )


def test_only_what_can_move_the_gradient_is_computed(trajectories):
    """Row 22: the group whose returns are equal is left out; with entropy on it counts."""
    parts = judged(trajectories)
    assert parts[2].metrics["groups/degenerate"] == 0.5
    assert parts[2].advantages_BCK[2:].abs().sum() == 0
    slots = np.arange(12)
    samples = select_samples(
        slots, trajectories, parts[1], parts[2], GRID, parts[0], ONE_RANK, version=3
    )
    assert {episode_at(samples, row).group for row in samples.rows} == {0}
    assert len(samples) == 2 + 3
    algorithm, batch, advantages = judged(trajectories, entropy_coef=0.1)
    samples = select_samples(
        slots, trajectories, batch, advantages, GRID, algorithm, ONE_RANK, version=3
    )
    assert len(samples) == 2 + 3 * 3


def test_without_any_signal_nothing_is_left_and_nothing_is_nan(trajectories):
    equal = trajectories[2:]
    for member in equal:
        assert member.outcome.success_step is None
    algorithm, batch, advantages = judged(equal)
    samples = select_samples(
        np.arange(12), equal, batch, advantages, GRID, algorithm, ONE_RANK, version=3
    )
    assert len(samples) == 0
    assert list(samples.micro_batches(4, 1.0, torch.device("cpu"))) == []
    assert torch.isfinite(advantages.advantages_BCK).all()


def test_micro_batches_pair_observations_with_their_numbers(trajectories):
    algorithm, batch, advantages = judged(trajectories)
    samples = select_samples(
        np.arange(12), trajectories, batch, advantages, GRID, algorithm, ONE_RANK, version=3
    )
    sizes = []
    for observed, micro in samples.micro_batches(2, 1.3, torch.device("cpu")):
        sizes.append(len(observed.observations))
        assert observed.temperature == 1.3
        names = observed.observations.state[:, 0]
        assert observed.tokens_SKA[:, 0, 0].tolist() == names.tolist()
        winner = torch.from_numpy(names == 0)
        assert (micro.advantages_SK[winner][:, 0] > 0).all()
        assert (micro.advantages_SK[~winner][:, 0] < 0).all()
        assert micro.old_logprobs_SKA.unique().tolist() == [-0.5]
    assert sizes == [2, 2, 1]


def test_episode_metrics_count_up_to_the_first_success(trajectories):
    lost_again = trajectory(0, 0, 3, success=True, later=3)
    played = Collection(
        trajectories=[lost_again, trajectories[1]],
        restarts=3,
        dropped_groups=(7,),
        last_failure="it died",
    )
    tally = RolloutTally()
    assert tally.add(played) is played.trajectories
    assert tally.last_failure == "it died"
    assert tally.reduced(ONE_RANK) == {
        "env/dropped_groups": 1,
        "env/restarts": 3,
        "env/replaced_groups": 0,
        "env/num_trajectories": 2,
        "env/success_once": 0.5,
        "env/success_at_end": 0.0,
        "env/return": 2.5,
        "env/episode_len": 6.0,
        "env/reward": pytest.approx(5 / 3 / 2),
        "env/success_once/task_0": 0.5,
    }


def test_of_a_lane_the_first_episode_is_measured():
    """Slow episodes behind it are cut: those that are left would be too good."""
    lanes = [*lane(0, (6, False)), *lane(1, (4, False), (2, True))]
    lanes[0].outcome = Outcome(
        success_step=None, success_at_end=False, terminated=False, num_steps=6
    )
    tally = RolloutTally()
    tally.add(Collection(trajectories=lanes, restarts=0, dropped_groups=(), last_failure=""))
    metrics = tally.reduced(ONE_RANK)
    assert metrics["env/num_trajectories"] == 3
    assert metrics["env/success_once"] == 0
    assert metrics["env/episode_len"] == 5


def test_rollout_metrics_are_over_valid_and_trained_entries(trajectories):
    _, batch, advantages = judged(trajectories)
    metrics = rollout_metrics(batch, advantages, ONE_RANK)
    assert metrics["rollout/rewards"] == pytest.approx(5 / 21)
    assert metrics["rollout/advantages_max"] == pytest.approx(0.7071, abs=1e-4)
    assert metrics["rollout/advantages_min"] == pytest.approx(-0.7071, abs=1e-4)
    nothing = Advantages(
        advantages_BCK=advantages.advantages_BCK, mask_BCK=torch.zeros_like(advantages.mask_BCK)
    )
    assert rollout_metrics(batch, nothing, ONE_RANK)["rollout/advantages_mean"] == 0.0


def test_averages_weigh_by_count():
    averages = Averages()
    averages.add("a", 3.0, 2)
    averages.add("a", 1.0, 2)
    averages.add("never", 0.0, 0)
    assert averages.reduced(ONE_RANK) == {"a": 1.0}
