"""`vlactl report`: the numbers of the page are those of the run, and a browser shows it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlactl.cli.app import main
from vlactl.cli.reporting import mixed
from vlactl.config.compose import compose
from vlactl.evaluate.results import (
    EpisodeJournal,
    EpisodeResult,
    save_actions,
    summarise,
)
from vlactl.evaluate.statistics import paired_difference, wilson
from vlactl.launch.hardware import Gpu, Hardware
from vlactl.launch.plan import environment_spec, make_plan
from vlactl.launch.rundir import create_run_dir, write_run
from vlactl.launch.status import write_failure, write_result
from vlactl.report.atomic import write_json
from vlactl.report.sinks import MetricsLog

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MACHINE = Hardware(
    cores=2,
    ram_bytes=2**33,
    cpu="A Fast One",
    gpus=(Gpu(index=0, name="Big GPU", memory_bytes=80 * 2**30),),
)
STEPS, EPISODES = 6, 64
SKIPPED = 3
"""Index of a step without an update."""
NUMBERS = "The numbers of the curves, step by step"
COMPARED = "Success per task before and after"


# --------------------------------------------------------------------------------------------
# A run directory, as training leaves it
# --------------------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "toy_grpo" / "2026-01-01T00-00-00")


def make_run(path: Path, preset: str = "toy_grpo", *, steps: int = STEPS) -> Path:
    composed = compose(preset, ["eval.every=3"])
    create_run_dir(path)
    plan = make_plan(composed.config, Hardware(cores=2, ram_bytes=2**33), gpus=1)
    write_run(path, composed.config, plan, composed.provenance, MACHINE)
    log = MetricsLog(path, ())
    for step in range(steps):
        log.log(step, metrics_of(step))
    (path / "logs" / "attempt-1").mkdir(parents=True)
    (path / "logs" / "attempt-2").mkdir()
    (path / "status").mkdir()
    write_result(path, "finished")
    return path


def metrics_of(step: int) -> dict[str, float]:
    rng = np.random.default_rng(step)
    update = {
        "train/actor/approx_kl": rng.uniform(0, 0.1),
        "train/actor/entropy_loss": rng.uniform(1, 2),
        "train/actor/clip_fraction": rng.uniform(),
        "train/actor/grad_norm": math.nan if step == 1 else rng.uniform(),
    }
    return {
        "env/success_once": int(rng.integers(0, EPISODES + 1)) / EPISODES,
        "env/num_trajectories": float(EPISODES),
        "env/restarts": 1.0,
        "env/dropped_groups": 0.0,
        "train/actor/lr": 1e-3 / (step + 1),
        "time/generate_rollouts": 2.0,
        "time/actor_training": 1.0,
        "time/step": 3.5,
        **({} if step == SKIPPED else update),
    }


def evaluate(folder: Path, outcomes: Sequence[bool], **header: Any) -> Path:
    """An evaluation of both toy tasks, half of the outcomes each, that can be filmed."""
    journal = EpisodeJournal(folder / "episodes-0.jsonl", durable=False)
    for number, success in enumerate(outcomes):
        task, trial = divmod(number, len(outcomes) // 2)
        result = EpisodeResult(
            task=task,
            trial=trial,
            repeat=0,
            success=success,
            num_steps=16,
            episode_return=0.0,
            seed=1,
        )
        save_actions(folder, result, np.zeros((16, 1)), durable=False)
        journal.append(result)
    config = compose("toy_grpo").config
    tasks = environment_spec(config).tasks
    head = {
        "policy": {"label": f"policy of {folder.name}", "sha256": f"{folder.name:0<64}"},
        **{"mode": "sampled", "temperature": 1.0, "top_k": 0, "passes": 1},
        "env": config.env.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "versions": {"torch": "1.2.3"},
        "machine": {"device": "CPU"},
    }
    write_json(folder / "eval.json", head | header | summarise(journal.read(), tasks))
    return folder


BEFORE = [True, False, False, False, True, False, False, True]
AFTER = [False, True, True, True, True, True, True, True]


@pytest.fixture
def evaluated(run: Path) -> Path:
    """A run with two evaluations of its own; gained: 3 and 2, lost: 1 and 0."""
    evaluate(run / "evals" / "step-000003", BEFORE)
    evaluate(run / "evals" / "step-000006", AFTER)
    return run


# --------------------------------------------------------------------------------------------
# A page, read back
# --------------------------------------------------------------------------------------------
class PageReader(HTMLParser):
    """Tables by caption, the text of everything, and the elements that a page consists of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self._open: list[str] = []
        self.feed(html)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "path", "use"):
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)
        if "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data.strip()


