"""Intervals, summaries, and a journal that survives crashes."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlactl.api.contracts import Task
from vlactl.errors import IntegrityError
from vlactl.evaluate.results import (
    TABLE_HEADER,
    EpisodeJournal,
    EpisodeResult,
    add_redone,
    claim_weights,
    load_actions,
    merge_journals,
    read_results,
    save_actions,
    summarise,
    table,
    write_json,
)
from vlactl.evaluate.statistics import wilson

TASKS = [
    Task(index=index, name=f"TASK_{index}", instruction=f"do {index}", num_trials=50)
    for index in range(4)
]


def episode(task=0, trial=0, repeat=0, *, success=True, num_steps=10) -> EpisodeResult:
    return EpisodeResult(
        task=task,
        trial=trial,
        repeat=repeat,
        success=success,
        num_steps=num_steps,
        episode_return=5.0 * success,
        seed=2**62 + 1,
    )


# --------------------------------------------------------------------------------------------
# Summary
# --------------------------------------------------------------------------------------------
@st.composite
def counts(draw) -> tuple[int, int]:
    trials = draw(st.integers(1, 100_000))
    return draw(st.integers(0, trials)), trials


@given(counts())
def test_wilson_lies_in_bounds_and_contains_the_rate(successes_trials):
    successes, trials = successes_trials
    lower, upper = wilson(successes, trials)
    assert 0.0 <= lower <= successes / trials <= upper <= 1.0
    assert lower < upper


@given(counts())
def test_wilson_treats_failures_like_successes(successes_trials):
    successes, trials = successes_trials
    lower, upper = wilson(successes, trials)
    mirrored_lower, mirrored_upper = wilson(trials - successes, trials)
    assert (lower, upper) == pytest.approx((1 - mirrored_upper, 1 - mirrored_lower), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [
        (0, 0, (0.0, 1.0)),
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),
    ],
)
def test_wilson_values(successes, trials, interval):
    assert wilson(successes, trials) == pytest.approx(interval, abs=1e-4)


def test_summary_per_task_and_in_total():
    results = [
        episode(task=2, trial=0, num_steps=10),
        episode(task=2, trial=1, num_steps=20),
        episode(task=2, trial=2, num_steps=99, success=False),
        episode(task=0, trial=0, success=False),
    ]
    summary = summarise(results, TASKS)
    first, second = summary["tasks"]
    assert (first["task"], first["name"], first["successes"], first["trials"]) == (
        0,
        "TASK_0",
        0,
        1,
    )
    assert first["mean_steps_of_successes"] is None
    assert (second["task"], second["successes"], second["trials"]) == (2, 2, 3)
    assert second["rate"] == pytest.approx(2 / 3)
    assert second["mean_steps_of_successes"] == 15
    assert summary["total"]["rate"] == 0.5
    assert summary["total"]["interval"] == pytest.approx(wilson(2, 4))
    json.dumps(summary, allow_nan=False)


def test_passes_of_a_pair_do_not_make_the_interval_narrower_than_they_should():
    once = [episode(trial=trial, success=trial < 3) for trial in range(10)]
    again = [episode(trial=trial, repeat=1, success=trial < 3) for trial in range(10)]
    total = summarise([*once, *again], TASKS)["total"]
    assert (total["successes"], total["trials"]) == (6, 20)
    assert total["interval"] == pytest.approx(wilson(3, 10))
    mixed = [episode(trial=trial, repeat=1, success=trial > 6) for trial in range(10)]
    assert summarise([*once, *mixed], TASKS)["total"]["interval"] == pytest.approx(wilson(6, 20))


def test_table_has_a_row_per_task_and_a_total():
    rows = table(summarise([episode(), episode(trial=1, success=False)], TASKS))
    assert rows == [
        ("0", "do 0", "1/2", "50.0%", "9.5% - 90.5%", "10"),
        ("all", "", "1/2", "50.0%", "9.5% - 90.5%", "10"),
    ]
    assert all(len(row) == len(TABLE_HEADER) for row in rows)


def test_table_of_nothing():
    assert table(summarise([], TASKS)) == [("all", "", "0/0", "-", "-", "-")]


# --------------------------------------------------------------------------------------------
# Journal
# --------------------------------------------------------------------------------------------
def test_journal_returns_what_was_appended(tmp_path):
    journal = EpisodeJournal(tmp_path / "new" / "episodes-0.jsonl")
    assert journal.read() == []
    journal.append(episode(task=1))
    journal.append(episode(task=0, success=False))
    assert journal.read() == [episode(task=0, success=False), episode(task=1)]


@pytest.mark.parametrize("num_bytes", [1, 20])
def test_a_cut_last_line_is_ignored_and_overwritten(tmp_path, num_bytes):
    path = tmp_path / "episodes-0.jsonl"
    EpisodeJournal(path).append(episode(trial=0))
    EpisodeJournal(path).append(episode(trial=1))
    path.write_bytes(path.read_bytes()[:-num_bytes])
    assert EpisodeJournal(path).read() == [episode(trial=0)]
    EpisodeJournal(path).append(episode(trial=2))
    assert EpisodeJournal(path).read() == [episode(trial=0), episode(trial=2)]


def test_reading_never_changes_the_file(tmp_path):
    path = tmp_path / "episodes-0.jsonl"
    path.write_bytes(b'{"task": 0')
    assert EpisodeJournal(path).read() == []
    assert path.read_bytes() == b'{"task": 0'


def test_an_episode_counts_once_and_its_last_entry_counts(tmp_path):
    journal = EpisodeJournal(tmp_path / "episodes-0.jsonl")
    journal.append(episode(success=False))
    journal.append(episode(repeat=1))
    journal.append(episode(success=True))
    assert journal.read() == [episode(success=True), episode(repeat=1)]


def test_results_of_all_ranks_are_merged(tmp_path):
    EpisodeJournal(tmp_path / "episodes-0.jsonl").append(episode(task=1))
    EpisodeJournal(tmp_path / "episodes-1.jsonl").append(episode(task=0))
    EpisodeJournal(tmp_path / "episodes-1.jsonl").append(episode(task=1))
    assert read_results(tmp_path) == [episode(task=0), episode(task=1)]


def test_journals_become_one_file_in_order(tmp_path):
    EpisodeJournal(tmp_path / "episodes-0.jsonl").append(episode(task=1))
    EpisodeJournal(tmp_path / "episodes-1.jsonl").append(episode(task=0, repeat=1))
    EpisodeJournal(tmp_path / "episodes-1.jsonl").append(episode(task=0, repeat=0))
    before = read_results(tmp_path)
    for _ in range(2):
        merge_journals(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["episodes.jsonl"]
        assert read_results(tmp_path) == before
    EpisodeJournal(tmp_path / "episodes-0.jsonl").append(episode(task=0, trial=1))  # it goes on
    merge_journals(tmp_path)
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    keys = [(line["task"], line["trial"], line["repeat"]) for line in map(json.loads, lines)]
    assert keys == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]


def test_other_weights_do_not_go_on(tmp_path):
    assert claim_weights(tmp_path, "a" * 64) == claim_weights(tmp_path, "a" * 64) == "a" * 64
    with pytest.raises(IntegrityError, match=f"of other weights: {'a' * 12}, and these are bbb"):
        claim_weights(tmp_path, "b" * 64)
    (tmp_path / "weights.json").write_text("{}")
    with pytest.raises(IntegrityError, match="is damaged"):
        claim_weights(tmp_path, "a" * 64)


@pytest.mark.parametrize("line", [b"not json", b'{"task": 0}', b"[1]", b"\xff\xfe"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "episodes-0.jsonl"
    EpisodeJournal(path).append(episode())
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(IntegrityError, match=r"episodes-0\.jsonl:2 is not an episode"):
        EpisodeJournal(path).read()


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------
def test_actions_are_stored_in_double_precision(tmp_path):
    result = episode(task=3, trial=7)
    actions_TA = np.random.default_rng(0).standard_normal((5, 7))
    save_actions(tmp_path, result, actions_TA)
    assert [path.name for path in (tmp_path / "actions").iterdir()] == ["task-03_trial-07_0.npy"]
    loaded = load_actions(tmp_path, result)
    assert loaded.dtype == np.float64
    assert np.array_equal(loaded, actions_TA)


@pytest.mark.parametrize("content", [None, b"", b"\x93NUMPY\x01\x00", b"\x80\x04K*."])
def test_missing_or_damaged_actions_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "actions").mkdir()
        (tmp_path / "actions" / "task-00_trial-00_0.npy").write_bytes(content)
    with pytest.raises(IntegrityError, match="actions of task 0, trial 0"):
        load_actions(tmp_path, episode())


def test_a_damaged_count_of_redone_episodes_is_named(tmp_path):
    for content in ("", "[]", "{}", '{"redone_episodes": null}'):
        (tmp_path / "redone.json").write_text(content)
        with pytest.raises(IntegrityError, match=r"redone\.json is damaged"):
            add_redone(tmp_path, 1)


def test_failed_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
