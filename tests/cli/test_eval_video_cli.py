"""What `vlactl eval` and `vlactl video` refuse, and how they say it. Nothing is started here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vlactl.cli.app import main
from vlactl.cli.evaluating import Request, find_request
from vlactl.config.compose import compose, load_resolved, without_places
from vlactl.errors import EXIT_PREEMPTED, ConfigError
from vlactl.evaluate.results import EpisodeJournal, EpisodeResult
from vlactl.hub.manifest import write_manifest
from vlactl.launch.hardware import Hardware
from vlactl.launch.plan import environment_spec, make_plan
from vlactl.launch.rundir import EXPORTED_CONFIG, create_run_dir, write_run
from vlactl.rollout.episodes import select_pairs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run without a checkpoint."""
    return make_run(tmp_path, "toy_grpo")


def make_run(folder: Path, preset: str, *overrides: str) -> Path:
    path = folder / "runs" / preset / "2026-01-01T00-00-00"
    config = compose(preset, overrides).config
    create_run_dir(path)
    write_run(path, config, make_plan(config, Hardware(cores=2, ram_bytes=2**33), gpus=1))
    return path


def says(capsys, *arguments: str | Path) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_without_a_run_there_is_nothing_to_evaluate(capsys):
    code, text = says(capsys, "eval", "--suite", "toy")
    assert code == 2
    assert "no run with a checkpoint" in text
    assert "--preset" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--trials", "9"), "8 initial states per task are kept for evaluation"),
        (("--tasks", "7"), "there is no task 7"),
        (("--tasks", "x"), 'rollout.tasks = "x" (from --tasks): "x" is neither an index nor'),
        (("--suite", "libero-spatial"), "wanted 'toy'"),
        (("--set", "eval.trials=0-1", "--trials", "3"), "2 initial states per task are kept"),
        (("--trials", "0"), '--trials 0: how many initial states per task, or "all"'),
        (("--trials", "3-5"), "certain ones: --set eval.trials=40-49"),
        (("--greedy", "--temperature", "2"), "--greedy takes the most likely tokens"),
        (("--greedy", "--top-k", "2"), "--greedy takes the most likely tokens"),
        (("--temperature", "0"), "eval.temperature = 0.0 (from --temperature)"),
        (("--step", "0"), "--step 0 is of a run"),
    ],
)
def test_episodes_that_do_not_exist(capsys, options, expected):
    code, text = says(capsys, "eval", "--preset", "toy_grpo", *options)
    assert code == 2
    assert expected in text
    assert not Path("evals").exists()


def asked(**options: str | None) -> Request:
    defaults = {
        "suite": None,
        "tasks": None,
        "trials": None,
        "passes": 1,
        "checkpoint": None,
        "preset": "libero_spatial_tiny_grpo",
        "greedy": None,
        "overrides": [],
        "runs_dir": None,
    }
    return find_request(**defaults | options)


@pytest.mark.parametrize(
    ("suite", "num_tasks"),
    [
        ("libero-spatial", 10),
        ("libero-object", 10),
        ("libero-goal", 10),
        ("libero-10", 10),
        ("libero-90", 90),
        ("libero-130", 130),
    ],
)
def test_a_suite_is_all_its_tasks_and_initial_states(suite, num_tasks):
    """500, 4500 and 6500 episodes, each once."""
    request = asked(suite=suite, preset="libero_spatial_grpo")
    assert request.num_episodes == 50 * num_tasks
    assert request.extent == f"{50 * num_tasks}: {num_tasks} tasks x 50 initial states"
    pairs = select_pairs(
        environment_spec(request.config).tasks,
        request.episodes["tasks"],
        request.episodes["trials"],
    )
    assert sorted(set(pairs)) == [(task, trial) for task in range(num_tasks) for trial in range(50)]
    assert len(pairs) == 50 * num_tasks
    assert asked(suite=suite, preset="libero_spatial_grpo", passes=2).num_episodes == 2 * len(pairs)


def test_a_preset_that_keeps_initial_states_apart_can_be_measured_on_all():
    """libero_spatial_tiny_grpo evaluates on ten of the fifty."""
    assert asked(suite="libero-spatial").extent == (
        "100: 10 tasks x 10 initial states (the whole suite: 500)"
    )
    assert asked(suite="libero-spatial", trials="all").num_episodes == 500
    assert asked(suite="libero-spatial", trials=2, passes=3, tasks="1,3").extent == (
        "12: 2 tasks x 2 initial states x 3 passes (the whole suite: 500)"
    )

    assert asked(trials=1, tasks="3").extent == "1: 1 task x 1 initial state (the whole suite: 500)"


