"""Demonstrations of the toy world's expert: which are made, how they are stored and read."""

import hashlib
import json
import os
import random
import shutil
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from vlactl_toy.environment import make_spec
from vlactl_toy.plugin import ENVIRONMENT, ToyEnvConfig

from vlactl.api.contracts import Demonstration, DemonstrationContext
from vlactl.demonstrations import samples
from vlactl.demonstrations.dataset import EPISODES, INFO, STATISTICS, STEPS, Source, write_dataset
from vlactl.demonstrations.make import (
    ATTEMPTS_PER_SUCCESS,
    FIRST_ATTEMPTS,
    Demonstrations,
    Setting,
    make_demonstrations,
    measure,
    usable_workers,
)
from vlactl.demonstrations.samples import (
    check_fits,
    chunk_labels,
    chunk_starts,
    load_dataset,
    load_datasets,
    merged_statistics,
)
from vlactl.demonstrations.staging import Attempt, read_attempts, read_steps, stage
from vlactl.demonstrations.statistics import describe_pictures, openvla_statistics
from vlactl.errors import ConfigError, EnvironmentNotReadyError, IntegrityError
from vlactl.launch.hardware import Hardware

NOBODY_SOLVES_IT = {"max_episode_steps": 1, "num_tasks": 2}


class Listener:
    def __init__(self):
        self.counts, self.notes = [], []

    def count(self, done, total):
        self.counts.append((done, total))

    def note(self, text):
        self.notes.append(text)


def toy(num_workers=2, bursts=4.0, **keys) -> Setting:
    config = ToyEnvConfig(num_tasks=keys.pop("num_tasks", 3), **keys)
    return Setting(
        plugin=ENVIRONMENT,
        config=config,
        spec=make_spec(config),
        context=DemonstrationContext(cameras=("front",), bursts=bursts),
        num_workers=num_workers,
    )


def make(folder: Path, setting: Setting, per_task=4, seed=0, watch=None) -> Path:
    """The whole way to a data set, as the command goes it."""
    tasks = range(len(setting.spec.tasks))
    staging = folder / "staging"
    watch = watch or Listener()
    attempts = make_demonstrations(setting, tasks, per_task, seed, staging, watch)
    source = Source(
        environment="toy",
        suite="toy",
        spec=setting.spec,
        cameras=setting.context.cameras,
        record={"some": "record"},
    )
    write_dataset(folder, staging, attempts, source)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("data", "meta", "videos")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("demonstrations"), toy())


# --------------------------------------------------------------------------------------------
# Which are made
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", range(60))
def test_the_same_attempts_are_made_whoever_makes_them(case):
    order = random.Random(case)
    wanted, rate = order.randint(1, 6), order.choice([0.0, 0.2, 0.5, 0.9, 1.0])
    succeeds = [order.random() < rate for _ in range(200)]

    def play(num_workers: int, known: dict[int, bool], patience: int) -> dict[int, bool]:
        plan = Demonstrations(0, wanted, known)
        for _ in range(patience):
            while len(plan.under_way) < num_workers and (number := plan.next()) is not None:
                plan.under_way.add(number)
            if not plan.under_way:
                break
            number = order.choice(sorted(plan.under_way))
            plan.finish(number, succeeds[number])
        return dict(plan.known)

    alone = play(1, {}, 1000)
    interrupted = play(4, play(3, {}, order.randint(0, 5)), 1000)
    assert alone == play(5, {}, 1000) == interrupted
    assert sum(alone.values()) <= wanted
    if sum(alone.values()) < wanted:
        assert len(alone) >= FIRST_ATTEMPTS + ATTEMPTS_PER_SUCCESS * sum(alone.values())


def test_neither_processes_nor_interruptions_change_a_data_set(dataset, tmp_path):
    alone = make(tmp_path / "alone", toy(num_workers=1))
    assert digests(alone) == digests(dataset)

    resumed = tmp_path / "resumed"
    shutil.copytree(dataset / "staging", resumed / "staging")
    for name in ("task-000_attempt-00001", "task-002_attempt-00000"):
        shutil.rmtree(resumed / "staging" / name)
    half = resumed / "staging" / ".123-task-002_attempt-00000"
    half.mkdir()
    (half / "front.mp4").write_bytes(b"half a film")
    watch = Listener()
    make(resumed, toy(num_workers=3), watch=watch)
    assert watch.counts[0] == (10, 12), "only what is missing is made again"
    assert digests(resumed) == digests(dataset)
    assert not half.exists()


