"""Pairing of evaluations: what is compared, what is left out, what is refused."""

import json
from pathlib import Path

import pytest

from vlactl.cli.app import main
from vlactl.config.compose import compose
from vlactl.errors import ConfigError, IntegrityError, UserError
from vlactl.evaluate.compare import (
    COMPARISON_HEADER,
    compare,
    comparison_table,
    differing,
    read_evaluation,
)
from vlactl.evaluate.results import EpisodeJournal, EpisodeResult, summarise
from vlactl.launch.plan import environment_spec
from vlactl.report.atomic import write_json

SOLVED_BEFORE = {(0, 0), (0, 1), (1, 0)}
SOLVED_AFTER = {(0, 0), (0, 1), (0, 2), (0, 3), (1, 1)}


def evaluation(
    folder: Path, solved: set, *overrides: str, passes: int = 1, trials: int = 4, **header: object
) -> Path:
    """An evaluation of two tasks as `vlactl eval` leaves it; `solved` in every pass."""
    config = compose("toy_grpo", overrides).config
    results = [
        EpisodeResult(
            task=task,
            trial=trial,
            repeat=number,
            success=(task, trial) in solved,
            num_steps=9,
            episode_return=0.0,
            seed=1,
        )
        for task in range(2)
        for trial in range(trials)
        for number in range(passes)
    ]
    for result in results:
        EpisodeJournal(folder / "episodes.jsonl", durable=False).append(result)
    given = {
        "policy": {"label": folder.name, "sha256": f"{folder.name:a<64}"},
        "mode": "greedy",
        "temperature": None,
        "top_k": None,
        "passes": passes,
        "seed": 0,
        "machine": {"device": "CPU", "ranks": 1},
        "versions": {"mujoco": "3.3.7", "timm": "1.0"},
        "env": config.env.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
    }
    tasks = environment_spec(config).tasks
    write_json(folder / "eval.json", given | header | summarise(results, tasks))
    return folder


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "before", SOLVED_BEFORE)


@pytest.fixture
def after(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "after", SOLVED_AFTER)


def compared(first: Path, second: Path) -> dict:
    return compare(read_evaluation(first), read_evaluation(second))


def test_counts_and_rates(before, after):
    """Both solve 2 of 8, only the second one 3, only the first one 1: p = 10/16."""
    total = compared(before, after / "eval.json")["total"]
    assert (total["pairs"], total["only_a"], total["only_b"]) == (8, 1, 3)
    assert (total["rate_a"], total["rate_b"], total["difference"]) == (3 / 8, 5 / 8, 2 / 8)
    assert total["p"] == 0.625
    lower, upper = total["interval"]
    assert lower < 0 < 0.25 < upper
    backwards = compared(after, before)["total"]
    assert backwards["interval"] == pytest.approx([-upper, -lower])
    assert (backwards["only_a"], backwards["p"]) == (3, 0.625)


def test_table_has_a_row_per_task_and_a_total(before, after):
    rows = comparison_table(compared(before, after))
    assert all(len(row) == len(COMPARISON_HEADER) for row in rows)
    assert [row[0] for row in rows] == ["0", "1", "all"]
    assert rows[0][2:6] == ("4", "50.0%", "100.0%", "+50.0%")
    assert rows[1][-2:] == ("1", "1")


def test_passes_of_a_pair_are_one_observation(tmp_path):
    """Passes that all end alike make nothing surer."""
    one, two = (
        compared(
            evaluation(tmp_path / f"a{passes}", SOLVED_BEFORE, passes=passes),
            evaluation(tmp_path / f"b{passes}", SOLVED_AFTER, passes=passes),
        )["total"]
        for passes in (1, 2)
    )
    assert (two["pairs"], two["initial_states"]) == (16, 8)
    assert two["p"] == one["p"]
    assert two["interval"] == pytest.approx(one["interval"], abs=0.02)


def test_what_only_one_side_has_is_left_out_and_told(tmp_path, before, capsys):
    more = evaluation(tmp_path / "more", SOLVED_AFTER, passes=2, trials=5)
    found = compared(before, more)
    assert found["total"]["pairs"] == 8
    assert (found["a"]["unpaired"], found["b"]["unpaired"]) == (0, 12)
    assert main(["eval", "--compare", str(before), str(more)]) == 0
    out = capsys.readouterr().out
    assert "12 episodes are in B only" in out
    assert "McNemar's exact test" in out


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("env.num_tasks=3", "env.num_tasks: 2 and 3"),
        ("env.max_episode_steps=20", "env.max_episode_steps: 16 and 20"),
    ],
)
def test_other_problems_are_refused(tmp_path, before, key, shown):
    with pytest.raises(ConfigError, match="cannot be paired") as caught:
        compared(before, evaluation(tmp_path / "other", SOLVED_AFTER, key))
    assert shown in caught.value.message