def test_short_options_are_keys():
    request = asked(temperature=1.6, top_k=5, overrides=["eval.greedy=true"])
    assert request.config.eval.greedy is True  # --set comes last
    config = asked(temperature=1.6, top_k=5).config.eval
    assert (config.greedy, config.temperature, config.top_k) == (False, 1.6, 5)


@pytest.mark.parametrize(
    ("options", "suite"),
    [
        ({"perturbation": "swap"}, "libero_spatial_swap"),
        ({"suite": "libero-goal", "perturbation": "with-mug"}, "libero_goal_with_mug"),
        ({"suite": "libero_10_task"}, "libero_10_task"),
        ({"suite": "libero-object", "perturbation": "none"}, "libero_object"),
    ],
)
def test_a_perturbation_is_evaluated(options, suite):
    request = asked(**options)
    assert request.config.env.full_suite == request.suite == suite
    assert request.num_episodes == 10 * len(request.config.eval.trials)
    assert request.default_folder().parent == Path("evals") / suite


def test_an_evaluation_means_official_states_where_there_are_sampled_ones():
    more = ["env.sampled_trials=1000", "eval.trials=none"]
    request = asked(suite="libero-spatial", overrides=more)
    assert request.num_episodes == 500
    assert request.episodes["trials"] is None
    first = asked(suite="libero-spatial", overrides=more, trials=20)
    assert (first.num_episodes, first.episodes["trials"]) == (200, list(range(20)))
    with pytest.raises(ConfigError, match="50 initial states per task are kept"):
        asked(suite="libero-spatial", overrides=more, trials=51)
    sampled = asked(suite="libero-spatial", overrides=[more[0], "eval.trials=50-59"])
    assert sampled.num_episodes == 100


def test_results_say_what_they_were_measured_on():
    """eval.json holds the whole section `env`."""
    env = asked(suite="libero-goal", perturbation="lan").config.env.model_dump(mode="json")
    assert (env["suite"], env["perturbation"]) == ("libero_goal", "lan")
    assert (env["backend"], env["fixture_poses"], env["fixture_seed"]) == ("fast", "sampled", 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--perturbation", "swpa"), 'did you mean "swap"?'),
        (("--perturbation", "env"), "is not defined"),
        (("--suite", "nope"), 'env.suite = "nope" (from --suite)'),
        (("--suite", "libero-130", "--perturbation", "swap"), "libero_130 cannot be perturbed"),
        (("--suite", "libero_90", "--perturbation", "swap"), '"swap" (from --perturbation)'),
        (("--suite", "libero_90", "--set", "env.perturbation=swap"), '"swap" (from --set)'),
        (("--suite", "libero-spatail"), 'did you mean "libero_spatial"?'),
    ],
)
def test_perturbations_that_do_not_exist(capsys, options, expected):
    code, text = says(capsys, "eval", "--preset", "libero_spatial_tiny_grpo", *options)
    assert code == 2
    assert expected in text
    assert not Path("evals").exists()


def test_a_toy_cannot_be_perturbed(capsys):
    code, text = says(capsys, "eval", "--preset", "toy_grpo", "--perturbation", "swap")
    assert code == 2
    assert 'unknown key "env.perturbation"' in text


@pytest.mark.parametrize(
    ("preset", "options", "is_policy_to_blame"),
    [
        ("toy_grpo", ("--suite", "libero-spatial"), True),
        ("toy_grpo", ("--perturbation", "swap"), True),
        ("toy_grpo", ("--set", "env.backend=stock"), True),
        ("toy_grpo", ("--set", "env.nun_envs=2"), False),
        ("libero_spatial_tiny_grpo", ("--perturbation", "swap"), False),
        ("libero_spatial_tiny_grpo", ("--suite", "libero-10", "--perturbation", "x"), False),
        ("libero_spatial_tiny_grpo", ("--set", "env.backend=quick"), False),
        ("libero_spatial_tiny_grpo", ("--set", "env"), False),
    ],
)
def test_another_policy_is_offered_where_that_helps(
    capsys, tmp_path, preset, options, is_policy_to_blame
):
    suite = ["env.suite=libero-90"] if "libero" in preset else []
    checkpoint = make_run(tmp_path, preset, *suite) / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {"step": 1})
    code, text = says(capsys, "eval", *options)
    assert code == 2
    assert ("choose another with --checkpoint" in text) is is_policy_to_blame


