"""The collector with simulators that fail by script, and what an evaluation makes of it."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from vlactl_toy.environment import ToySimulator, make_spec
from vlactl_toy.plugin import ToyEnvConfig, ToyModelConfig
from vlactl_toy.policy import make_policy

from vlactl.api.contracts import EnvContext, Episode, Greedy, ModelContext, Sample, SlotEvent
from vlactl.distributed.roles import World
from vlactl.errors import TrainingError
from vlactl.evaluate.results import read_results
from vlactl.evaluate.runner import Evaluator
from vlactl.rollout.collect import (
    Collector,
    Lanes,
    Request,
    StopRequested,
    Trajectory,
    stack_observations,
)
from vlactl.rollout.episodes import evaluation_episodes, select_pairs
from vlactl.rollout.inference import LocalInference
from vlactl.rollout.spill import Spill

CONFIG = ToyEnvConfig(num_tasks=2, num_trials=4)
SPEC = make_spec(CONFIG)
VERSION = 7
ONE_RANK = World.alone(torch.device("cpu"))


class ScriptedEnvironment:
    """Toy simulators, one per slot, that answer at once; chosen episodes fail so many times.

    `wait` hands out everything that has happened, so that one list can hold the failure of one
    member of a group and the result of another.
    """

    spec = SPEC

    def __init__(self, num_slots: int, failures: dict[tuple[int, int, int], int]) -> None:
        context = EnvContext(num_slots=1, cameras=("front",), final_observations=True)
        self._simulators = [ToySimulator(CONFIG, context) for _ in range(num_slots)]
        self._left = defaultdict(int, failures)
        self._events: deque[SlotEvent] = deque()

    def begin(self, slot: int, episode: Episode) -> None:
        self._events = deque(event for event in self._events if event.slot != slot)
        key = (episode.task, episode.trial, episode.member)
        if self._left[key] > 0:
            self._left[key] -= 1
            self._events.append(SlotEvent(slot=slot, failure="scripted"))
        else:
            result = self._simulators[slot].begin(episode)
            self._events.append(SlotEvent(slot=slot, result=result))

    def advance(self, slot: int, actions_KA: np.ndarray) -> None:
        result = self._simulators[slot].advance(actions_KA)
        self._events.append(SlotEvent(slot=slot, result=result))

    def wait(self, at_least: int, timeout: float) -> list[SlotEvent]:
        events = list(self._events)
        self._events.clear()
        return events

    def close(self) -> None:
        pass


class Stop:
    requested = False


def policy(values="none"):
    context = ModelContext(
        env=SPEC, device=torch.device("cpu"), dtype=torch.float32, seed=0, values=values
    )
    return make_policy(ToyModelConfig(), context)


def collector(
    failures=(),
    *,
    max_restarts=4,
    num_slots=2,
    batch_size=4,
    stop=Stop,
    values="none",
    capacity=1,
    spill=None,
) -> Collector:
    return Collector(
        ScriptedEnvironment(num_slots, dict(failures)),
        LocalInference(policy(values), lambda: VERSION, capacity),
        num_slots=num_slots,
        batch_size=batch_size,
        max_restarts=max_restarts,
        should_stop=lambda: stop.requested,
        spill=spill,
    )


def groups(*pairs: tuple[int, int], size: int = 2) -> list[Episode]:
    return [
        Episode(task=task, trial=trial, group=group, member=member, seed=100 * group + member)
        for group, (task, trial) in enumerate(pairs)
        for member in range(size)
    ]


def play(subject: Collector, episodes, mode=Sample(1.0)):  # noqa: B008 - frozen
    request = Request(episodes=episodes, mode=mode, version=VERSION)
    return subject.collect(request, lambda done, total: None)


def summary(trajectory):
    return (
        trajectory.episode,
        trajectory.outcome,
        np.stack(trajectory.tokens_CKA).tolist(),
        np.concatenate(trajectory.rewards).tolist(),
    )


def test_results_do_not_depend_on_slots_order_or_failures():
    episodes = groups((0, 0), (1, 2), (0, 3))
    plain = play(collector(), episodes)
    other = play(collector({(1, 2, 1): 2, (0, 3, 0): 1}, num_slots=3), episodes[::-1])
    assert [summary(t) for t in plain.trajectories] == [summary(t) for t in other.trajectories]
    assert (plain.restarts, other.restarts) == (0, 3)


@pytest.mark.parametrize("capacity", [2, 3])
def test_results_do_not_depend_on_calls_under_way(capacity):
    """Failures hit slots whose observation is with the policy, and such as wait to be sent."""
    episodes = groups((0, 0), (1, 2), (0, 3), (1, 1))
    plain = play(collector(), episodes)
    failures = {(1, 2, 1): 2, (0, 3, 0): 1}
    other = play(collector(failures, num_slots=5, batch_size=2, capacity=capacity), episodes)
    alone = play(collector(num_slots=5, batch_size=2), episodes)
    assert [summary(t) for t in alone.trajectories] == [summary(t) for t in other.trajectories]
    # Another number of rows may change the last bits of logits, never what was chosen here.
    assert [t.episode for t in plain.trajectories] == [t.episode for t in other.trajectories]


def test_stale_weights_are_an_error():
    request = Request(episodes=groups((0, 0)), mode=Sample(1.0), version=VERSION + 1)
    with pytest.raises(TrainingError, match="version 7 is here, 8 was asked for"):
        collector().collect(request, lambda *_: None)


def test_trajectories_know_whose_actions_they_hold():
    assert {t.version for t in play(collector(), groups((0, 0))).trajectories} == {VERSION}


def test_spilled_pictures_are_the_same(tmp_path):
    episodes = groups((0, 0), (1, 2))
    spill = Spill(tmp_path / "spill", segment_bytes=3 * 192 + 10)
    kept = play(collector(), episodes).trajectories
    spilled = play(collector(spill=spill), episodes).trajectories
    for one, other in zip(kept, spilled, strict=True):
        for first, second in zip(one.observations, other.observations, strict=True):
            assert np.array_equal(first.images["front"], second.images["front"])
    assert list((tmp_path / "spill").iterdir()) == []  # files without a name leave nothing behind


def test_a_full_disk_shows_before_anything_is_lost(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(TrainingError, match="No space left") as caught:
        play(collector(spill=Spill(tmp_path)), groups((0, 0)))
    assert "rollout.episodes_per_step" in caught.value.hint


def test_a_dropped_group_takes_nothing_of_others_with_it():
    """A result that arrives in the same breath belongs to the group that has just been dropped."""
    episodes = groups((0, 0), (1, 1), (1, 2))
    alone = play(collector(), episodes).trajectories[2:]
    got = play(collector({(0, 0, 0): 1}, max_restarts=0), episodes)
    assert got.dropped_groups == (0,)
    assert [summary(t) for t in got.trajectories] == [summary(t) for t in alone]
    for trajectory in got.trajectories:
        assert trajectory.observations[0].instruction == f"reach goal {trajectory.episode.task}"


def next_trial(episode: Episode) -> Episode:
    return replace(
        episode,
        trial=(episode.trial + 1) % CONFIG.num_trials,
        member=episode.member + 1,
        seed=episode.seed + 1,
    )


def play_lanes(subject: Collector, num_lanes: int, num_chunks: int) -> list[Trajectory]:
    lanes = Lanes(num_chunks=num_chunks, successor=next_trial)
    episodes = groups(*((lane % 2, 0) for lane in range(num_lanes)), size=1)
    return subject.collect(
        Request(
            episodes=episodes,
            mode=Sample(1.0),
            version=VERSION,
            lanes=lanes,
            value_ends=True,
        ),
        lambda *_: None,
    ).trajectories


def test_lanes_are_full_and_hold_one_episode_after_the_other():
    played = play_lanes(collector(values="action"), 3, 9)
    for lane in range(3):
        episodes = [t for t in played if t.episode.group == lane]
        assert [t.episode.member for t in episodes] == list(range(len(episodes)))
        lengths = [len(t.rewards) for t in episodes]
        assert [t.first_chunk for t in episodes] == np.cumsum([0, *lengths])[:-1].tolist()
        assert sum(lengths) == 9
        assert all(t.outcome for t in episodes[:-1])
        assert {t.episode.task for t in episodes} == {lane % 2}
    cut = [t for t in played if t.outcome is None]
    assert cut
    assert {t.episode.member for t in played} > {0}


def test_lanes_depend_neither_on_slots_nor_on_failures():
    def numbers(played):
        return [
            (t.episode, t.first_chunk, t.outcome, np.stack(t.tokens_CKA).tolist(), t.final_value)
            for t in played
        ]

    plain = play_lanes(collector(values="chunk"), 3, 7)
    other = play_lanes(collector({(0, 1, 1): 2, (1, 0, 0): 1}, num_slots=5, values="chunk"), 3, 7)
    assert numbers(plain) == numbers(other)
    assert all(t.final_value != 0 for t in plain)


def test_ends_that_do_not_fit_into_a_batch_are_valued_in_the_next_one():
    played = play_lanes(collector(num_slots=5, batch_size=2, values="chunk"), 5, 4)
    assert all(t.final_value != 0 for t in played)


def test_final_values_are_those_of_the_states_that_followed():
    subject = collector(values="action")
    episodes = groups((0, 0), (1, 1), size=1)
    played = subject.collect(
        Request(episodes=episodes, mode=Sample(1.0), version=VERSION, value_ends=True),
        lambda *_: None,
    ).trajectories
    for trajectory in played:
        context = EnvContext(num_slots=1, cameras=("front",), final_observations=True)
        simulator = ToySimulator(CONFIG, context)
        simulator.begin(trajectory.episode)
        for actions_KA in trajectory.actions_CKA:
            last = simulator.advance(actions_KA).observation
        values = policy("action").act(stack_observations([last]), Greedy(), [0]).values_BK
        assert trajectory.final_value == pytest.approx(float(values[0, 0]), abs=1e-6)


def test_values_are_missed_in_words():
    with pytest.raises(TrainingError, match="no value head"):
        play_lanes(collector(), 1, 4)


def test_a_dropped_lane_is_gone_as_a_whole():
    played = play_lanes(collector({(0, 1, 1): 9}, max_restarts=1, values="action"), 3, 9)
    assert {t.episode.group for t in played} == {1}


def evaluator(subject: Collector, stop=Stop) -> Evaluator:
    pairs = select_pairs(SPEC.tasks, None, None)
    return Evaluator(
        roller=subject,
        env_processes=(0,),
        episodes=evaluation_episodes(pairs, passes=1, seed=0),
        tasks=SPEC.tasks,
        mode=Greedy(),
        world=ONE_RANK,
        stop=stop,
        header={"policy": {}},
    )


def test_an_evaluation_without_some_episodes_is_an_error_and_can_go_on(tmp_path):
    with pytest.raises(TrainingError, match="1 of 8 episodes could not be") as caught:
        evaluator(collector({(1, 3, 0): 9}, max_restarts=2)).run(tmp_path, VERSION, lambda *_: None)
    assert caught.value.message.endswith("played, simulators kept failing: scripted")
    assert caught.value.hint.endswith(f"{tmp_path} keeps the other episodes")
    assert not (tmp_path / "eval.json").exists()
    assert len(read_results(tmp_path)) == 7
    metrics = evaluator(collector()).run(tmp_path, VERSION, lambda *_: None)
    assert metrics["eval/num_trajectories"] == 8
    assert json.loads((tmp_path / "eval.json").read_text())["redone_episodes"] == 3


def test_an_evaluation_without_any_episode_keeps_none(tmp_path):
    nothing_works = {(task, trial, 0): 1 for task in range(2) for trial in range(4)}
    with pytest.raises(TrainingError, match="8 of 8 episodes") as caught:
        evaluator(collector(nothing_works, max_restarts=0)).run(tmp_path, VERSION, lambda *_: None)
    assert caught.value.hint == "all reasons are in the rank logs"


def test_redone_episodes_are_counted_over_all_starts(tmp_path):
    for failures in ({}, {(0, 1, 0): 1, (1, 0, 0): 1}, {}):
        (tmp_path / "episodes.jsonl").unlink(missing_ok=True)
        evaluator(collector(failures)).run(tmp_path, VERSION, lambda *_: None)
    assert json.loads((tmp_path / "eval.json").read_text())["redone_episodes"] == 2


def test_a_stopped_evaluation_counts_nothing(tmp_path):
    class Stopping:
        requested = True

    with pytest.raises(StopRequested):
        evaluator(collector(stop=Stopping), stop=Stopping).run(tmp_path, VERSION, lambda *_: None)
    assert not (tmp_path / "eval.json").exists()
