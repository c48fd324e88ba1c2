"""Every way in which a job can end, under real torchrun. A start takes seconds: few of them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from vlactl.config.compose import compose
from vlactl.errors import EnvironmentNotReadyError, IntegrityError, TrainingError
from vlactl.hub.manifest import CHECKPOINTS, step_name, write_manifest
from vlactl.launch.hardware import Hardware
from vlactl.launch.plan import make_plan
from vlactl.launch.processes import TOKEN_VARIABLE
from vlactl.launch.progress import PlainProgress
from vlactl.launch.rundir import write_run
from vlactl.launch.status import LOG_DIR_VARIABLE, read_heartbeats
from vlactl.launch.supervise import supervise
from vlactl.launch.verdict import saved_step

pytestmark = pytest.mark.faults

WORKER = "scripted_worker"
SECTIONS = {"max_seconds": "checkpoint"}


@pytest.fixture(autouse=True)
def worker_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Supervise a job of two ranks that follow a script; nothing of it may be left."""

    def run_script(*script: str, lines: list[str] | None = None, **settings: object) -> int:
        prepare(tmp_path, script)
        overrides = [f"{SECTIONS.get(key, 'train')}.{key}={v}" for key, v in settings.items()]
        config = compose("toy_grpo", ["train.max_steps=2", *overrides]).config
        plan = make_plan(config, Hardware(cores=2, ram_bytes=2**33), gpus=2)
        write_run(tmp_path, config, plan)
        told = [] if lines is None else lines
        progress = PlainProgress(told.append, config.train.max_steps)
        try:
            return supervise(
                tmp_path, plan, "train", config=config, progress=progress, worker_module=WORKER
            )
        finally:
            assert job_processes(tmp_path) == []

    return run_script


def prepare(run_dir: Path, script: tuple[str, ...]) -> None:
    (run_dir / "script.json").write_text(json.dumps(script))


def job_processes(run_dir: Path) -> list[str]:
    """Processes of a job on this run directory, with their orphans."""
    found = []
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            marked = TOKEN_VARIABLE in variables and str(run_dir) in variables.get(
                LOG_DIR_VARIABLE, ""
            )
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
        except psutil.Error:
            continue
    return found


def signal_when_running(run_dir: Path, *numbers: int) -> threading.Thread:
    """Signal this process once both ranks are alive, with seconds between signals."""

    def wait_and_send() -> None:
        while len(read_heartbeats(run_dir)) < 2:
            time.sleep(0.1)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(1.5)

    thread = threading.Thread(target=wait_and_send, daemon=True)
    thread.start()
    return thread


def test_finished_job_reports_its_steps(run: Callable[..., int], tmp_path: Path) -> None:
    lines: list[str] = []
    assert run("finish", lines=lines) == 0
    assert lines == ["step 1/2  success 0.25  1.5 s", "step 2/2  success 0.25  1.5 s"]
    assert (tmp_path / "logs/attempt-1/rank-1.log").read_text() == "rank 1: finish\n"


def test_a_users_mistake_keeps_its_words_and_is_not_retried(
    run: Callable[..., int], tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentNotReadyError) as caught:
        run("refuse")
    assert (caught.value.message, caught.value.hint) == ("no renderer", "install one")
    assert not (tmp_path / "logs/attempt-2").exists()


def test_killed_rank_is_named_and_a_repeated_crash_ends_the_job(
    run: Callable[..., int], tmp_path: Path
) -> None:
    lines: list[str] = []
    with pytest.raises(TrainingError) as caught:
        run("kill", "crash", "crash", lines=lines, max_restarts=5)
    assert lines == [
        "rank 1 was killed by SIGKILL in rollout of step 3; starting again after step 2",
        "rank 1 failed in rollout of step 3: RuntimeError: boom; starting again after step 2",
    ]
    assert caught.value.message == "rank 1 failed in rollout of step 3: RuntimeError: boom"
    assert caught.value.hint == (
        f"log: {tmp_path}/logs/attempt-3/rank-1.log\n"
        f"go on after step 2: vlactl train --resume {tmp_path}"
    )


def test_killed_rank_ends_the_job_within_a_minute_though_others_wait_for_it(
    run: Callable[..., int],
) -> None:
    """Row 26 where connections do not break, as with collectives on GPUs."""
    started = time.monotonic()
    with pytest.raises(TrainingError, match="rank 1 was killed by SIGKILL in rollout of step 3"):
        run("kill-deaf", max_restarts=0)
    assert time.monotonic() - started < 60


