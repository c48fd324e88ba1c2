"""`vlactl sft`, as typed: what it refuses before anything is started, and what it says."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vlactl.api.contracts import Task
from vlactl.cli import imitating
from vlactl.cli.app import main
from vlactl.cli.demonstrating import suggestion_for
from vlactl.cli.imitating import find_request
from vlactl.cli.policies import find_policy
from vlactl.config.compose import compose, load_resolved, without_places
from vlactl.demonstrations.dataset import INFO, VERSION
from vlactl.errors import ConfigError
from vlactl.hub.manifest import write_manifest
from vlactl.launch.hardware import Hardware
from vlactl.launch.plan import environment_spec, make_plan
from vlactl.launch.rundir import EXPORTED_CONFIG, write_run

OPTIONS = ("--set", "env.num_tasks=2", "--workers", "1", "--per-task", "2")
OF_OBJECT = compose("libero_object_small_grpo").config.sft.demos_per_task


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations") / "toy"
    assert main(["demos", "--suite", "toy", *OPTIONS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)


def make_run(place: Path, *sets: str, preset: str = "toy_grpo") -> Path:
    """A run directory as it is when nothing has happened yet."""
    place.mkdir(parents=True)
    config = compose(preset, sets).config
    plan = make_plan(config, Hardware(cores=2, ram_bytes=2**34), gpus=1)
    write_run(place, config, plan, {"summary": f"presets/{preset}.toml:2"})
    return place


def refused(capsys, *arguments: str | Path) -> str:
    assert main(["sft", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert not Path("runs").exists(), "nothing was begun"
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which preset?"),
        (("--preset", "toy_grop", "--data", "data"), 'did you mean "toy_grpo"'),
        (("--preset", "toy_grpo"), "nothing to learn from"),
        (("--preset", "toy_grpo", "--data", "nowhere"), "nowhere holds no demonstrations"),
        (("--preset", "toy_grpo", "--data", "data", "--data", "."), "holds no demonstrations"),
        (("--preset", "toy_grpo", "--data", "data", "--set", "sft.stps=1"), "sft.steps"),
        (("--preset", "toy_grpo", "--data", "data", "--set", "sft.stop_at=2"), "sft.stop_at"),
        (
            ("--preset", "toy_grpo", "--data", "data", "--set", "sft.stop_at=0.5"),
            "sft.eval_every = 0 never measures one",
        ),
        (
            ("--preset", "toy_grpo", "--data", "data", "--set", "env.image_size=16"),
            "pictures of 16 pixels are wanted; ",
        ),
        (
            ("--preset", "toy_grpo", "--data", "data", "--set", 'model.cameras=["wrist"]'),
            'has no pictures of camera "wrist"',
        ),
        (
            (
                *("--preset", "libero_object_small_grpo", "--data", "data"),
                *("--set", "model.keep_stop_token=true"),
            ),
            "knows whole chunks and single bins only: set sft.label_width = 0",
        ),
        (
            ("--preset", "libero_object_small_grpo", "--data", "data"),
            "has action of 1 numbers, the environment 7",
        ),
        (
            ("--preset", "toy_grpo", "--data", "data", "--set", "sft.batch_size=9", "--gpus", "2"),
            "2 actors cannot share sft.batch_size = 9 equally",
        ),
        (
            ("--preset", "toy_grpo", "--data", "data", "--set", "sft.demos_per_task=1,1,1"),
            "has numbers for 3 tasks; the data is of",
        ),
        (
            ("--preset", "toy_grpo", "--data", "data", "--set", "sft.demos_per_task=99"),
            "99 demonstrations of task 0 are wanted",
        ),
        (
            ("--preset", "toy_grpo", "--data", "data", "--set", "sft.demos_per_task=[1,0]"),
            "wanted a number from 1, or a list of such numbers",
        ),
        (("--preset", "toy_grpo", "--data", "data", "--set", 'sinks=["nope"]'), '"nope"'),
        (("--resume", "nowhere"), "nowhere is not a run"),
        (("--resume", "nowhere", "--preset", "toy_grpo"), "leave out --preset"),
        (("--resume", "nowhere", "--data", "data"), "nowhere is not a run"),
        (("--resume", "nowhere", "--run-dir", "here"), "leave out --preset"),
    ],
)
def test_wrong_options_are_refused(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_a_damaged_data_set_is_named(capsys, data):
    shutil.copytree(data, "copy")
    info = json.loads(Path("copy", INFO).read_text())
    Path("copy", INFO).write_text(json.dumps(info | {"codebase_version": "v2.0"}))
    assert main(["sft", "--preset", "toy_grpo", "--data", "copy"]) == 5
    assert "of version v2.0" in capsys.readouterr().err
    Path("copy", INFO).write_text("{")
    assert main(["sft", "--preset", "toy_grpo", "--data", "copy"]) == 5
    assert "is damaged" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(capsys):
    Path("mine").mkdir()
    Path("mine/precious.txt").write_text("mine")
    text = refused(capsys, "--preset", "toy_grpo", "--data", "data", "--run-dir", "mine")
    assert "mine" in text
    assert [path.name for path in Path("mine").iterdir()] == ["precious.txt"]


def test_only_supervised_runs_are_gone_on_with(capsys):
    run = make_run(Path("trained"))
    text = refused(capsys, "--resume", run)
    assert "trained is no supervised run" in text
    assert "vlactl train --resume trained" in text
    assert "trained is no supervised run" in refused(capsys, "--resume", run, "--data", "data")
    assert not load_resolved(run / "config.json").sft.data
    assert main(["train", "--resume", str(run), "--set", "sft.data=data"]) == 2
    assert "cannot change in a run that has begun" in capsys.readouterr().err


def test_some_keys_cannot_change_in_a_run_that_has_begun(capsys):
    run = make_run(Path("begun"), f"sft.data={Path('data').resolve()}")
    text = refused(capsys, "--resume", run, "--set", "sft.lr=1")
    assert "cannot change in a run that has begun" in text
    sets = ["sft.stop_at=0.9", "sft.eval_every=100", "sft.save_every=10"]
    config = find_request("", (), sets, run, None, None).config
    assert (config.sft.stop_at, config.sft.eval_every, config.sft.save_every) == (0.9, 100, 10)


def test_a_run_goes_on_with_the_data_it_was_begun_with(capsys, data, monkeypatch):
    shutil.copytree(data, "mine")
    run = make_run(Path("begun"), f"sft.data={Path('mine').resolve()}")
    monkeypatch.setattr(imitating, "supervise", lambda *_, **__: 0)
    go_on = ["sft", "--resume", str(run)]
    assert main(go_on) == 0, "writes down which data it is"
    assert main(go_on) == 0
    known = (run / imitating.DATA).read_bytes()
    (run / imitating.DATA).write_bytes(b"\xff" + known)
    assert main(go_on) == 5
    assert "is damaged" in capsys.readouterr().err
    (run / imitating.DATA).write_bytes(known)
    Path("mine").rename("elsewhere")
    text = refused(capsys, *go_on[1:])
    assert "does not hold the demonstrations of this run any more" in text
    assert f"vlactl sft --resume {run} --data FOLDER" in text
    assert main([*go_on, "--data", "elsewhere"]) == 0
    assert load_resolved(run / "config.json").sft.data == (str(Path("elsewhere").resolve()),)
    shutil.rmtree("elsewhere")
    assert main(["demos", "--suite", "toy", *OPTIONS, "--seed", "9", "--out", "elsewhere"]) == 0
    assert "has learned from other demonstrations" in refused(capsys, *go_on[1:])


def test_numbers_for_each_task_are_of_data_in_the_order_of_the_tasks(capsys):
    for task in ("0", "1"):
        options = ("--suite", "toy", "--tasks", task, *OPTIONS, "--out", f"only-{task}")
        assert main(["demos", *options]) == 0
    sets = ("env.num_tasks=2", "sft.demos_per_task=2,1")
    folders = Path("only-0"), Path("only-1")
    asked = find_request("toy_grpo", folders, sets, None, None, None)
    assert asked.config.sft.demos_per_task == (2, 1)
    find_request("toy_grpo", folders[::-1], (sets[0], "sft.demos_per_task=1"), None, None, None)
    arguments = [word for folder in folders[::-1] for word in ("--data", folder)]
    message = refused(
        capsys, "--preset", "toy_grpo", *arguments, *(w for s in sets for w in ("--set", s))
    )
    assert "the data is in another order" in message
    said = re.findall(r"--data (\S+)", message)
    assert said == [str(folder.resolve()) for folder in folders]


@pytest.mark.parametrize(
    ("told", "answer"),
    [
        ([["a", "b", "a", "c"]], ""),
        ([["b", "a", "c"]], ""),  # the first "a" has not been demonstrated
        ([["a", "b"], ["a", "c"]], ""),
        ([["a", "c", "x"]], ""),
        ([["c"], ["a", "b"]], "in another order"),
        ([["c", "a"]], "in another order"),
        ([["a", "x", "c"]], "in another order"),
        ([["x", "y"]], "of other tasks"),
    ],
)
def test_tasks_of_data_are_those_of_the_environment(monkeypatch, told, answer):
    """An environment with four tasks, the first and third of which share their instruction."""
    chosen = [
        [{"tasks": [words], "vlactl/task": task} for task, words in enumerate(each) for _ in "12"]
        for each in told
    ]
    monkeypatch.setattr(imitating, "chosen_episodes", lambda *_: chosen)
    tasks = [
        Task(index=i, name=word, instruction=word, num_trials=1) for i, word in enumerate("abac")
    ]
    spec = replace(environment_spec(compose("toy_grpo").config), tasks=tuple(tasks))
    folders = [Path(str(number)) for number in range(len(told))]
    places = imitating._places(folders, (1, 1), spec)
    if not answer:
        imitating._check_order(folders, places)
        return
    with pytest.raises(ConfigError, match=answer):
        imitating._check_order(folders, places)


def test_tasks_that_the_environment_does_not_have_are_counted(capsys, data, monkeypatch):
    monkeypatch.setattr(imitating, "supervise", lambda *_, **__: 0)
    arguments = ["sft", "--preset", "toy_grpo", "--data", "data", "--run-dir", "run"]
    assert main([*arguments, "--set", "env.num_tasks=1"]) == 0
    assert f"note: 1 of 2 tasks of {data.resolve()} are not" in capsys.readouterr().out


def test_data_means_the_same_from_anywhere(data, monkeypatch):
    """Whether the command or a preset names it."""
    asked = find_request("toy_grpo", [Path("data")], (), None, None, None)
    assert asked.config.sft.data == (str(data.resolve()),)
    assert asked.provenance["sft.data"] == "--data"
    assert asked.run_dir.parent.name == "toy_grpo_sft"
    Path("mine.toml").write_text(
        'summary = "mine"\nextends = "toy_grpo"\n\n[sft]\ndata = ["data", "data"]\n'
    )
    asked = find_request("mine.toml", (), (), None, None, None)
    assert asked.config.sft.data == (str(data.resolve()),) * 2


def test_help_shows_the_whole_way(capsys):
    assert main(["sft", "--help"]) == 0
    text = capsys.readouterr().out
    for line in (
        "vlactl demos --suite libero-object",
        "vlactl sft --preset libero_object_small_grpo --data demos/object",
        "vlactl train --preset libero_object_small_grpo --set model.path=RUN/model",
    ):
        assert line in text


def test_the_keys_can_be_read_where_presets_are_shown(capsys):
    assert main(["presets", "show", "libero_object_small_grpo"]) == 0
    text = capsys.readouterr().out
    assert "sft.demos_per_task" in text
    assert "sft.label_width" in text


def test_adapters_of_a_supervised_run_are_in_its_model(tmp_path):
    """So an evaluation must not apply them, or the ones it started from, again."""
    sets = ["sft.data=[demos]", "lora.rank=4", "lora.adapter=somewhere"]
    run = make_run(tmp_path / "run", *sets, preset="libero_spatial_tiny_grpo")
    (run / "model").mkdir()
    exported = without_places(load_resolved(run / "config.json"))
    (run / "model" / EXPORTED_CONFIG).write_text(json.dumps(exported))
    config = find_policy_of(run).config
    assert (config.lora.rank, config.lora.adapter) == (0, "")
    assert config.model.path == str(run / "model")


def find_policy_of(run: Path):
    checkpoint = run / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {"step": 1})
    return find_policy(run, None, run.parent, [])


# --------------------------------------------------------------------------------------------
# What `vlactl demos` says about it
# --------------------------------------------------------------------------------------------
def suggestion(capsys, folder: str, *options: str) -> list[str]:
    assert main(["demos", "--suite", "toy", *OPTIONS, *options, "--out", folder]) == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    what, _, command = last.strip().partition("vlactl ")
    assert what.strip() == "train on it"
    return command.split()


def test_demos_names_a_command_that_works(capsys):
    command, *options = suggestion(capsys, "data")
    assert (command, options) == ("sft", ["--preset", "toy_grpo", "--data", "data"])
    request = find_request("toy_grpo", [Path("data")], (), None, None, None)
    assert request.config.sft.steps == 200


def test_demos_names_no_preset_that_does_not_fit(capsys):
    assert "NAME" in suggestion(capsys, "small", "--image-size", "4")


@pytest.mark.parametrize(
    ("suite", "numbers", "pixels", "expected"),
    [
        ("libero_object", [10] * 10, 128, "--preset libero_object_small_grpo --data DIR"),
        (
            "libero_object",
            [10] * 9 + [2],
            128,
            "--preset libero_object_small_grpo --data DIR "
            f"--set sft.demos_per_task={','.join(map(str, (*OF_OBJECT[:9], 2)))}",
        ),
        (
            "libero_object",  # some of its tasks only
            [50, 50, 0],
            128,
            "--preset libero_object_small_grpo --data DIR "
            f"--set sft.demos_per_task={OF_OBJECT[0]},{OF_OBJECT[1]}",
        ),
        (
            "libero_object",
            [1] * 10,
            128,
            "--preset libero_object_small_grpo --data DIR --set sft.demos_per_task=1",
        ),
        ("libero_goal", [50] * 10, 128, r"--preset libero_goal_\w+ --data DIR"),
        ("libero_object", [50] * 10, 64, "--preset NAME --data DIR"),
        ("libero_of_mine", [50], 128, "--preset NAME --data DIR"),
    ],
)
def test_presets_that_say_how_to_imitate_are_preferred(suite, numbers, pixels, expected):
    features = {
        "action": {"shape": [7]},
        "observation.state": {"shape": [8]},
        "observation.images.agentview": {"shape": [pixels, pixels, 3]},
    }
    Path("DIR", INFO).parent.mkdir(parents=True)
    features["action"]["names"] = ["gripper"]
    info = {"codebase_version": VERSION, "features": features, "fps": 20, "total_episodes": 9}
    Path("DIR", INFO).write_text(json.dumps(info))
    record = {
        "request": {"env": {"name": "libero", "suite": suite}},
        "tasks": [{"task": task, "demonstrations": n} for task, n in enumerate(numbers)],
    }
    assert re.fullmatch(expected, suggestion_for(record, Path("DIR")))
    record["tasks"].reverse()  # as after --tasks 3,1: the data set has them in order
    record["request"]["env"]["perturbation"] = "swap"
    expected = expected.replace("DIR", "DIR --set env.perturbation=swap")
    if "NAME" not in expected:
        assert re.fullmatch(expected, suggestion_for(record, Path("DIR")))


@pytest.mark.parametrize("eval_every", [0, 10])
def test_simulators_are_planned_only_where_they_are_used(monkeypatch, eval_every):
    planned = []

    def plan(config, hardware, *, gpus, simulators):
        planned.append(simulators)
        raise ConfigError("far enough")

    monkeypatch.setattr(imitating, "make_plan", plan)
    sets = ("--set", f"sft.eval_every={eval_every}")
    assert main(["sft", "--preset", "toy_grpo", "--data", "data", *sets]) == 2
    assert planned == [eval_every > 0]
