"""What the README shows of `results/` is what the files there say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from vlactl.evaluate.results import read_results
from vlactl.evaluate.statistics import wilson

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
SUMMARIES = sorted(RESULTS.glob("*/*/*/eval.json"))


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("results_make", RESULTS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_table_of_the_files(make):
    assert make.table() in (ROOT / "README.md").read_text(), "run: python results/make.py"


def test_the_picture_is_of_the_same_files(make):
    assert make.digest() in make.PICTURE.read_text(), "run: python results/make.py"


def test_a_row_is_made_of_its_files(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    (tmp_path / "runs.toml").write_text(
        '[[section]]\ntitle = "S"\n[[section.row]]\npolicy = "P"\nevals = "e"\ntraining = "t"\n'
    )
    lines = [
        {"step": 0, "env/num_trajectories": 8.0, "env/success_once": 0.5, "time/step": 60.0},
        {"step": 0, "eval/success_once": 0.25, "time/eval": 30.0},
        {"step": 1, "env/num_trajectories": 8.0, "env/success_once": 1.0, "time/step": 90.0},
    ]
    (tmp_path / "t").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "e/greedy").mkdir(parents=True)
    total = {"successes": 1, "trials": 4, "rate": 0.25, "interval": [0.1, 0.5]}
    (tmp_path / "e/greedy/eval.json").write_text(json.dumps({"total": total}))
    assert make.table().splitlines()[3:5] == [
        "| **S** | | | |",
        "| P | 1/4 = 25.0 % [10.0, 50.0] | not measured | 2 steps, 16 episodes, 3 min |",
    ]
    (axes,) = make.draw().axes
    assert axes.lines[0].get_ydata().tolist() == [0.5, 0.75]
    assert axes.lines[1].get_xydata().tolist() == [[2.0, 0.25]]


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_summaries_agree_with_their_episodes(path):
    total = json.loads(path.read_text())["total"]
    assert total["interval"] == pytest.approx(
        wilson(total["successes"], total["trials"]),
        abs=1e-5,  # the pilot's: a shorter z
    )
    assert total["trials"] == (50 if path.is_relative_to(RESULTS / "demo") else 500)
    if (path.parent / "episodes.jsonl").exists():  # the pilot's were not kept
        results = read_results(path.parent)
        assert len({(each.task, each.trial) for each in results}) == total["trials"]
        assert sum(each.success for each in results) == total["successes"]
