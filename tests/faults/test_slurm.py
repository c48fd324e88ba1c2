"""The batch script, run for real, by a Slurm of two small programs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vlactl.cli.app import main

SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else echo "$*" >> "$RECORD/scontrol"; fi
"""
SCANCEL = """\
#!/bin/bash
[ "$*" = "--signal=TERM 4321.0" ] && kill -TERM $(cat "$RECORD/tasks")
"""
SRUN = """\
#!/bin/bash
trap 'kill -KILL $(jobs -p)' TERM  # as the real one does
while [[ $1 == --* ]]; do echo "$1" >> "$RECORD/srun"; shift; done
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do SLURM_NODEID=$i "$@" & tasks+=($!); done
echo "${tasks[@]}" > "$RECORD/tasks"
code=0
for task in "${tasks[@]}"; do
    wait "$task"; one=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; one=$?; done
    [ "$one" -gt "$code" ] && code=$one
done
exit "$code"
"""
PYTHON = """\
#!/bin/bash
trap 'code=75' TERM
printf '%s\\n' "$@" > "$RECORD/task-$SLURM_NODEID.partial"
pwd > "$RECORD/directory"
mv "$RECORD/task-$SLURM_NODEID.partial" "$RECORD/task-$SLURM_NODEID"
code=$TASK_CODE
while [ -e "$RECORD/hold" ] && [ "$code" != 75 ]; do sleep 0.1; done
exit "$code"
"""

Script = Callable[..., Path]


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs on the PATH that write down how they were called; where they do."""
    programs, record = tmp_path / "bin", tmp_path / "record"
    programs.mkdir()
    record.mkdir()
    for name, text in {
        "scontrol": SCONTROL,
        "scancel": SCANCEL,
        "srun": SRUN,
        "my python": PYTHON,
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setenv("SLURM_JOB_ID", "4321")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("TASK_CODE", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "executable", str(programs / "my python"))
    work = tmp_path / "my $(work) dir"
    work.mkdir()
    monkeypatch.chdir(work)
    return record


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Write the script of a run whose folder has a name that shells trip over."""

    def write(*options: str) -> Path:
        run_dir = tmp_path / "runs" / "it's; $HOME"
        place = ["--run-dir", str(run_dir), "--launcher", "slurm", "--nnodes", "2"]
        assert main(["train", "--preset", "toy_grpo", *place, *options]) == 0
        assert not run_dir.exists()
        return run_dir.with_name(f"{run_dir.name}.sbatch")

    return write


def run(path: Path) -> int:
    return subprocess.run(["bash", path], timeout=60, check=False).returncode


def test_every_node_gets_its_command_word_by_word(script: Script, slurm: Path) -> None:
    text = "summary='a \"quoted\" $(text); `x`'"
    path = script("--set", text, "--gpus", "2")
    subprocess.run(["bash", "-n", path], check=True)
    assert run(path) == 0
    run_dir = path.with_suffix("")
    for node in ("0", "1"):
        assert (slurm / f"task-{node}").read_text().splitlines() == [
            *("-m", "vlactl.cli.app", "train", "--preset", "toy_grpo"),
            *("--resume", "auto", "--run-dir", str(run_dir), "--set", text, "--gpus", "2"),
            *("--nnodes", "2", "--rdzv", "first:28025", "--node-rank", node),
        ]
    assert (slurm / "directory").read_text().strip() == str(Path.cwd())
    assert "--ntasks-per-node=1" in (slurm / "srun").read_text().splitlines()
    assert not (slurm / "scontrol").exists()


def test_directives(script: Script) -> None:
    options = ["--set", "checkpoint.max_seconds=100", "--sbatch", "--time=1:00:00", "--gpus", "2"]
    lines = script(*options).read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name=toy_grpo",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
        "--signal=B:TERM@160",
        "--requeue",
        "--open-mode=append",
        "--time=1:00:00",
    ]
    assert "#SBATCH --exclusive" in script().read_text()


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (4, False), (0, False), (130, False)])
def test_only_what_was_saved_is_requeued(
    script: Script, slurm: Path, monkeypatch: pytest.MonkeyPatch, code: int, requeued: bool
) -> None:
    path = script()
    monkeypatch.setenv("TASK_CODE", str(code))
    assert run(path) == code
    calls = slurm / "scontrol"
    assert (calls.read_text() if calls.exists() else "") == ("requeue 4321\n" if requeued else "")


def test_sigterm_reaches_every_node_and_the_job_is_requeued(script: Script, slurm: Path) -> None:
    path = script()
    (slurm / "hold").touch()
    with subprocess.Popen(["bash", path]) as job:
        deadline = time.monotonic() + 30
        while len(list(slurm.glob("task-?"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        try:
            assert job.wait(30) == 75
        finally:
            (slurm / "hold").unlink()
    assert (slurm / "scontrol").read_text() == "requeue 4321\n"


def test_tasks_get_the_cores_of_the_job(
    script: Script, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = script()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert run(path) == 0
    assert "--cpus-per-task=12" in (slurm / "srun").read_text().splitlines()


def test_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run-dir", str(tmp_path / "run"), "--launcher", "slurm", "--dry-run"]
    assert main(["train", "--preset", "toy_grpo", *options]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=toy_grpo\n")
    assert not (tmp_path / "run.sbatch").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sbatch", "time=1"], "--sbatch 'time=1' is not an option of sbatch"),
        (["--sbatch", "--x\nrm -rf /"], "is not an option of sbatch"),
        (["--rdzv", "a:2000"], "Slurm says which machines there are"),
        (["--node-rank", "0"], "Slurm says which machines there are"),
        (["--set", "optim.lr=fast"], "optim.lr"),
        (["--gpus", "7"], "7"),
        (["--nnodes", "0"], "--nnodes 0"),
    ],
)
def test_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--run-dir", "there", "--launcher", "slurm"]
    assert main(["train", "--preset", "toy_grpo", *place, *options]) == 2
    assert message in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []
