"""Selection of tasks and trials, the training walk, the evaluation walk, the queue."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlactl.api.contracts import Episode, Task
from vlactl.config.run import RolloutConfig
from vlactl.errors import ConfigError
from vlactl.rollout.episodes import (
    Curriculum,
    EpisodeQueue,
    TrainingEpisodes,
    deal,
    evaluation_episodes,
    select_pairs,
    share_of_rank,
)

TASKS = [Task(index=i, name=f"t{i}", instruction=f"do {i}", num_trials=5 + i) for i in range(4)]


def walk(config: RolloutConfig, steps: int, start: int = 0) -> list[list[Episode]]:
    plan = TrainingEpisodes(TASKS, config, group_size=2, seed=7, start_step=start)
    return [plan.next_step() for _ in range(steps)]


@pytest.mark.parametrize("order", ["ordered", "random", "informative"])
def test_a_step_does_not_depend_on_the_steps_before_it_being_played(order):
    config = RolloutConfig(episodes_per_step=8, order=order)
    assert walk(config, 6)[4:] == walk(config, 2, start=4)


def test_ordered_walk_visits_every_pair_once_per_pass():
    config = RolloutConfig(episodes_per_step=2)
    num_pairs = sum(task.num_trials for task in TASKS)
    visited = [(step[0].task, step[0].trial) for step in walk(config, 2 * num_pairs)]
    everything = sorted(select_pairs(TASKS, None, None))
    assert sorted(visited[:num_pairs]) == everything == sorted(visited[num_pairs:])


# --------------------------------------------------------------------------------------------
# Curriculum
# --------------------------------------------------------------------------------------------
def success(*rates: float) -> dict[str, float]:
    return {f"env/success_once/task_{task}": rate for task, rate in enumerate(rates)}


def test_shares_follow_the_variance_of_recent_successes():
    curriculum = Curriculum([2, 0, 1])
    assert curriculum.shares().tolist() == pytest.approx([1 / 3] * 3)
    curriculum.observe(success(1.0, 0.5))  # task 2 was not played
    teaches = np.array([0.75 * 0.35, 0.6 * 0.5, 0.6 * 0.5])
    assert curriculum.shares() == pytest.approx(0.2 / 3 + 0.8 * teaches / teaches.sum())
    for _ in range(100):
        curriculum.observe(success(1.0, 0.3, 0.0))
    teaches = np.array([0.0, 0.4 * 0.7, 0.1])
    assert curriculum.shares() == pytest.approx(0.2 / 3 + 0.8 * teaches / teaches.sum())


def test_a_failing_task_is_drawn_more_often_than_a_solved_one():
    curriculum = Curriculum([0, 1, 2])
    for _ in range(100):
        curriculum.observe(success(0.0, 0.9, 1.0))
    failing, nearly_solved, solved = curriculum.shares()
    assert failing == pytest.approx(nearly_solved, abs=0.01)
    assert solved == pytest.approx(0.2 / 3)


def test_where_all_tasks_are_solved_all_are_drawn_alike():
    curriculum = Curriculum([0, 1])
    curriculum._success = {0: 1.0, 1: 1.0}
    assert curriculum.shares().tolist() == [0.5, 0.5]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 40), st.integers(0, 99))
def test_every_task_is_drawn_as_often_as_its_share_says(rates, count, seed):
    curriculum = Curriculum(range(4))
    for _ in range(5):
        curriculum.observe(success(*rates))
    drawn = curriculum.draw(np.random.default_rng(seed), count)
    assert len(drawn) == count
    times = np.bincount(drawn, minlength=4)
    assert (np.abs(times - count * curriculum.shares()) < 1).all()


def test_informative_tasks_are_drawn_more_often_and_none_is_forgotten():
    config = RolloutConfig(episodes_per_step=32, order="informative", tasks=(0, 1, 3))
    plan = TrainingEpisodes(TASKS, config, group_size=2, seed=7)
    counts = np.zeros(4)
    for _ in range(60):
        groups = [episode for episode in plan.next_step() if episode.member == 0]
        counts += np.bincount([e.task for e in groups], minlength=4)
        plan.observe(success(0.0, 0.5, 0.5, 1.0))
    assert counts.sum() == 60 * 16
    assert counts[2] == 0
    shares = counts / counts.sum()
    assert shares[3] < 0.11 < 0.2 < shares[0] < 0.35 < 0.55 < shares[1]
    replaced = [e.task for e in plan.replacements(range(100), attempt=1)[::2]]
    assert replaced.count(1) > 50
    assert {0, 1, 3} == set(replaced)


def test_a_curriculum_repeats_a_state_only_when_all_have_come():
    config = RolloutConfig(episodes_per_step=32, order="informative")
    plan = TrainingEpisodes(TASKS, config, group_size=1, seed=7)
    times = Counter((e.task, e.trial) for e in plan.next_step())
    for task in TASKS:
        of_task = [times[task.index, trial] for trial in range(task.num_trials)]
        assert sum(of_task) == 8
        assert max(of_task) - min(of_task) <= 1


def test_a_curriculum_is_rebuilt_from_the_metrics():
    config = RolloutConfig(episodes_per_step=32, order="informative")
    rng = np.random.default_rng(0)
    history = [success(*rng.random(4) * [0, 1, 1, 0.2]) for _ in range(6)]
    keys = {"group_size": 2, "seed": 7}
    whole = TrainingEpisodes(TASKS, config, **keys)
    for metrics in history:
        whole.next_step()
        whole.observe(metrics)
    resumed = TrainingEpisodes(TASKS, config, start_step=6, history=history, **keys)
    another = TrainingEpisodes(TASKS, config, start_step=6, **keys)
    coming = whole.next_step()
    assert resumed.next_step() == coming != another.next_step()
    assert resumed.replacements([3], 1) == whole.replacements([3], 1)


def test_members_share_the_state_and_nothing_random():
    (episodes,) = walk(RolloutConfig(episodes_per_step=8), 1)
    assert [e.member for e in episodes] == [0, 1] * 4
    assert all(
        a.trial == b.trial and a.task == b.task
        for a, b in zip(episodes[::2], episodes[1::2], strict=True)
    )
    assert len({e.seed for e in episodes}) == 8


def test_selection_names_what_does_not_exist():
    assert select_pairs(TASKS, [3], [0, 7]) == [(3, 0), (3, 7)]
    with pytest.raises(ConfigError, match="no task 9"):
        select_pairs(TASKS, [9], None)
    with pytest.raises(ConfigError, match="task 1 has 6 initial states, trial 6") as error:
        select_pairs(TASKS, [1], [0, 6])
    assert "never used twice" in error.value.hint


def test_an_evaluation_takes_the_trials_that_are_kept_for_it_unless_told_otherwise():
    task = Task(index=0, name="t", instruction="do", num_trials=5, num_eval_trials=2)
    for wanted, evaluated, trained in [
        (None, range(2), range(5)),
        ([1, 4], [1, 4], [1, 4]),
    ]:
        pairs = select_pairs([task], None, wanted, for_evaluation=True)
        assert pairs == [(0, trial) for trial in evaluated]
        assert select_pairs([task], None, wanted) == [(0, trial) for trial in trained]
    with pytest.raises(ConfigError, match="trial 5 does not exist"):
        select_pairs([task], None, [5], for_evaluation=True)


def test_evaluation_is_interleaved_and_unique():
    episodes = evaluation_episodes(select_pairs(TASKS, None, range(3)), passes=2, seed=0)
    assert [(e.task, e.trial) for e in episodes[:5]] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert len({(e.task, e.trial, e.member) for e in episodes}) == len(episodes) == 24


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.integers(1, 3),
    st.sets(st.integers(0, 77)),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
)
def test_an_evaluation_plays_every_pair_once_per_pass_however_it_is_shared(
    processes, passes, finished, processes_after
):
    """Ranks share episodes; after a stop other ranks share those that are not finished."""
    pairs = select_pairs(TASKS, None, None)
    episodes = evaluation_episodes(pairs, passes=passes, seed=0)
    shares = [deal(episodes, rank, processes) for rank in range(6)]
    expected = sorted((*pair, number) for pair in pairs for number in range(passes))
    assert sorted((e.task, e.trial, e.member) for share in shares for e in share) == expected
    sizes = [len(shares[rank]) / processes.count(rank) for rank in set(processes)]
    assert max(sizes) - min(sizes) <= 1
    todo = [episode for index, episode in enumerate(episodes) if index not in finished]
    shares = [deal(todo, rank, processes_after) for rank in range(6)]
    played = [episodes[index] for index in finished if index < len(episodes)]
    played += [episode for share in shares for episode in share]
    assert sorted((e.task, e.trial, e.member) for e in played) == expected


def test_passes_have_their_own_noise_and_do_not_change_each_other():
    pairs = select_pairs(TASKS, None, None)
    once, twice = (evaluation_episodes(pairs, passes=passes, seed=3) for passes in (1, 2))
    assert twice[: len(once)] == once
    assert len({episode.seed for episode in twice}) == len(twice)
    assert {e.seed for e in evaluation_episodes(pairs, passes=2, seed=4)}.isdisjoint(
        e.seed for e in twice
    )


@given(st.integers(1, 5), st.integers(1, 6))
def test_ranks_share_whole_groups(num_ranks, num_groups):
    (episodes,) = walk(RolloutConfig(episodes_per_step=2 * num_groups), 1)
    shares = [share_of_rank(episodes, rank, range(num_ranks)) for rank in range(num_ranks)]
    assert sorted((e.group, e.member) for share in shares for e in share) == [
        (e.group, e.member) for e in episodes
    ]
    owners = [{e.group for e in share} for share in shares]
    assert sum(map(len, owners)) == len(set().union(*owners))


def test_queue_prefers_the_slots_own_task_then_one_nobody_serves():
    episodes = [
        Episode(task=t, trial=0, group=t, member=m, seed=0) for t in range(3) for m in range(2)
    ]
    queue = EpisodeQueue(episodes)
    assert queue.take(1).task == 1
    assert queue.take(7, served=[0, 1]).task == 2
    first = queue.take(None)
    queue.put_back(first)
    assert queue.take(None) is first
    queue.drop_group(2)
    assert {e.group for e in islice(iter(lambda: queue.take(None), None), 10)} == {0, 1}


def plan_at(step: int, **keys: object) -> TrainingEpisodes:
    plan = TrainingEpisodes(
        TASKS, RolloutConfig(episodes_per_step=8, **keys), group_size=2, seed=7, start_step=step
    )
    plan.next_step()
    return plan


def test_replacements_keep_the_group_and_leave_the_walk_alone():
    config = RolloutConfig(episodes_per_step=8)
    plan = TrainingEpisodes(TASKS, config, group_size=2, seed=7)
    (first, second) = walk(config, 2)
    assert plan.next_step() == first
    replaced = plan.replacements([1, 3], attempt=1)
    assert [(e.group, e.member) for e in replaced] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert replaced[0].task == replaced[1].task
    assert replaced != plan.replacements([1, 3], attempt=2)
    assert replaced[2:] == plan.replacements([3], attempt=1)
    assert not {e.seed for e in replaced} & {e.seed for e in first}
    assert plan.next_step() == second
    only = RolloutConfig(episodes_per_step=2, tasks=(0,), trials=(0,))
    alone = TrainingEpisodes(TASKS, only, group_size=2, seed=7)
    rounds = [alone.next_step(), *(alone.replacements([0], attempt) for attempt in (1, 2))]
    assert len({e.seed for episodes in rounds for e in episodes}) == 6


def test_replacements_and_successors_do_not_depend_on_what_was_played_before():
    long, short = (
        TrainingEpisodes(TASKS, RolloutConfig(episodes_per_step=8), group_size=2, seed=7),
        plan_at(3),
    )
    steps = [long.next_step() for _ in range(4)]
    assert long.replacements([2], 1) == short.replacements([2], 1)
    assert long.successor(steps[3][0]) == short.successor(steps[3][0])


def test_what_follows_a_replaced_episode_is_another_one():
    plan = plan_at(2)
    first = plan.next_step()[0]
    followers = [plan.successor(first)]
    for attempt in (1, 2):
        followers.append(plan.successor(plan.replacements([first.group], attempt)[first.member]))
    assert len({follower.seed for follower in followers}) == 3
    plan.next_step()
    later = plan.successor(first)
    assert later == plan_at(4).successor(first), "the next step knows nothing of it"


def test_a_successor_is_of_the_same_task_and_of_the_wanted_trials():
    plan = plan_at(0, trials=(1, 3))
    episode = Episode(task=2, trial=1, group=5, member=0, seed=1)
    followers = [episode]
    for _ in range(12):
        followers.append(plan.successor(followers[-1]))
    assert {(e.task, e.group) for e in followers} == {(2, 5)}
    assert {e.trial for e in followers} == {1, 3}
    assert [e.member for e in followers] == list(range(13))
    assert len({e.seed for e in followers}) == 13