def test_hung_rank_is_named_and_stacks_are_written(run: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run("stall", max_restarts=0, hang_timeout=4)
    assert caught.value.message == "rank 1 in rollout of step 3: no progress for 4 s"
    assert "raise train.hang_timeout" in caught.value.hint
    for rank, function in ((0, "_act"), (1, "_misbehave")):
        stacks = (tmp_path / f"logs/attempt-1/rank-{rank}.log").read_text()
        assert "most recent call first" in stacks
        assert f"in {function}" in stacks


def test_processes_that_do_not_end_cost_a_finished_job_nothing(run: Callable[..., int]) -> None:
    lines: list[str] = []
    assert run("finish-linger", lines=lines, hang_timeout=3) == 0
    assert lines[-1].startswith("all is saved, but rank 0 in rollout of step 3, rank 1 in ")


@pytest.mark.slow
def test_stopped_process_is_named_within_a_minute(run: Callable[..., int]) -> None:
    started = time.monotonic()
    with pytest.raises(TrainingError) as caught:
        run("stop", max_restarts=0)
    assert caught.value.message == "rank 1 in rollout of step 3: no sign of life for 45 s"
    assert time.monotonic() - started < 70  # torchrun takes some seconds to start


def test_out_of_memory_names_what_to_lower(run: Callable[..., int]) -> None:
    with pytest.raises(TrainingError) as caught:
        run("memory", max_restarts=5)
    assert caught.value.message.startswith("rank 1 failed in rollout of step 3: OutOfMemoryError")
    assert "lower optim.micro_batch_size, rollout.batch_size or env.num_envs" in caught.value.hint


def test_sigterm_saves_and_exits_75(run: Callable[..., int], tmp_path: Path) -> None:
    signal_when_running(tmp_path, signal.SIGTERM)
    assert run("wait") == 75


def test_a_save_that_fails_after_sigterm_is_told(run: Callable[..., int], tmp_path: Path) -> None:
    signal_when_running(tmp_path, signal.SIGTERM)
    with pytest.raises(IntegrityError, match="could not be saved: no space"):
        run("full-disk", "wait")
    assert not (tmp_path / "logs/attempt-2").exists()


def test_sigterm_to_one_rank_is_one_to_all(run: Callable[..., int]) -> None:
    assert run("term-one") == 75


def test_second_sigterm_means_now(run: Callable[..., int], tmp_path: Path) -> None:
    signal_when_running(tmp_path, signal.SIGTERM, signal.SIGTERM)
    started = time.monotonic()
    with pytest.raises(TrainingError, match="stopped at once: nothing was saved"):
        run("deaf")
    assert time.monotonic() - started < 40


def test_ranks_that_do_not_save_in_time_are_ended(run: Callable[..., int], tmp_path: Path) -> None:
    signal_when_running(tmp_path, signal.SIGTERM)
    with pytest.raises(TrainingError, match="no checkpoint within 2 s of SIGTERM"):
        run("deaf", max_seconds=2)


def test_ctrl_c_ends_everything(run: Callable[..., int], tmp_path: Path) -> None:
    signal_when_running(tmp_path, signal.SIGINT)
    assert run("wait") == 130


def test_ctrl_c_on_the_command_line_says_one_thing(tmp_path: Path) -> None:
    """Row 34, while the workers are still starting."""
    command = [sys.executable, "-m", "vlactl.cli.app", "train", "--preset", "toy_grpo"]
    with subprocess.Popen(
        [*command, "--run-dir", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        deadline = time.monotonic() + 60
        while not job_processes(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert (out.count("interrupted"), err) == (1, "")
    assert f"vlactl train --resume {tmp_path / 'run'}" in out
    assert job_processes(tmp_path) == []


def test_progress_is_the_number_of_a_step_not_the_time_of_a_file(tmp_path: Path) -> None:
    """Row 49: clocks jump, and network disks have clocks of their own."""
    for step, age in ((9, 1_000_000_000), (10, 0), (2, 2_000_000_000)):
        folder = tmp_path / CHECKPOINTS / step_name(step)
        folder.mkdir(parents=True)
        write_manifest(folder, {"step": step})
        for path in (folder / "MANIFEST.json", folder):
            os.utime(path, (age, age))
    assert saved_step(tmp_path) == 10


def test_workers_leave_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    prepare(tmp_path, ("wait",))
    program = (
        "from pathlib import Path\n"
        "from vlactl.config.compose import compose\n"
        "from vlactl.launch.hardware import Hardware\n"
        "from vlactl.launch.plan import make_plan\n"
        "from vlactl.launch.progress import PlainProgress\n"
        "from vlactl.launch.supervise import supervise\n"
        "config = compose('toy_grpo').config\n"
        "plan = make_plan(config, Hardware(cores=2, ram_bytes=2**33), gpus=2)\n"
        f"supervise(Path({str(tmp_path)!r}), plan, 'train', config=config,\n"
        f"          progress=PlainProgress(print, 1), worker_module={WORKER!r})\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program])
    try:
        while len(read_heartbeats(tmp_path)) < 2:
            assert supervisor.poll() is None
            time.sleep(0.1)
    finally:
        supervisor.kill()
        supervisor.wait()
    deadline = time.monotonic() + 10
    while job_processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert job_processes(tmp_path) == []