def test_a_run_without_a_checkpoint_says_so(capsys, run_dir):
    code, text = says(capsys, "eval", "--checkpoint", run_dir)
    assert code == 2
    assert "no complete checkpoint yet" in text


def test_the_policy_of_a_step(capsys, run_dir):
    for step in (2, 10):
        folder = run_dir / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        write_manifest(folder, {"step": step})
    named = {"preset": None, "checkpoint": run_dir}
    assert asked(**named).policy["step"] == 10
    policy = asked(**named, step=2).policy
    assert (policy["step"], Path(policy["checkpoint"]).name) == (2, "step-000002")
    for initial in (asked(**named, step=0), asked(preset=None, step=0)):  # also of the newest run
        assert initial.policy["label"].endswith("2026-01-01T00-00-00 before training")
        assert (initial.policy["step"], initial.policy["checkpoint"]) == (0, "")
        assert initial.config == compose("toy_grpo").config
    code, text = says(capsys, "eval", "--run", run_dir, "--step", "5")
    assert code == 2
    assert "it has: 2, 10; --step 0 is the policy before training" in text
    code, text = says(capsys, "eval", "--run", folder, "--step", "5")
    assert (code, "is not a run" in text) == (2, True)


def test_a_run_can_be_measured_before_its_first_checkpoint(run_dir):
    assert asked(preset=None, checkpoint=run_dir, step=0).config == compose("toy_grpo").config


def test_the_model_of_a_supervised_run_needs_no_preset(tmp_path, capsys):
    """vlactl sft leaves it in the run, with the configuration it belongs to."""
    run = make_run(tmp_path, "toy_grpo", "sft.data=[demos]")
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").touch()
    exported = without_places(load_resolved(run / "config.json"))
    (run / "model" / EXPORTED_CONFIG).write_text(json.dumps(exported))
    named = asked(preset=None, checkpoint=run / "model")
    assert named.config.model.path == str(run / "model")
    assert named.config.sft.data == ()
    code, text = says(capsys, "eval", "--run", run, "--step", "0")
    assert code == 2
    assert "measured when it is finished" in text
    checkpoint = run / "checkpoints" / "step-000002"  # must not stand for the finished model
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {"step": 2})
    code, text = says(capsys, "eval", "--checkpoint", checkpoint)
    assert code == 2
    assert f"name the run: --run {run}" in text


def test_a_run_and_a_preset_exclude_each_other(capsys, run_dir):
    code, text = says(capsys, "eval", "--checkpoint", run_dir, "--preset", "toy_grpo")
    assert code == 2
    assert "configuration of its own" in text


def test_a_folder_of_something_else_is_not_taken(capsys):
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    code, text = says(capsys, "eval", "--preset", "toy_grpo", "--out", "out")
    assert code == 2
    assert "choose another --out" in text


@pytest.fixture
def nothing_is_played(monkeypatch) -> None:
    monkeypatch.setattr("vlactl.cli.evaluating.supervise", lambda *_, **__: EXIT_PREEMPTED)


def begun(*options: str) -> Path:
    """The folder of an evaluation that was interrupted at once."""
    assert main(["eval", "--preset", "toy_grpo", "--out", "out", *options]) == EXIT_PREEMPTED
    return Path("out")


def test_another_evaluation_is_not_continued(capsys, nothing_is_played):
    begun("--tasks", "0", "--greedy")
    options = ("--tasks", "1", "--sampled", "--passes", "2", "--set", "model.path=elsewhere")
    code, text = says(capsys, "eval", "--preset", "toy_grpo", "--out", "out", *options)
    assert code == 2
    assert "out holds another evaluation:" in text
    assert "passes: 1 there, 2 here" in text
    assert "tasks: [0] there, [1] here" in text
    assert "eval.greedy: true there, false here" in text
    assert "policy" not in text


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_request_has_a_way_out(capsys, nothing_is_played, content):
    (begun() / "eval_request.json").write_text(content)
    code, text = says(capsys, "eval", "--preset", "toy_grpo", "--out", "out")
    assert code == 5
    assert "eval_request.json is damaged" in text
    assert "choose another --out" in text


