"""`vlactl train`: what it prints, and the exit code of what can be wrong before a start."""

import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from vlactl.cli.app import main
from vlactl.config.compose import compose
from vlactl.errors import ConfigError
from vlactl.hub.models import with_absolute_paths
from vlactl.launch.hardware import Hardware
from vlactl.launch.network import Cluster
from vlactl.launch.nodes import Followers, Told
from vlactl.launch.plan import make_plan
from vlactl.launch.rundir import lock_run, write_run
from vlactl.launch.stops import StopRequests


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory on a machine without GPUs and models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("VLACTL_RUNS", raising=False)


def dry_run(*arguments: str) -> int:
    return main(["train", "--dry-run", *arguments])


def test_dry_run_shows_the_plan_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run("--preset", "libero_10_grpo", "--gpus", "8") == 0
    text = capsys.readouterr().out
    for expected in (
        " ranks     actor 0-7   rollout 0-7   env 0-7 (8 simulators each)   shared on cuda",
        " per step  1024 trajectories = 128 groups x 8;  65 536 samples;  ",
        " samples;  4 optimizer steps of 16 384",
        " episode   512 control steps = 64 chunks of 8 actions",
        " of 80.0 GiB per rank (estimate)",
        " run dir   runs/libero_10_grpo/2",
        "-m torch.distributed.run --standalone --nproc-per-node 8 --max-restarts 0",
        " -m vlactl.worker --run-dir runs/libero_10_grpo/2",
        "PYTORCH_ALLOC_CONF=expandable_segments:True",
        " note      8 x 80 GiB GPU, ",
        " blocked   the model Haozhan72/Openvla-oft-SFT-libero10-traj1 is not here: vlactl ",
        " nothing was started",
    ):
        assert expected in text
    assert text.isascii()
    assert list(tmp_path.iterdir()) == []


def test_without_preset_it_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    text = capsys.readouterr().err
    assert "vlactl train --preset NAME" in text
    assert "toy_grpo" in text
    assert "vlactl presets list" in text


def test_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--preset", "toy_grpo", "--set", "algorithm.group_sise=4") == 2
    assert 'did you mean "algorithm.group_size"?' in capsys.readouterr().err


def test_sums_that_do_not_come_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--preset", "libero_10_grpo", "--gpus", "6") == 2
    text = capsys.readouterr().err
    assert "128 = 21 x 6 + 2" in text
    assert "or use 4 or 8 devices" in text


def test_more_ranks_than_cores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "toy_grpo", "--gpus", "9999"]) == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_blockers_are_listed_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--preset", "libero_10_grpo_lora"]) == 2
    text = capsys.readouterr().err
    assert "libero_10_grpo_lora can be planned but not started" in text
    assert "vlactl download Haozhan72/Openvla-oft-SFT-libero10-traj1" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a\nb", "x" * 300])
def test_odd_run_names(name: str) -> None:
    assert dry_run("--preset", "toy_grpo", "--run-name", name) == 2


def test_run_name_and_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--preset", "toy_grpo", "--run-name", "mine", "--runs-dir", "there") == 0
    assert " run dir   there/mine/2" in capsys.readouterr().out


