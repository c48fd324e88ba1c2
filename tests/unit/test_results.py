"""Numbers in the README come from files in `results/`."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def counts(name: str) -> str:
    total = json.loads((ROOT / "results" / "object_small_pilot" / f"{name}.json").read_text())
    return f"{total['total']['successes']}/{total['total']['trials']}"


def test_the_table_of_results():
    section = (ROOT / "README.md").read_text().partition("## Results\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (base|after).*\| (\S+) \| (\S+) \|$", section, re.MULTILINE)
    assert rows == [
        (row, counts(f"{file}_greedy"), counts(f"{file}_sampled"))
        for row, file in (("base", "before"), ("after", "after"))
    ]


def test_the_steps_and_episodes_that_the_results_took():
    lines = (ROOT / "results" / "object_small_pilot" / "rl.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    trained = [step for step in steps if "env/num_trajectories" in step]
    episodes = sum(step["env/num_trajectories"] for step in trained)
    assert (
        f"after {len(trained)} steps of GRPO ({episodes:.0f} episodes"
        in (ROOT / "README.md").read_text()
    )