def test_another_seed_gives_other_demonstrations(dataset, tmp_path):
    other = make(tmp_path, toy(), seed=1)
    states = [load_dataset(path, cameras=(), chunk_length=1).states_NP for path in (dataset, other)]
    assert not np.isin(states[0], states[1]).any()


def test_states_are_not_those_of_evaluations(dataset):
    demonstrated = pq.read_table(dataset / STEPS)
    begins = [
        row
        for row, frame in zip(
            demonstrated["observation.state"].to_pylist(),
            demonstrated["frame_index"].to_pylist(),
            strict=True,
        )
        if frame == 0
    ]
    evaluated = [
        np.random.default_rng([task, trial]).uniform(-0.9, 0.9)
        for task in range(3)
        for trial in range(8)
    ]
    assert not np.isclose(np.subtract.outer(begins, evaluated), 0, atol=1e-6).any()


def test_a_lost_process_costs_nothing_but_time(dataset, tmp_path):
    faults = {"0/demonstration": "die", "1/demonstration": "hang", "2/demonstration": "nan"}
    setting = toy(faults=faults, fault_dir=str(tmp_path), step_timeout=4.0)
    watch = Listener()
    made = make(tmp_path / "made", setting, watch=watch)
    assert digests(made) == digests(dataset)
    said = "\n".join(watch.notes)
    assert said.count("again:") == 3
    for cause in ("SIGKILL", "no answer within 4 s", "not finite"):
        assert cause in said


def test_simulators_that_always_fail_end_the_work(tmp_path):
    setting = toy()
    setting = replace(setting, plugin=replace(ENVIRONMENT, demonstrator="nowhere:make"))
    with pytest.raises(EnvironmentNotReadyError, match=r"times in a row(.|\n)*nowhere"):
        make_demonstrations(setting, [0, 1], 2, 0, tmp_path, Listener())
    assert sum(attempt.success for attempt in read_attempts(tmp_path)) == 0