def test_occupied_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(["train", "--preset", "toy_grpo", "--run-dir", "taken"]) == 2
    text = capsys.readouterr().err
    assert "taken exists and is not empty" in text
    assert "--resume taken" in text


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The directory of a run that has a configuration and nothing else."""
    from vlactl.config.compose import compose
    from vlactl.launch.hardware import Hardware
    from vlactl.launch.plan import make_plan
    from vlactl.launch.rundir import write_run

    config = compose("toy_grpo").config
    run = tmp_path / "runs" / "toy_grpo" / "2026-01-01T00-00-00"
    run.mkdir(parents=True)
    write_run(run, config, make_plan(config, Hardware(cores=2, ram_bytes=2**33), gpus=1))
    return run


def test_resume_reads_the_runs_configuration(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run("--resume", str(begun), "--set", "train.max_steps=50") == 0
    assert f" run dir   {begun}" in capsys.readouterr().out
    assert dry_run("--resume", str(begun), "--set", "optim.lr=1") == 2
    assert "optim.lr" in capsys.readouterr().err


def test_resume_auto(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--resume", "auto") == 0
    assert f" run dir   {begun.relative_to(Path.cwd())}" in capsys.readouterr().out
    assert dry_run("--preset", "toy_grpo", "--resume", "auto") == 0
    assert f" run dir   {begun.relative_to(Path.cwd())}" in capsys.readouterr().out
    assert dry_run("--preset", "libero_spatial_tiny_grpo", "--resume", "auto") == 0
    assert " run dir   runs/libero_spatial_tiny_grpo/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "nowhere is not a run"),
        (["--resume", "auto"], "no runs in runs"),
        (["--resume", "x", "--preset", "toy_grpo"], "--resume reads the configuration"),
    ],
)
def test_resume_of_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_run_directory_in_use(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_run(begun):
        assert main(["train", "--resume", str(begun)]) == 2
    assert "is in use by process" in capsys.readouterr().err


def test_directories_mean_the_same_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    config = with_absolute_paths(compose("libero_10_grpo", ["model.path=base"]).config)
    assert config.model.path == str(tmp_path / "base")
    assert with_absolute_paths(config) == config
    assert with_absolute_paths(compose("toy_grpo").config) == compose("toy_grpo").config


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--nnodes", "2", "--run-dir", "run"], "where do they meet?", "--rdzv node0:29500"),
        (["--nnodes", "2", "--rdzv", "localhost:29500"], "which run directory?", "--run-dir DIR"),
        (["--node-rank", "1"], "--node-rank 1: 1 node has ranks 0-0", "--nnodes"),
        (["--interface", "nope7"], 'no network interface "nope7"', "interfaces: "),
        (["--sbatch", "--time=1"], "--sbatch is for --launcher slurm", "leave it out"),
    ],
)
def test_mistakes_with_several_machines(
    arguments: list[str],
    message: str,
    hint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--preset", "toy_grpo", *arguments]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert hint in text
    assert list(tmp_path.iterdir()) == []


def test_dry_run_for_several_machines_needs_none_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = ["--nnodes", "2", "--rdzv", "localhost:29500"]
    assert dry_run("--preset", "libero_10_grpo", "--gpus", "8", *several) == 0
    text = capsys.readouterr().out
    assert "actor 0-15" in text
    assert "--nnodes 2 --node-rank 0 --master-addr localhost --master-port 29500" in text
    assert "--nproc-per-node 8" in text
    assert "--standalone" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "nodes", "message"),
    [
        (["--gpus", "2"], 2, "--gpus 2: node 0 has planned 1 ranks on every node"),
        (["--nnodes", "3"], 2, "--nnodes 3: node 0 has planned for 2"),
        ([], 2, "the plan needs 1 GPUs on every node; 0 visible here"),
    ],
)
def test_a_machine_that_cannot_do_its_part_says_so_here_and_to_node_0(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    nodes: int,
    message: str,
) -> None:
    config = compose("toy_grpo").config
    hardware = Hardware(cores=2, ram_bytes=2**33)
    plan = make_plan(config, hardware, gpus=1, nodes=nodes)
    write_run(tmp_path, config, replace(plan, device="cpu" if options else "cuda"))
    followers = Followers(tmp_path, Cluster(nnodes=nodes, host="localhost", port=29500))
    caught: list[ConfigError] = []

    def gather() -> None:
        try:
            followers.gather(StopRequests(), seconds=30)
        except ConfigError as error:
            caught.append(error)

    leader = threading.Thread(target=gather)
    leader.start()
    place = ["--nnodes", "2", "--node-rank", "1", "--rdzv", "localhost:29500"]
    code = main(["train", "--preset", "toy_grpo", "--run-dir", str(tmp_path), *place, *options])
    leader.join()
    followers.end(Told(exit_code=2))
    assert code == 2
    assert message in capsys.readouterr().err
    assert caught[0].message == f"node 1 ({socket.gethostname()}): {message}"