def test_the_horizon_that_was_played_counts(tmp_path):
    """Not whether it was written out or left to the suite."""
    env = {"name": "my-robot", "max_episode_steps": None}
    usual = evaluation(tmp_path / "usual", SOLVED_BEFORE, env=env, horizon=280)
    written = env | {"max_episode_steps": 280}
    same = evaluation(tmp_path / "same", SOLVED_AFTER, env=written, horizon=280)
    before_it_was_recorded = evaluation(tmp_path / "old", SOLVED_AFTER, env=written)
    for other in (same, before_it_was_recorded):
        assert compared(usual, other)["total"]["pairs"] == 8
        assert compared(usual, other)["differs"] == {}
    shorter = evaluation(tmp_path / "shorter", SOLVED_AFTER, env=env, horizon=160)
    with pytest.raises(ConfigError, match=r"env\.max_episode_steps: 280 and 160"):
        compared(usual, shorter)


def test_other_tasks_under_the_same_settings_are_refused(before, after):
    """As of another version of a suite."""
    summary = json.loads((after / "eval.json").read_text())
    summary["tasks"][1]["instruction"] = "something else"
    write_json(after / "eval.json", summary)
    with pytest.raises(ConfigError, match=r"task 1: .*reach goal 1.* and .*something else"):
        compared(before, after)


def test_a_simulator_that_is_not_installed_can_be_compared(tmp_path):
    env = {"name": "my-robot", "num_envs": 2, "table": "blue"}
    one = evaluation(tmp_path / "one", SOLVED_BEFORE, env=env)
    same = evaluation(tmp_path / "same", SOLVED_AFTER, env=env | {"num_envs": 9})
    other = evaluation(tmp_path / "other", SOLVED_AFTER, env=env | {"table": "red"})
    assert compared(one, same)["total"]["pairs"] == 8
    with pytest.raises(ConfigError, match="blue and red"):
        compared(one, other)


def test_what_may_differ_is_shown(tmp_path, before):
    other = evaluation(
        tmp_path / "other",
        SOLVED_AFTER,
        "env.image_size=16",
        "env.num_envs=2",
        "model.hidden=8",
        mode="sampled",
        temperature=1.6,
        versions={"mujoco": "3.3.6", "timm": "2.0"},
        machine={"device": "H100", "ranks": 8},
    )
    assert differing(read_evaluation(before), read_evaluation(other)) == {
        "mode": ("greedy", "sampled"),
        "temperature": (None, 1.6),
        "env.image_size": (8, 16),
        "env.num_envs": (4, 2),
        "model.hidden": (32, 8),
        "versions.mujoco": ("3.3.7", "3.3.6"),
        "machine.device": ("CPU", "H100"),
    }


def test_nothing_in_common(tmp_path, before):
    other = evaluation(tmp_path / "other", set(), trials=5)
    for name in ("episodes.jsonl", "eval.json"):
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / name).write_bytes((other / name).read_bytes())
    late = [line for line in (other / "episodes.jsonl").read_text().splitlines() if '": 4' in line]
    (tmp_path / "part" / "episodes.jsonl").write_text("\n".join([*late, ""]))
    summary = json.loads((other / "eval.json").read_text())
    tasks = environment_spec(compose("toy_grpo").config).tasks
    late_results = [EpisodeResult.from_json(line) for line in late]
    write_json(tmp_path / "part" / "eval.json", summary | summarise(late_results, tasks))
    with pytest.raises(ConfigError, match="in common"):
        compared(before, tmp_path / "part")


# --------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------
def test_what_is_no_finished_evaluation_is_named(tmp_path, before):
    (before / "eval_request.json").write_text("{}")
    (before / "eval.json").unlink()
    for path, expected in ((before, "is not finished"), (tmp_path / "none", "is no evaluation")):
        with pytest.raises(ConfigError, match=expected):
            read_evaluation(path)