MOODY = """
    from vlactl.errors import ConfigError
    from vlactl_toy.demonstrator import ToyDemonstrator

    class Moody(ToyDemonstrator):
        played = 0

        def demonstrate(self, task, seed, trial=None):
            self.played += 1
            if task == 0:
                raise ValueError("task 0 is beyond me")
            if task == 1 and self.played == 2:
                raise ConfigError("not this seed")
            return super().demonstrate(task, seed, trial)
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_one_bad_task_or_seed_does_not_end_the_work(tmp_path, monkeypatch, num_workers):
    (tmp_path / "moody.py").write_text(textwrap.dedent(MOODY))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    setting = toy(num_workers=num_workers)
    setting = replace(setting, plugin=replace(ENVIRONMENT, demonstrator="moody:Moody"))
    attempts = make_demonstrations(setting, [0, 1, 2], 2, 0, tmp_path / "staging", Listener())
    given_up = [attempt for attempt in attempts if attempt.failure]
    assert [attempt.number for attempt in given_up] == list(range(FIRST_ATTEMPTS))
    assert all("task 0 is beyond me" in attempt.failure for attempt in given_up)
    assert [sum(a.success for a in attempts if a.task == task) for task in (1, 2)] == [2, 2]
    assert not list((tmp_path / "staging").glob("task-000*")), "another run may try them again"


def test_a_task_that_cannot_be_solved_is_given_up(tmp_path):
    attempts = make_demonstrations(toy(**NOBODY_SOLVES_IT), [0, 1], 50, 0, tmp_path, Listener())
    per_task = [[a for a in attempts if a.task == task] for task in (0, 1)]
    for tried in per_task:
        successes = sum(attempt.success for attempt in tried)
        assert len(tried) == FIRST_ATTEMPTS + ATTEMPTS_PER_SUCCESS * successes
    failed = next(attempt for attempt in attempts if not attempt.success)
    assert [path.name for path in (tmp_path / failed.folder_name).iterdir()] == ["attempt.json"]


def test_rates_are_those_of_official_states():
    watch = Listener()
    setting = toy(num_trials=5)
    results = measure(setting, [0, 2], 5, watch)
    assert [(r.task, r.trial) for r in results] == [(t, n) for t in (0, 2) for n in range(5)]
    assert all(result.success for result in results)
    assert watch.counts[-1] == (10, 10)
    away = abs(np.random.default_rng([0, 0]).uniform(-0.9, 0.9) - (-0.8 + 1.6 * 0.5 / 3))
    assert results[0].num_steps == max(1, np.ceil((away - 0.08) / 0.1))


def test_workers_are_as_many_as_cores_memory_and_work_allow():
    hardware = Hardware(cores=16, ram_bytes=64 * 2**30)
    assert usable_workers(toy(), hardware, 3, num_episodes=100) == 16
    assert usable_workers(toy(), hardware, 3, num_episodes=5) == 5


# --------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------
def test_chunks_start_anywhere_but_in_bursts():
    perturbed = np.array([0, 0, 0, 0, 0, 1, 1, 0, 0, 0], bool)
    assert chunk_starts(perturbed, 1).tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert chunk_starts(perturbed, 3).tolist() == [0, 3, 7], "counted anew after a burst"
    assert chunk_starts(np.ones(3, bool), 1).tolist() == []


def test_chunks_end_at_bursts_and_are_filled_up_at_the_end():
    actions = np.stack([np.arange(1, 8), [-1, -1, -1, 1, 1, 1, 1]], axis=1).astype(np.float32)
    perturbed = np.array([0, 0, 1, 0, 0, 0, 0], bool)
    chunks, valid = chunk_labels(actions, perturbed, np.array([0, 1, 3, 5]), 3, gripper=1)
    assert valid.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert chunks[..., 0].tolist() == [[1, 2, 0], [2, 0, 0], [4, 5, 6], [6, 7, 0]]
    assert chunks[..., 1].tolist() == [[-1, -1, -1], [-1, -1, -1], [1, 1, 1], [1, 1, 1]], (
        "the gripper keeps its last command, also where `sft.whole_chunks` makes that a label"
    )
    without, _ = chunk_labels(actions, perturbed, np.array([5]), 3, gripper=None)
    assert without[0, 2].tolist() == [0, 0]


# --------------------------------------------------------------------------------------------
# What is stored
# --------------------------------------------------------------------------------------------
def test_steps_are_stored_as_they_were(tmp_path):
    demonstration = Demonstration(
        images={"front": np.full((9, 8, 8, 3), 7, np.uint8)},
        states_TP=np.linspace(0, 1, 18).reshape(9, 2),
        actions_TA=np.linspace(-1, 1, 9)[:, None],
        perturbed_T=np.arange(9) == 4,
        success=True,
    )
    attempt = Attempt(task=3, number=1, seed=2**62, success=True, num_steps=9)
    stage(tmp_path, attempt, demonstration, fps=10)
    assert read_attempts(tmp_path) == [attempt]
    steps = read_steps(tmp_path, attempt)
    assert np.array_equal(steps.actions_TA, demonstration.actions_TA.astype(np.float32))
    assert np.array_equal(steps.states_TP, demonstration.states_TP.astype(np.float32))
    assert steps.perturbed_T.tolist() == demonstration.perturbed_T.tolist()
    assert steps.histograms["front"][:, 7].tolist() == [2 * 64] * 3, "two pictures are counted"
    (tmp_path / attempt.folder_name / "steps.npz").write_bytes(b"")
    with pytest.raises(IntegrityError, match="is damaged"):
        read_steps(tmp_path, attempt)


def test_the_layout_is_that_of_lerobot(dataset):
    info = json.loads((dataset / INFO).read_text())
    steps, episodes = pq.read_table(dataset / STEPS), pq.read_table(dataset / EPISODES)
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"]) == (12, len(steps))
    assert info["fps"] == 10
    assert set(steps.column_names) | {"observation.images.front"} == set(info["features"])
    assert steps["index"].to_pylist() == list(range(len(steps)))
    ends = episodes["dataset_to_index"].to_pylist()
    assert episodes["dataset_from_index"].to_pylist() == [0, *ends[:-1]]
    assert ends[-1] == len(steps)
    lasts = episodes["videos/observation.images.front/to_timestamp"].to_pylist()
    assert np.allclose(lasts, np.array(ends) / 10)
    tasks = pq.read_table(dataset / "meta" / "tasks.parquet")
    assert tasks["task"].to_pylist() == ["reach goal 0", "reach goal 1", "reach goal 2"]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    stats = json.loads((dataset / "meta" / "stats.json").read_text())
    actions = np.array(steps["action"].to_pylist())[:, None]
    assert np.allclose(stats["action"]["mean"], actions.mean(axis=0))
    assert np.shape(stats["observation.images.front"]["mean"]) == (3, 1, 1)


def test_openvla_ranges_are_those_of_what_is_learned(dataset):
    steps = pq.read_table(dataset / STEPS)
    learned = ~np.array(steps["perturbed"].to_pylist())
    assert 0 < learned.sum() < len(learned)
    written = json.loads((dataset / STATISTICS).read_text())["toy"]
    actions = np.array(steps["action"].to_pylist())[learned, None]
    states = np.array(steps["observation.state"].to_pylist())[learned, None]
    assert np.allclose(written["action"]["q01"], np.quantile(actions, 0.01, axis=0))
    assert np.allclose(written["proprio"]["q99"], np.quantile(states, 0.99, axis=0))
    assert written["num_transitions"] == learned.sum()
    assert written["num_trajectories"] == 12


def test_the_gripper_is_turned_round_for_openvla():
    actions = np.array([[0.5, -1.0], [0.5, -1.0], [-0.5, 1.0], [-0.5, -1.0]])
    written = openvla_statistics(actions, np.zeros((4, 3)), gripper=1, num_episodes=2)
    assert written["action"]["mask"] == [True, False]
    assert written["action"]["mean"] == [0.0, 0.75], "1 is open, 0 closed"
    assert (written["action"]["min"], written["action"]["max"]) == ([-0.5, 0.0], [0.5, 1.0])
    assert actions[2, 1] == 1.0, "the caller's array is left alone"


def test_statistics_of_pictures_are_those_of_their_pixels():
    pictures = np.random.default_rng(0).integers(0, 200, (4, 8, 8, 3), np.uint8)
    histogram = np.stack([np.bincount(pictures[..., c].ravel(), minlength=256) for c in range(3)])
    stats = describe_pictures(histogram, 4)
    values = pictures / 255
    for name, expected in (
        ("min", values.min(axis=(0, 1, 2))),
        ("max", values.max(axis=(0, 1, 2))),
        ("mean", values.mean(axis=(0, 1, 2))),
        ("std", values.std(axis=(0, 1, 2))),
        ("q50", np.quantile(values, 0.5, axis=(0, 1, 2), method="inverted_cdf")),
    ):
        assert np.allclose(np.ravel(stats[name]), expected), name
    assert stats["count"] == [4]


# --------------------------------------------------------------------------------------------
# What is read
# --------------------------------------------------------------------------------------------
def test_samples_are_what_the_expert_saw_and_did(dataset):
    read = load_dataset(dataset, cameras=("front",), chunk_length=4)
    assert len(read) == len(read.pictures["front"]) == len(read.actions_NKA)
    assert read.actions_NKA.shape[1:] == (4, 1)
    goals = -0.8 + 1.6 * (read.task_N + 0.5) / 3
    ways = goals - read.states_NP[:, 0]
    assert np.allclose(read.actions_NKA[:, 0, 0], np.clip(ways / 0.1, -1, 1), atol=1e-5)
    assert read.valid_NK[:, 0].all()
    assert not read.valid_NK.all(), "there are bursts"
    columns = read.pictures["front"][..., 0].astype(float).mean(axis=1).argmax(axis=1)
    assert np.abs(columns - (goals + 1) / 2 * 7).max() < 1, "the goal's column is brightest"
    names = [read.instructions[index] for index in read.instruction_N]
    assert names == [f"reach goal {task}" for task in read.task_N]


def test_part_of_a_data_set_can_be_read(dataset):
    whole = load_dataset(dataset, cameras=("front",), chunk_length=2)
    part = load_dataset(dataset, cameras=("front",), chunk_length=2, demos_per_task=2, every=2)
    assert np.unique(part.episode_N).tolist() == [0, 1, 4, 5, 8, 9]
    assert len(part) < len(whole)
    chosen = [
        np.flatnonzero((whole.states_NP == state).all(axis=1) & (whole.episode_N == episode))[0]
        for state, episode in zip(part.states_NP, part.episode_N, strict=True)
    ]
    assert np.array_equal(part.pictures["front"], whole.pictures["front"][chosen])
    assert np.array_equal(part.actions_NKA, whole.actions_NKA[chosen])


def test_pictures_can_be_smaller_or_on_disk(dataset, monkeypatch):
    whole = load_dataset(dataset, cameras=("front",), chunk_length=1).pictures["front"]
    small = load_dataset(dataset, cameras=("front",), chunk_length=1, image_size=4)
    assert small.pictures["front"].shape[1:] == (4, 4, 3)
    means = whole.astype(float).reshape(-1, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    assert np.corrcoef(small.pictures["front"].ravel(), means.ravel())[0, 1] > 0.9
    monkeypatch.setattr(samples, "IN_MEMORY", 0.0)
    mapped = load_dataset(dataset, cameras=("front",), chunk_length=1).pictures["front"]
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ("wrist",)}, 'no pictures of camera "wrist"'),
        ({"cameras": ("front",), "image_size": 16}, "pictures of 16 pixels are wanted"),
        ({"cameras": (), "demos_per_task": 5}, r"5 demonstrations of task 0 are wanted; .* has 4"),
        ({"cameras": (), "demos_per_task": (1, 4, 5)}, r"5 .* of task 2 are wanted; .* has 4"),
        ({"cameras": (), "demos_per_task": (1, 2)}, "numbers for 2 tasks; the data is of 3: 3 in"),
    ],
)
def test_what_is_not_there_is_refused(dataset, options, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset(dataset, chunk_length=1, **options)


def test_damage_is_told(dataset, tmp_path):
    with pytest.raises(ConfigError, match="holds no demonstrations"):
        load_dataset(tmp_path, cameras=(), chunk_length=1)
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (video,) = copy.glob("videos/*/*/*.mp4")
    video.write_bytes(video.read_bytes()[:600])
    with pytest.raises(IntegrityError, match=video.name):
        load_dataset(copy, cameras=("front",), chunk_length=1)
    (copy / STEPS).write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="cannot read"):
        load_dataset(copy, cameras=(), chunk_length=1)
    (copy / INFO).write_text(json.dumps({"codebase_version": "v2.1"}))
    with pytest.raises(IntegrityError, match=r"version v2\.1"):
        load_dataset(copy, cameras=(), chunk_length=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda info: [],
        lambda info: info.pop("features") and info,
        lambda info: info["features"].pop("action") and info,
        lambda info: info["features"]["observation.state"].pop("shape") and info,
        lambda info: info["features"]["observation.images.front"]["shape"].pop() and info,
        lambda info: info | {"fps": "fast"},
    ],
    ids=["list", "featureless", "actionless", "shapeless", "flat", "words"],
)
def test_data_sets_of_others_are_told(dataset, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(dataset / "meta", copy / "meta")
    (copy / INFO).write_text(json.dumps(change(json.loads((copy / INFO).read_text()))))
    with pytest.raises(IntegrityError, match=r"info\.json"):
        samples.read_info(copy)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="holds no demonstrations"):
        samples.read_info(tmp_path / "file")


@pytest.mark.parametrize("lost", ["front.mp4", "steps.npz", "states_TP"])
def test_a_damaged_attempt_is_named_and_made_again(dataset, tmp_path, lost):
    folder = tmp_path / "again"
    shutil.copytree(dataset / "staging", folder / "staging")
    attempt = sorted((folder / "staging").glob("task-001_*"))[1]
    if lost == "states_TP":
        with np.load(attempt / "steps.npz") as arrays:
            kept = {name: array for name, array in arrays.items() if name != lost}
        np.savez(attempt / "steps.npz", **kept)
    else:
        content = (attempt / lost).read_bytes()
        (attempt / lost).write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match=attempt.name) as told:
        make(folder, toy())
    assert "delete the folder of this attempt" in told.value.hint
    assert not (folder / "meta").exists()
    shutil.rmtree(attempt)
    assert digests(make(folder, toy())) == digests(dataset)


# --------------------------------------------------------------------------------------------
# Several data sets
# --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory) -> Path:
    """Two tasks, of which the first has the instruction of the other data set's first."""
    return make(tmp_path_factory.mktemp("other"), toy(num_tasks=2, bursts=0), per_task=2, seed=5)