def report(*arguments: str | Path) -> PageReader:
    """The page that the command writes into the run."""
    assert main(["report", *map(str, arguments)]) == 0
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else None
    return PageReader(Path(out or Path(arguments[0]) / "report.html").read_text(encoding="utf-8"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------
COLUMNS = {
    "KL divergence": "train/actor/approx_kl",
    "Entropy": "train/actor/entropy_loss",
    "Clip fraction": "train/actor/clip_fraction",
    "Gradient norm": "train/actor/grad_norm",
    "Learning rate": "train/actor/lr",
}


def test_every_number_of_the_curves_is_that_of_the_record(run):
    header, *rows = report(run, "--films", "0").tables[NUMBERS]
    lines = metrics(run)
    assert len(rows) == len(lines) == STEPS
    for row, line in zip(rows, lines, strict=True):
        cells = dict(zip(header, row, strict=True))
        successes = round(line["env/success_once"] * EPISODES)
        low, high = wilson(successes, EPISODES)
        assert cells["step"] == str(line["step"] + 1)
        assert cells["successes"] == f"{successes}/{EPISODES}"
        rate = f"{successes / EPISODES:.1%} ({low:.1%} to {high:.1%})"
        assert cells["rate (95 % interval)"] == rate
        for column, name in COLUMNS.items():
            expected = line.get(name)
            shown = None if cells[column] == "-" else float(cells[column])
            assert shown == (None if expected is None else pytest.approx(expected, rel=1e-3))
    assert rows[SKIPPED][header.index("KL divergence")] == "-"
    assert rows[1][header.index("Gradient norm")] == "-"


def test_a_curve_per_metric_and_none_for_what_was_not_measured(run):
    page = report(run, "--films", "0")
    labels = [dict(a)["aria-label"] for tag, a in page.elements if dict(a).get("role") == "img"]
    titles = [label.partition(":")[0] for label in labels]
    assert titles == ["Training episodes", *COLUMNS, "Seconds of a step, by phase"]
    kl = [line["train/actor/approx_kl"] for line in metrics(run) if line["step"] != SKIPPED]
    shown = labels[titles.index("KL divergence")]
    assert f"{kl[0]:.3g} at step 1, {kl[-1]:.3g} at step 6" in shown
    assert f"lowest {min(kl):.3g}, highest {max(kl):.3g}" in shown
    assert f"Without a value: 1 of {STEPS} steps." in page.text


def test_many_steps_are_added_up(tmp_path):
    run = make_run(tmp_path / "run", steps=450)
    header, *rows = report(run, "--films", "0").tables[NUMBERS]
    assert len(rows) == 150
    counts = [row[header.index("successes")].split("/") for row in rows]
    lines = metrics(run)
    assert sum(int(good) for good, _ in counts) == sum(
        round(line["env/success_once"] * EPISODES) for line in lines
    )
    assert {number for _, number in counts} == {str(3 * EPISODES)}
    assert rows[2][0] == "7-9"
    mean = np.mean([line["train/actor/approx_kl"] for line in lines[6:9]])
    assert float(rows[2][header.index("KL divergence")]) == pytest.approx(mean, rel=1e-3)
    assert (run / "report.html").stat().st_size < 1_000_000


def test_of_filled_trajectories_only_the_first_episode_counts(tmp_path):
    run = make_run(tmp_path / "run", "toy_ppo")
    per_step = compose("toy_ppo").config.rollout.episodes_per_step
    MetricsLog(run, ()).log(STEPS, metrics_of(STEPS) | {"env/num_trajectories": 2.0 * per_step})
    header, *rows = report(run, "--films", "0").tables[NUMBERS]
    assert rows[-1][header.index("successes")].endswith(f"/{per_step}")


def test_seconds_by_phase(run):
    table = report(run, "--films", "0").tables["Seconds by phase"]
    assert table[1:] == [
        ["generate rollouts", "6", "2", "12", "57.1%"],
        ["actor training", "6", "1", "6", "28.6%"],
        ["step", "6", "3.5", "21", "100.0%"],
    ]


def test_before_and_after(evaluated):
    page = report(evaluated, "--films", "0")
    _, first, second, total = page.tables[COMPARED]
    assert (first[2], first[4], first[6:8]) == ("1/4", "3/4", ["3", "1"])
    assert (second[2], second[4], second[6:8]) == ("2/4", "4/4", ["2", "0"])
    low, high = (f"{100 * bound:.1f}" for bound in wilson(3, 8))
    assert total[:4] == ["all", "", "3/8", f"37.5 ({low} to {high})"]
    low, high = (f"{100 * b:+.1f}" for b in paired_difference(BEFORE, AFTER, [1] * 8))
    assert total[6:] == ["5", "1", f"+50.0 ({low} to {high})"]
    # Of 6 episodes that differ, 5 or more or 1 or fewer were gained: 2 (6 + 1) / 64.
    assert f"+50.0 points 8 pairs, 95 %: {low} to {high}, p = 0.22" in page.text
    assert (
        "Before: after 3 steps, sampled at temperature 1, policy policy of step-000003, weights "
        "step-0000030. After: after 6 steps, "
    ) in page.text
    for absent in ("Not measured alike", "Without a pair", "no evaluation of this run"):
        assert absent not in page.text
    evaluations = page.tables["All evaluations of the run"]
    assert [row[:3] for row in evaluations[1:]] == [
        ["3", "sampled at temperature 1", "3/8"],
        ["6", "sampled at temperature 1", "7/8"],
    ]


def test_evaluations_can_be_named(evaluated, tmp_path):
    base = evaluate(tmp_path / "base", [False] * 8, mode="greedy", temperature=None)
    page = report(evaluated, "--films", "0", "--before", base)
    assert page.tables[COMPARED][-1][2] == "0/8"
    assert page.tables[COMPARED][-1][4] == "7/8"
    assert 'Not measured alike: mode "greedy", then "sampled"' in page.text
    other = evaluate(tmp_path / "other", [True] * 8)
    page = report(evaluated, "--films", "0", "--before", base, "--after", other)
    assert page.tables[COMPARED][-1][8].startswith("+100.0 (")


def test_evaluations_of_other_problems_are_not_compared(evaluated, tmp_path, capsys):
    env = compose("toy_grpo", ["env.max_episode_steps=32"]).config.env.model_dump(mode="json")
    base = evaluate(tmp_path / "base", BEFORE, env=env)
    other = evaluate(tmp_path / "other", AFTER)
    page_file = evaluated / "report.html"
    assert main(["report", str(evaluated), "--before", str(base), "--after", str(other)]) == 2
    assert "env.max_episode_steps: 32 and 16" in capsys.readouterr().err
    assert not page_file.exists()


@pytest.mark.parametrize(("side", "left_out"), [("--before", 6), ("--after", 3)])
def test_an_own_evaluation_that_fits_none_that_was_named_is_left_out(
    evaluated, tmp_path, side, left_out
):
    """As where training evaluates on other initial states than a person does."""
    env = compose("toy_grpo", ["env.max_episode_steps=32"]).config.env.model_dump(mode="json")
    named = evaluate(tmp_path / "named", [True] * 8, env=env)
    page = report(evaluated, "--films", "0", side, named)
    assert COMPARED not in page.tables
    assert page.tables["Success per task named, sampled at temperature 1"][-1][2] == "8/8"
    assert f"The run's own evaluation after {left_out} steps is left out: " in page.text
    assert "cannot be paired" in page.text


def test_rates_beside_a_difference_are_of_the_same_episodes(evaluated, tmp_path):
    """Four initial states per task in one, eight in the other."""
    more = evaluate(tmp_path / "more", [*AFTER[:4], *[False] * 4, *AFTER[4:], *[False] * 4])
    page = report(evaluated, "--films", "0", "--after", more)
    _, first, second, total = page.tables[COMPARED]
    assert [row[4] for row in (first, second, total)] == ["3/4", "4/4", "7/8"]
    low, high = (f"{bound:.1%}" for bound in wilson(7, 8))
    assert f"Success after 87.5% 7/8 episodes, 95 %: {low} to {high}" in page.text
    assert "left out of all rates: 8 of 16 episodes more." in page.text


def test_an_evaluation_of_something_else_is_told(evaluated, tmp_path):
    other = evaluate(tmp_path / "other", AFTER, model={"name": "openvla-oft"})
    page = report(evaluated, "--films", "0", "--after", other)
    expected = "other is no evaluation of this run: its model is openvla-oft, the run's toy."
    assert expected in page.text


def test_modes_are_told_apart_by_all_that_they_are(run):
    for step, top_k in ((3, 2), (6, 5)):
        evaluate(run / "evals" / f"step-{step:06d}", AFTER, top_k=top_k)
    page = report(run, "--films", "0")
    modes = [row[1] for row in page.tables["All evaluations of the run"][1:]]
    assert modes == [f"sampled at temperature 1 among the best {top_k}" for top_k in (2, 5)]
    labels = [str(dict(a).get("aria-label")) for tag, a in page.elements if tag != "nav"]
    assert sum(label.startswith("Evaluations, sampled") for label in labels) == 2


def test_a_p_that_is_smaller_than_any_number(run):
    for step, success in ((3, False), (6, True)):
        evaluate(run / "evals" / f"step-{step:06d}", [success] * 1100)
    assert "to +100.0, p < 1e-300" in report(run, "--films", "0").text


def test_one_evaluation_stands_alone(run, tmp_path):
    evaluate(run / "evals" / "step-000006", AFTER)
    page = report(run, "--films", "0")
    (caption,) = [name for name in page.tables if name.startswith("Success per task after 6 steps")]
    assert page.tables[caption][-1][2] == "7/8"
    assert COMPARED not in page.tables


# --------------------------------------------------------------------------------------------
# What the run was, and how it ended
# --------------------------------------------------------------------------------------------
def test_configuration_against_the_preset(run):
    page = report(run, "--films", "0")
    changes = page.tables["What differs from the preset toy_grpo"]
    assert changes[1:] == [["eval.every", "0", "3", "--set"]]
    whole = page.tables["The whole configuration"]
    assert ["optim.lr", "0.02", "presets/toy_grpo.toml:23"] in whole


def test_machine_versions_and_starts(run):
    page = report(run, "--films", "0")
    machine = dict(page.tables["Of the last start"][1:])
    assert machine["processor"] == "A Fast One, 2 cores"
    assert machine["GPU"] == "Big GPU, 80.0 GiB"
    assert machine["torch"][0].isdigit()
    assert "2, of which 1 restart or resumption" in page.text
    assert f"{STEPS} episodes redone after failures" in page.text


def finished(run: Path) -> None:
    pass


def stopped(run: Path) -> None:
    write_result(run, "preempted")


def failed(run: Path) -> None:
    (run / "status" / "result.json").unlink()
    write_failure(run, 3, "rollout", 5, ZeroDivisionError("<b>boom</b>"))


def interrupted(run: Path) -> None:
    (run / "status" / "result.json").unlink()
    (run / "lock.json").write_text('{"pid": 4194305, "host": "' + os.uname().nodename + '"}')


def running(run: Path) -> None:
    (run / "status" / "result.json").unlink()
    owner = {"pid": os.getpid(), "host": os.uname().nodename, "started": "today"}
    (run / "lock.json").write_text(json.dumps(owner))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (finished, "finished 6 of 20 steps"),
        (stopped, "stopped as asked, after 6 of 20 steps"),
        (failed, "failed after 6 of 20 steps (rank 3, rollout of step 6): <b>boom</b>"),
        (interrupted, "interrupted after 6 of 20 steps"),
        (running, "running 6 of 20 steps when this page was made; process"),
    ],
)
def test_how_it_ended(run, make, expected):
    make(run)
    assert expected in report(run, "--films", "0").text


