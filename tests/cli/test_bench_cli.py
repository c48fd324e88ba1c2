"""`vlactl bench`, as typed: what it refuses, shows and keeps. No simulator is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlactl.cli.app import main
from vlactl.errors import EXIT_INTERRUPTED

ENVIRONMENT = """
    from vlactl.api.contracts import EnvSpec
    from vlactl.api.plugins import (
        BenchReport, EnvironmentConfig, EnvironmentPlugin, Requirement,
    )

    def make_spec(config):
        return EnvSpec(
            cameras={"front": (8, 8)}, state_dim=1, action_dim=1, max_episode_steps=1,
            control_hz=1, tasks=(),
        )

    def bench(config, options, say):
        say("measuring")
        if options.rounds == 13:
            raise KeyboardInterrupt
        return BenchReport(
            header=("", "stock", "vlactl"),
            rows=(("steps/s", "1", "2"),),
            notes=("as expected",),
            steps_per_second=120.0,
            record={
                "ratios": {"steps_per_second": 2.0},
                "asked": [config.num_envs, options.cameras, options.chunk_length, options.episodes],
            },
        )

    PLUGIN = EnvironmentPlugin(
        name=__name__, summary="", config=EnvironmentConfig, factory="", api_version=1,
        spec=f"{__name__}:make_spec", bench=f"{__name__}:bench", requirements=REQUIREMENTS,
    )
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where rates are kept."""
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def install(fake_distribution):
    """Install an environment with a benchmark; `requirements` is Python source."""

    def install_module(name, requirements="()"):
        source = ENVIRONMENT.replace("REQUIREMENTS", requirements)
        points = {"vlactl.environments": {name: f"{name}:PLUGIN"}}
        fake_distribution(f"{name}-env", points, {f"{name}.py": source})

    return install_module


def says(capsys, *arguments: str | Path, part: str = "env") -> tuple[int, str, str]:
    code = main(["bench", part, *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_table_and_a_record(capsys, install, tmp_path):
    install("quick")
    file = tmp_path / "bench.json"
    code, out, err = says(
        capsys, "--env", "quick", "--num-envs", "3", "--cameras", "1", "--json", file
    )
    assert code == 0
    assert "measuring" in err
    assert " cores of " in out
    assert " steps/s  1      2" in out
    assert "as expected" in out
    record = json.loads(file.read_text())
    assert record["ratios"] == {"steps_per_second": 2.0}
    assert record["asked"] == [3, ["front"], 8, 12]
    assert record["machine"]["cores"] >= 1


def test_what_simulators_did_is_kept_for_estimates(capsys, install, home):
    install("brisk")
    code, out, _ = says(capsys, "--env", "brisk", "--num-envs", "3", "--cameras", "1")
    assert code == 0
    assert f"kept for estimates in {home / 'rates.json'}" in out
    (record,) = json.loads((home / "rates.json").read_text())["env"].values()
    assert (record["steps_per_second"], record["simulators"]) == (120.0, 3)
    assert (record["cameras"], record["chunk_length"]) == (["front"], 8)


def test_an_interrupted_run_says_so_and_writes_nothing(capsys, install, tmp_path):
    install("endless")
    folder = tmp_path / "results"
    folder.mkdir()
    code, out, err = says(
        capsys, "--env", "endless", "--cameras", "1", "--rounds", "13", "--json", folder / "b"
    )
    assert code == EXIT_INTERRUPTED
    assert "interrupted" in err
    assert out == ""
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "problem"), [("/proc/none/b.json", "cannot write /proc/none/b"), (".", "is a folder")]
)
def test_a_record_that_cannot_be_written_is_refused_before_the_work(
    capsys, install, tmp_path, file, problem
):
    install("unheard")
    folder = tmp_path / "results"
    folder.mkdir()
    code, _, err = says(capsys, "--env", "unheard", "--cameras", "1", "--json", folder / file)
    assert code == 2
    assert "--json" in err
    assert problem in err
    assert "measuring" not in err
    assert list(folder.iterdir()) == []


def test_two_benchmarks_need_a_choice(capsys, install):
    install("rival")
    code, _, err = says(capsys)
    assert code == 2
    assert "libero, rival" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--env", "toy"], 'the environment "toy" has no benchmark'),
        (["--env", "nothing"], 'unknown environment "nothing"'),
        (["--suite", "libero-spatal"], 'env.suite = "libero-spatal" (from --suite): unknown suite'),
        (["--image-size", "2"], "env.image_size = 2 (from --image-size)"),
        (["--renderer", "glx"], "'auto', 'egl' or 'osmesa'"),
        (["--cameras", "3"], "--cameras 3: libero has agentview, wrist"),
        (["--set", "env.wait=1"], 'unknown key "env.wait" (from --set)'),
        (["--set", "optim.lr=1"], 'no key "optim"'),
        (["--set", "env=1"], 'no key "env"'),
    ],
)
def test_what_cannot_be_measured(capsys, arguments, expected):
    code, _, err = says(capsys, *arguments)
    assert code == 2
    assert expected in err


def test_a_missing_simulator_names_its_installation(capsys, install):
    install("lacking", '(Requirement(distribution="absent", install="pip install absent"),)')
    code, _, err = says(capsys, "--env", "lacking", "--cameras", "0")
    assert code == 3
    assert "missing: absent" in err
    assert "pip install absent" in err


def test_alone_it_shows_help(capsys):
    assert main(["bench"]) in {0, 2}
    captured = capsys.readouterr()
    assert "env" in captured.out + captured.err


def test_the_examples_of_its_help_stand_on_lines_of_their_own(capsys):
    assert main(["bench", "env", "--help"]) == 0
    assert "\n    vlactl bench env\n" in capsys.readouterr().out


@pytest.mark.dist
def test_a_policy_is_measured_and_kept_for_estimates(capsys, home, tmp_path):
    file = tmp_path / "model.json"
    options = ("--preset", "toy_grpo", "--seconds", "0", "--json", file)
    code, out, err = says(capsys, *options, part="model")
    assert code == 0, err
    assert "batch 1" in out
    assert "all layers" in out
    assert "not measured on CPUs" in out
    record = json.loads(file.read_text())
    assert set(record["update"]) == {"none", "selective", "full"}
    assert record["inference"].keys() == {"1", "4"}
    assert all(seconds > 0 for seconds in record["inference"].values())
    kept = json.loads((home / "rates.json").read_text())["model"]
    assert [entry["update"] for entry in kept.values()] == [record["update"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "nothing"], "nothing"),
        (["--preset", "libero_10_grpo"], "this policy cannot be built"),
        (["--preset", "toy_grpo", "--set", "model.widht=1"], 'unknown key "model.widht"'),
        (["--preset", "toy_grpo", "--json", "/proc/none/m"], "cannot write /proc/none/m"),
    ],
)
def test_policies_that_cannot_be_measured(capsys, arguments, expected):
    code, _, err = says(capsys, *arguments, part="model")
    assert code == 2
    assert expected in err


@pytest.mark.dist
def test_a_policy_that_cannot_be_built_says_why(capsys):
    options = ("--preset", "toy_grpo", "--set", "lora.rank=4")
    code, _, err = says(capsys, *options, part="model")
    assert code == 2
    assert "the toy model has no adapters" in err


def test_scaling_with_published_rates(capsys):
    numbers = ("--devices", "8,64,1024")
    code, out, _ = says(capsys, "--preset", "libero_10_grpo", *numbers, part="scaling")
    assert code == 0
    same, growing = out.split("a batch that grows")
    assert [line.split()[0] for line in same.splitlines() if "100%" in line] == ["8", "64"]
    assert "1024: 128 groups (1024 episodes / group size 8) cannot be shared by 1024" in same
    assert "efficient up to 64 devices; at 1024 there is no plan" in same
    assert sum("forward and backward passes" in line for line in growing.splitlines()) == 3
    assert "efficient up to 1024 devices" in growing
    assert "rates: published for OpenVLA-OFT-7B" in out
    assert "nothing was run" in out


def test_scaling_says_where_devices_are_too_small(capsys):
    numbers = ("--devices", "1,8")
    _, out, _ = says(capsys, "--preset", "libero_10_grpo", *numbers, part="scaling")
    assert "1: training needs about" in out


@pytest.mark.parametrize("numbers", ["0", "x", "12", "8,"])
def test_devices_that_are_no_machines(capsys, numbers):
    options = ("--preset", "toy_grpo", "--devices", numbers)
    code, _, err = says(capsys, *options, part="scaling")
    assert code == 2
    assert f'--devices "{numbers}"' in err