@pytest.mark.parametrize("in_memory", [True, False])
def test_data_sets_are_read_one_after_the_other(dataset, other_dataset, monkeypatch, in_memory):
    options = {"cameras": ("front",), "chunk_length": 3, "every": 2}
    first, second = (load_dataset(folder, **options) for folder in (dataset, other_dataset))
    if not in_memory:
        monkeypatch.setattr(samples, "IN_MEMORY", 0.0)
    both = load_datasets([dataset, other_dataset], **options)
    assert isinstance(both.pictures["front"], np.memmap) != in_memory
    assert len(both) == len(first) + len(second)
    for part, rows in ((first, slice(None, len(first))), (second, slice(len(first), None))):
        for name in ("states_NP", "actions_NKA", "valid_NK"):
            assert np.array_equal(getattr(both, name)[rows], getattr(part, name)), name
        assert np.array_equal(both.pictures["front"][rows], part.pictures["front"])
        words = [both.instructions[index] for index in both.instruction_N[rows]]
        assert words == [part.instructions[index] for index in part.instruction_N]
    assert len(set(both.instructions)) == len(both.instructions) == 3
    assert np.unique(both.task_N).tolist() == [0, 1, 2, 3, 4]
    assert np.unique(both.episode_N).tolist() == list(range(12 + 4))