def test_a_lone_summary_is_not_enough(before):
    (before / "episodes.jsonl").unlink()
    with pytest.raises(ConfigError, match="no episodes beside"):
        read_evaluation(before)


def test_files_that_do_not_belong_together(before, after):
    lines = (after / "episodes.jsonl").read_bytes()
    (before / "episodes.jsonl").write_bytes(lines)
    with pytest.raises(IntegrityError, match="does not belong to the episodes") as caught:
        read_evaluation(before)
    assert "it counts 2 successes in 4 episodes of task 0, and there are 4 in 4" in str(
        caught.value
    )


def test_a_total_that_is_not_the_sum_of_its_tasks(before):
    summary = json.loads((before / "eval.json").read_text())
    summary["total"]["successes"] = 7
    write_json(before / "eval.json", summary)
    with pytest.raises(IntegrityError, match="7 successes in 8 episodes, and there are 3 in 8"):
        read_evaluation(before)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"total": {"trials": 8}}', '{"total": null}'])
def test_a_damaged_summary_is_named(before, text):
    (before / "eval.json").write_text(text)
    with pytest.raises(UserError, match=r"eval\.json is not the result"):
        read_evaluation(before)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": "none"}, ": tasks: Input should be a valid array"),
        ({"tasks": [{"task": 0}]}, " by this version of vlactl: it lacks tasks.0.successes, "),
        ({"mode": "sampled"}, "it was sampled, and there is no temperature"),
        ({"mode": "by chance"}, ": mode: "),
        ({"versions": None}, ": versions: "),
        ({"machine": []}, ": machine: "),
        ({"total": {"successes": "3"}}, ": total.successes: Input should be a valid integer"),
    ],
)
def test_a_summary_that_is_damaged_within_is_named(before, after, changes, expected, capsys):
    summary = json.loads((before / "eval.json").read_text())
    write_json(before / "eval.json", summary | changes)
    assert main(["eval", "--compare", str(before), str(after)]) == 5
    text = capsys.readouterr().err
    assert "eval.json is not the result of an evaluation" in text
    assert expected in text


def test_a_summary_of_an_older_version_says_what_it_lacks(before):
    summary = json.loads((before / "eval.json").read_text())
    del summary["policy"], summary["passes"]
    write_json(before / "eval.json", summary)
    with pytest.raises(IntegrityError, match=r"by this version of vlactl: it lacks policy, passes"):
        read_evaluation(before)


@pytest.mark.parametrize(
    ("old", "new"), [('"success": true', '"success": "yes"'), ('"task": 0', '"task": "0"')]
)
def test_an_episode_that_is_damaged_within_is_named(before, old, new):
    journal = before / "episodes.jsonl"
    journal.write_text(journal.read_text().replace(old, new, 1))
    with pytest.raises(IntegrityError, match=r"episodes\.jsonl:1 is not an episode .*which is no"):
        read_evaluation(before)


# --------------------------------------------------------------------------------------------
# Command
# --------------------------------------------------------------------------------------------
def test_the_command_prints_and_writes(before, after, tmp_path, capsys):
    copy = tmp_path / "new" / "comparison.json"
    assert main(["eval", "--compare", str(before), str(after), "--json", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "B - A: +25.0 points" in out
    assert "p = 0.62 (McNemar's exact test)" in out
    assert f"A  before  greedy  beforeaaaaaa  {before}" in out
    assert json.loads(copy.read_text()) == compared(before, after)


def test_a_json_file_that_cannot_be_written_is_found_first(before, tmp_path, capsys):
    assert main(["eval", "--compare", str(before), "nowhere", "--json", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}: it is a folder" in capsys.readouterr().err


def test_markdown_is_a_table(before, after, capsys):
    assert main(["eval", "--compare", str(before), str(after), "--markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert f"| {' | '.join(COMPARISON_HEADER)} |" in lines
    row = next(line for line in lines if line.startswith("| all |"))
    assert row.startswith("| all |  | 8 | 37.5% | 62.5% | +25.0% |")


def test_the_same_policy_twice_is_told(before, capsys):
    assert main(["eval", "--compare", str(before), str(before)]) == 0
    assert "played with the same weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [("--suite", "toy"), ("--passes", "2"), ("--step", "0"), ("--set", "a=1")]
)
def test_a_comparison_plays_nothing(before, after, options, capsys):
    assert main(["eval", "--compare", str(before), str(after), *options]) == 2
    assert "--compare plays nothing" in capsys.readouterr().err
