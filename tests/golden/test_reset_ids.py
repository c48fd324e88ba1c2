"""The order in which initial states are visited, against the reference's recorded order."""

import json
from itertools import accumulate
from pathlib import Path

import pytest

from vlactl.api.contracts import Task
from vlactl.rollout.episodes import (
    evaluation_episodes,
    ordered_draws,
    random_draws,
    select_pairs,
)


def test_training_order(goldens: Path):
    checked = 0
    for case in json.loads((goldens / "algorithms" / "reset_ids.json").read_text()):
        config = case["config"]
        if config["is_eval"] or "specific" in config:
            continue
        for rank in case["ranks"]:
            draws = _draws(config, rank["rank"])
            for wanted in rank["updates"]:
                assert next(draws) == wanted[:: config["group"]], case["id"]
                checked += 1
    assert checked > 0


def _draws(config, rank):
    starts = [0, *accumulate(config["bins"])]
    tasks = config.get("filt") or range(len(config["bins"]))
    ids = [i for task in tasks for i in range(starts[task], starts[task + 1])]
    per_draw = config["num_envs"] // config["group"]
    if config["ordered"]:
        return ordered_draws(ids, config["world"], rank, per_draw)
    return random_draws(ids, config["seed"] + rank, per_draw)


def test_evaluation_order(goldens: Path):
    cases = json.loads((goldens / "algorithms" / "reset_ids.json").read_text())
    cases = [case for case in cases if case["config"]["is_eval"]]
    assert cases
    for case in cases:
        bins, world = case["config"]["bins"], case["config"]["world"]
        starts = [0, *accumulate(bins)]
        tasks = [
            Task(index=i, name=str(i), instruction="", num_trials=count)
            for i, count in enumerate(bins)
        ]
        episodes = evaluation_episodes(select_pairs(tasks, None, None), passes=1, seed=0)
        ids = [starts[e.task] + e.trial for e in episodes]
        for rank in case["ranks"]:
            recorded = [i for update in rank["updates"] for i in update]
            mine = ids[rank["rank"] :: world]
            mine += [-1] * len(recorded)
            assert recorded == mine[: len(recorded)], case["id"]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_walk_goes_on_for_ever(num_rows):
    draws = ordered_draws([5, 6], num_rows)
    assert all(next(draws)[0] in (5, 6) for _ in range(20))