def test_the_same_policy_may_be_typed_in_another_way(run_dir, nothing_is_played):
    checkpoint = run_dir / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {"step": 1})
    for typed in (run_dir, run_dir.relative_to(Path.cwd()), checkpoint.relative_to(Path.cwd())):
        assert main(["eval", "--run", str(typed), "--out", "out"]) == EXIT_PREEMPTED
    Path("model").mkdir()
    for path in ("model", str(Path("model").absolute())):
        request = asked(preset="toy_grpo", overrides=[f"model.path={path}"])
        assert request.config.model.path == str(Path("model").absolute())


def test_the_horizon_is_shown(capsys, nothing_is_played):
    begun("--set", "env.max_episode_steps=12")
    assert re.search(r"^ horizon +12 control steps$", capsys.readouterr().out, re.MULTILINE)


def test_an_evaluation_is_no_policy(capsys, nothing_is_played):
    folder = begun()
    for command in (
        ("eval", "--run", folder),
        ("eval", "--run", folder, "--step", "0"),
        ("export", folder, "--out", "exported"),
    ):
        code, text = says(capsys, *command)
        assert code == 2
        assert "out is an evaluation, not a policy" in text
        assert "it measured untrained toy_grpo: name that" in text


def test_unwritable_places_are_found_before_the_work(capsys):
    code, text = says(capsys, "eval", "--preset", "toy_grpo", "--json", "/proc/none/x.json")
    assert code == 2
    assert "/proc/none" in text
    Path("folder").mkdir()
    code, text = says(capsys, "eval", "--preset", "toy_grpo", "--json", "folder")
    assert code == 2
    assert "cannot write folder: it is a folder" in text
    assert not Path("evals").exists()


def test_a_refused_evaluation_leaves_no_file(capsys):
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    place = ("--out", "out", "--json", "new.json")
    assert says(capsys, "eval", "--preset", "toy_grpo", *place)[0] == 2
    assert not Path("new.json").exists()


def test_a_run_of_a_plugin_that_is_gone_is_not_damaged(capsys, run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    config["env"]["name"] = "my-robot"
    (run_dir / "config.json").write_text(json.dumps(config))
    code, text = says(capsys, "train", "--resume", run_dir)
    assert code == 3
    assert 'the environment plugin "my-robot"' in text


def test_damaged_checkpoints_do_not_start_a_run_anew(capsys, run_dir):
    (run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    code, text = says(capsys, "train", "--resume", run_dir)
    assert code == 5
    assert "step-000002 is not a complete checkpoint" in text
    assert (run_dir / "checkpoints" / "step-000002").exists()


def test_nothing_recorded_nothing_filmed(capsys, run_dir):
    for arguments in ((), (run_dir,)):
        code, text = says(capsys, "video", *arguments)
        assert code == 2
        assert "recorded episodes" in text


@pytest.mark.parametrize(
    "options",
    [
        ("--failed", "--succeeded"),
        ("somewhere", "--run", "elsewhere"),
        ("somewhere", "--suite", "toy"),
        ("--task", "x"),
    ],
)
def test_contradictions_and_nonsense(capsys, run_dir, options):
    _record(run_dir)
    assert says(capsys, "video", *options)[0] == 2


def test_what_is_not_recorded_is_named(capsys, run_dir):
    _record(run_dir)
    code, text = says(capsys, "video", run_dir, "--task", "3")
    assert code == 2
    assert "recorded: tasks 1; 1 failures, 0 successes" in text


def _record(run_dir: Path) -> None:
    result = EpisodeResult(
        task=1, trial=0, repeat=0, success=False, num_steps=4, episode_return=0.0, seed=1
    )
    EpisodeJournal(run_dir / "rollouts" / "step-000001" / "episodes-0.jsonl").append(result)


def test_an_adapter_is_no_policy_of_its_own(tmp_path: Path, capsys) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    code, text = says(capsys, "eval", "--checkpoint", "adapter", "--preset", "toy_grpo")
    assert code == 2
    assert "adapter holds an adapter, not a whole model" in text
    assert "--set lora.adapter=adapter --set lora.rank=" in text