def test_a_run_that_never_finished_a_step(run):
    (run / "metrics.jsonl").unlink()
    page = report(run)
    assert "No step has been finished" in page.text
    assert "They could not be made here" in page.text


def test_the_page_is_alone(evaluated):
    """No script, no address but of its own parts, and words of a run are words."""
    evil = "<script>alert(1)</script>"
    for path in evaluated.glob("evals/*/eval.json"):
        summary = json.loads(path.read_text())
        summary["tasks"][0]["instruction"] = evil
        write_json(path, summary)
    page = report(evaluated)
    assert evil in page.text
    assert "script" not in {tag for tag, _ in page.elements}
    addresses = [
        value or ""
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "poster", "action")
    ]
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    html = (evaluated / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", html)


# --------------------------------------------------------------------------------------------
# Films
# --------------------------------------------------------------------------------------------
def test_films_are_half_failures_of_many_tasks():
    def episodes(success: bool, *tasks: int) -> list[EpisodeResult]:
        common = {"repeat": 0, "num_steps": 1, "episode_return": 0.0, "seed": 0}
        return [
            EpisodeResult(task=task, trial=trial, success=success, **common)
            for trial, task in enumerate(tasks)
        ]

    failures, successes = episodes(False, 0, 0, 0, 1), episodes(True, 2, 2, 3)
    chosen = mixed([*failures, *successes], 4)
    assert [(each.task, each.success) for each in chosen] == [
        *((0, False), (1, False)),
        *((2, True), (3, True)),
    ]
    assert len(mixed(failures, 3)) == 3
    assert [each.success for each in mixed([*failures, *successes[:1]], 4)].count(True) == 1
    assert len(mixed(successes, 9)) == 3


def test_films_that_cannot_be_made_are_a_note(evaluated):
    shutil.rmtree(evaluated / "evals" / "step-000006" / "actions")
    page = report(evaluated)
    assert "They could not be made here. cannot read the actions of task 0" in page.text
    assert "video" not in {tag for tag, _ in page.elements}
    assert page.tables[COMPARED]


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("report", "--runs-dir", "none"), 2, "no runs in none"),
        (("report", "elsewhere"), 2, "elsewhere is not a run"),
        (("report", "RUN", "--before", "elsewhere"), 2, "elsewhere is no evaluation"),
        (("report", "RUN", "--films", "-1"), 2, "greater than or equal to 0"),
    ],
)
def test_refusals(run, capsys, monkeypatch, arguments, code, expected):
    monkeypatch.chdir(run.parent)
    assert main([str(run) if word == "RUN" else word for word in arguments]) == code
    assert expected in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_an_evaluation_is_no_run(run, tmp_path, capsys):
    folder = evaluate(tmp_path / "eval", AFTER)
    shutil.copy(run / "config.json", folder)
    assert main(["report", str(folder)]) == 2
    assert "eval is not a run of training" in capsys.readouterr().err


def test_a_supervised_run_is_not_told_as_reinforcement_learning(run, capsys):
    config = json.loads((run / "config.json").read_text())
    config["sft"]["data"] = ["demonstrations"]
    (run / "config.json").write_text(json.dumps(config))
    assert main(["report", str(run)]) == 2
    assert "is a supervised run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plan.json", "provenance.json", "machine.json"])
def test_damage_is_no_bug(run, capsys, name):
    (run / name).write_text("[1")
    assert main(["report", str(run), "--films", "0"]) == 5
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("machine.json", "{}"),
        ("machine.json", '{"hardware": {"cores": "two"}, "versions": {}}'),
        ("status/result.json", "[]"),
        ("status/failure-0.json", "{}"),
    ],
)
def test_damage_within_is_no_bug(run, capsys, name, text):
    write_result(run, "")
    (run / name).write_text(text)
    assert main(["report", str(run), "--films", "0"]) == 5
    assert f"{run / name} is damaged" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_found_before_the_work(run, tmp_path, capsys):
    (run / "plan.json").write_text("[1")  # would be found by the work
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}: it is a folder" in capsys.readouterr().err


def test_damage_is_named(evaluated, capsys):
    (evaluated / "evals/step-000003/eval.json").write_text("{}")
    assert main(["report", str(evaluated)]) == 5
    assert "eval.json is not the result of an evaluation" in capsys.readouterr().err
    with (evaluated / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    assert main(["report", str(evaluated)]) == 5
    assert "metrics.jsonl is damaged" in capsys.readouterr().err


def test_a_line_that_is_being_written_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')
    assert len(report(run, "--films", "0").tables[NUMBERS]) == STEPS + 1


# --------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------
@pytest.fixture
def browser() -> Iterator[Any]:
    """A real browser, headless, that reaches nothing."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None or subprocess.run([program, "--version"], check=False).returncode != 0:
        pytest.skip("no chromium here to look at the page with: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason='pip install -e ".[dev]"')
    with playwright.sync_playwright() as api:
        opened = api.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield opened
        opened.close()


VISIBLE = """() => [...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  const style = getComputedStyle(document.documentElement);
  const probe = document.createElement("i");
  document.body.append(probe);
  const wanted = ["--c0", "--c1"].map(name => {
    probe.style.color = style.getPropertyValue(name);
    return getComputedStyle(probe).color;
  });
  const inks = [...svg.querySelectorAll("path, use")].flatMap(each => {
    const drawn = getComputedStyle(each);
    return [drawn.stroke, drawn.fill];
  });
  return [box.width, box.height, inks.some(ink => wanted.includes(ink))];
})"""
PLAYED = """async film => {
  await film.play();
  const start = film.currentTime;
  await new Promise(done => setTimeout(done, 300));
  return [start, film.currentTime, film.videoWidth, film.error];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_curves_and_plays_films(evaluated, browser, scheme):
    page_file = evaluated / "report.html"
    report(evaluated, "--films", "2")
    context = browser.new_context(color_scheme=scheme, offline=True)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    curves = page.evaluate(VISIBLE)
    assert len(curves) == 8
    assert all(width > 300 and height > 100 and is_drawn for width, height, is_drawn in curves)
    films = page.query_selector_all("video")
    assert len(films) == 2
    for film in films:
        start, later, width, error = film.evaluate(PLAYED)
        assert error is None
        assert width == 256
        assert later != start
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert complaints == []
    assert requests == [page_file.as_uri()]
    context.close()