def test_one_data_set_is_itself(dataset):
    options = {"cameras": (), "chunk_length": 2, "demos_per_task": 1}
    one, same = load_dataset(dataset, **options), load_datasets([dataset], **options)
    assert np.array_equal(one.actions_NKA, same.actions_NKA)
    assert merged_statistics([dataset]) == json.loads((dataset / STATISTICS).read_text())


def test_tasks_may_have_numbers_of_demonstrations_of_their_own(dataset, other_dataset):
    options = {"cameras": (), "chunk_length": 2, "demos_per_task": (3, 1, 2, 1, 2)}
    some = load_datasets([dataset, other_dataset], **options)
    pairs = set(zip(some.task_N.tolist(), some.episode_N.tolist(), strict=True))
    assert Counter(task for task, _ in pairs) == {0: 3, 1: 1, 2: 2, 3: 1, 4: 2}
    with pytest.raises(ConfigError, match=r"for 3 tasks; the data is of 6: 3 in .*, 3 in "):
        load_datasets([dataset, dataset], **options | {"demos_per_task": (1,) * 3})


def test_ranges_of_several_data_sets_are_those_of_all_their_steps(dataset, other_dataset):
    merged = merged_statistics([dataset, other_dataset])
    parts = [json.loads((folder / STATISTICS).read_text()) for folder in (dataset, other_dataset)]
    [(name, stated)] = merged.items()
    assert name == "toy+toy"
    tables = [pq.read_table(folder / STEPS) for folder in (dataset, other_dataset)]
    actions = np.concatenate(
        [table["action"].to_numpy()[~table["perturbed"].to_numpy()] for table in tables]
    )
    assert stated["action"]["q01"] == pytest.approx([np.quantile(actions, 0.01)])
    assert stated["action"]["q99"] == pytest.approx([np.quantile(actions, 0.99)])
    for key in ("num_transitions", "num_trajectories"):
        assert stated[key] == sum(part["toy"][key] for part in parts)
    lowest = min(part["toy"]["proprio"]["min"][0] for part in parts)
    assert stated["proprio"]["min"] == pytest.approx([lowest])


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"a": {}, "b": {}}'])
def test_damaged_statistics_are_told(dataset, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / STATISTICS).unlink()
    if content is not None:
        (copy / STATISTICS).write_text(content)
    with pytest.raises(IntegrityError, match=r"dataset_statistics\.json"):
        merged_statistics([copy])


def test_what_does_not_fit_is_refused_before_it_is_read(dataset):
    spec = make_spec(ToyEnvConfig())
    check_fits(dataset, spec, ("front",))
    check_fits(dataset, make_spec(ToyEnvConfig(image_size=4)), ("front",))
    with pytest.raises(ConfigError, match='no pictures of camera "wrist"'):
        check_fits(dataset, spec, ("wrist",))
    with pytest.raises(ConfigError, match=r"16 pixels are wanted; .* has 8"):
        check_fits(dataset, make_spec(ToyEnvConfig(image_size=16)), ("front",))
    with pytest.raises(ConfigError, match="action of 1 numbers, the environment 7"):
        check_fits(dataset, replace(spec, action_dim=7), ("front",))
    with pytest.raises(ConfigError, match="holds no demonstrations"):
        check_fits(dataset / "meta", spec, ("front",))
