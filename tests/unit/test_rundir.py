"""Run directories: names, creation, and one owner at a time."""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlactl.config.compose import compose, load_resolved
from vlactl.errors import ConfigError, IntegrityError
from vlactl.launch.hardware import Gpu, Hardware
from vlactl.launch.plan import Plan, make_plan
from vlactl.launch.progress import MetricsTail, PlainProgress, describe_step
from vlactl.launch.rundir import (
    LOCK,
    create_run_dir,
    lock_run,
    new_run_dir,
    newest_run,
    owner_of,
    preset_of,
    runs_root,
    write_run,
)
from vlactl.launch.status import (
    RESULT,
    STATUS,
    Beat,
    Heartbeat,
    clear_status,
    read_failures,
    read_heartbeats,
    read_result,
    write_failure,
    write_result,
)
from vlactl.launch.stops import StopRequests
from vlactl.report.sinks import MetricsLog


@given(st.text())
def test_odd_names_are_refused_or_stay_inside(name: str) -> None:
    root = Path("/runs")
    with suppress(ConfigError):
        path = new_run_dir(root, name)
        assert path.parent.parent == root
        assert ".." not in path.parts


@pytest.mark.parametrize("name", ["../x", "a/b", "a\nb", "x" * 300, "", ".hidden", "-x"])
def test_huge_and_odd_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        new_run_dir(Path("runs"), name)


def test_occupied_folder_is_refused(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "a" / "b")
    create_run_dir(tmp_path / "a" / "b")  # empty: fine
    (tmp_path / "a" / "b" / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not empty") as caught:
        create_run_dir(tmp_path / "a" / "b")
    assert "--resume" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot create"):
        create_run_dir(tmp_path / "a" / "b" / "file" / "below")


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    composed = compose("toy_grpo")
    plan = make_plan(composed.config, Hardware(cores=2, ram_bytes=2**33), gpus=1)
    write_run(tmp_path, composed.config, plan, composed.provenance)
    assert load_resolved(tmp_path / "config.json") == composed.config
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan
    origins = json.loads((tmp_path / "provenance.json").read_text())
    assert origins["optim.lr"].startswith("presets/toy_grpo.toml")
    assert preset_of(tmp_path) == "toy_grpo"
    assert not (tmp_path / "machine.json").exists()


def test_a_run_records_its_machine(tmp_path: Path) -> None:
    config = compose("toy_grpo").config
    gpu = Gpu(index=0, name="Big GPU", memory_bytes=2**36)
    hardware = Hardware(cores=2, ram_bytes=2**33, gpus=(gpu,), cpu="A Fast One")
    write_run(tmp_path, config, make_plan(config, hardware, gpus=1), hardware=hardware)
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["hardware"]["gpus"][0]["name"] == "Big GPU"
    assert machine["versions"]["vlactl"]
    assert preset_of(tmp_path) == ""


def test_the_owner_of_a_run_is_told_while_it_lives(tmp_path: Path) -> None:
    assert owner_of(tmp_path) == ""
    with lock_run(tmp_path):
        assert owner_of(tmp_path).startswith(f"process {os.getpid()} on ")
    assert owner_of(tmp_path) == ""
    dead = {"pid": 2**22 + 1, "host": socket.gethostname(), "started": "2026-01-01"}
    (tmp_path / LOCK).write_text(json.dumps(dead))
    assert owner_of(tmp_path) == ""
    (tmp_path / LOCK).write_text(json.dumps(dead | {"host": "elsewhere"}))
    assert "on elsewhere" in owner_of(tmp_path)


def test_newest_run_goes_by_name_not_by_file_time(tmp_path: Path) -> None:
    assert newest_run(tmp_path) is None
    for run in ("b/2026-01-02T00-00-00", "a/2026-01-03T00-00-00", "b/2026-01-01T00-00-00"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.json").touch()
    (tmp_path / "a" / "2027-01-01T00-00-00").mkdir()  # nothing was started there
    assert newest_run(tmp_path) == tmp_path / "a/2026-01-03T00-00-00"
    assert newest_run(tmp_path, "b") == tmp_path / "b/2026-01-02T00-00-00"


def test_runs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLACTL_RUNS", raising=False)
    assert runs_root() == Path("runs")
    monkeypatch.setenv("VLACTL_RUNS", "/data/runs")
    assert runs_root() == Path("/data/runs")
    assert runs_root(Path("here")) == Path("here")


def test_second_owner_is_refused_and_first_is_named(tmp_path: Path) -> None:
    with lock_run(tmp_path) as note:
        assert note == ""
        with pytest.raises(ConfigError, match=r"in use by process \d+ on "), lock_run(tmp_path):
            pass
    with lock_run(tmp_path) as note:
        assert note == ""


def test_lock_of_a_dead_process_is_explained_and_taken_over(tmp_path: Path) -> None:
    program = (
        "import os, signal, pathlib\n"
        "from vlactl.launch.rundir import lock_run\n"
        f"with lock_run(pathlib.Path({str(tmp_path)!r})):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    dead = subprocess.run([sys.executable, "-c", program], check=False)
    assert dead.returncode == -9
    with lock_run(tmp_path) as note:
        assert note.startswith(f"took over {tmp_path}: process ")
        assert note.endswith("died")


def test_lock_of_another_machine_is_not_taken(tmp_path: Path) -> None:
    owner = {"pid": 1, "host": f"not-{socket.gethostname()}", "started": "2026-01-01"}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with pytest.raises(ConfigError, match="never released") as caught, lock_run(tmp_path):
        pass
    assert str(tmp_path / LOCK) in caught.value.hint


def test_lock_of_a_batch_job_that_was_started_again_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm has ended a job everywhere before it runs it once more, on whatever machine."""
    owner = {"pid": 1, "host": "elsewhere", "started": "2026-01-01", "job": "77", "start": "0"}
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with pytest.raises(ConfigError, match="never released"), lock_run(tmp_path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock_run(tmp_path) as note:
        assert note.startswith(f"took over {tmp_path}: process 1 on elsewhere")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with pytest.raises(ConfigError, match="never released"), lock_run(tmp_path):
        pass


def test_heartbeats_are_rare_within_a_phase(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.beat("rollout", 1, 0, 10)
    heartbeat.beat("rollout", 1, 1, 10)
    (beat,) = read_heartbeats(tmp_path)
    assert (beat.rank, beat.phase, beat.step, beat.done, beat.total) == (3, "rollout", 1, 0, 10)
    heartbeat.beat("update", 1)
    assert read_heartbeats(tmp_path)[0].phase == "update"
    clear_status(tmp_path)
    assert read_heartbeats(tmp_path) == []


def test_failures_put_what_the_user_can_fix_first(tmp_path: Path) -> None:
    clear_status(tmp_path)
    write_failure(tmp_path, 0, "rollout", 1, ConnectionError("peer is gone\nlong story"))
    write_failure(tmp_path, 1, "rollout", 1, ConfigError("wrong", hint="right"))
    first, second = read_failures(tmp_path)
    error = first.user_error()
    assert isinstance(error, ConfigError)
    assert (error.message, error.hint) == ("wrong", "right")
    assert (second.kind, second.message) == ("ConnectionError", "peer is gone")
    assert second.user_error() is None


def test_result(tmp_path: Path) -> None:
    clear_status(tmp_path)
    assert read_result(tmp_path) == ""
    write_result(tmp_path, "preempted")
    assert read_result(tmp_path) == "preempted"
    (tmp_path / STATUS / RESULT).write_text('{"status": ')
    with pytest.raises(IntegrityError, match=r"result\.json is damaged"):
        read_result(tmp_path)


def test_second_sigterm_within_seconds_means_now() -> None:
    stop = StopRequests()
    stop.on_terminate(15, None)
    stop.on_terminate(15, None)  # sent to a process and to its group: one request
    assert not stop.at_once
    assert stop.terminated_at is not None
    stop.terminated_at -= 2
    stop.on_terminate(15, None)
    assert stop.at_once


def test_sigterm_minutes_later_is_no_hurry() -> None:
    stop = StopRequests()
    stop.on_terminate(15, None)
    assert stop.terminated_at is not None
    stop.terminated_at -= 60
    stop.on_terminate(15, None)
    assert not stop.at_once


def test_metrics_are_followed_across_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    tail = MetricsTail(tmp_path)
    assert tail.new() == []
    with path.open("a") as file:
        file.write('{"step": 1}\n{"st')
    assert tail.new() == [{"step": 1}]
    path.write_text('{"step": 0}\n')  # a restart forgets what came after its checkpoint
    assert tail.new() == []
    with path.open("a") as file:
        file.write('{"step": 1}\n')
    assert tail.new() == [{"step": 1}]


def test_a_cut_that_is_made_good_between_two_looks_is_noticed(tmp_path: Path) -> None:
    """The replayed line is longer than the one it replaces, so that the file has only grown."""
    log = MetricsLog(tmp_path, ())
    tail = MetricsTail(tmp_path)
    log.log(0, {"loss": 0.5})
    log.log(1, {"loss": 0.5})
    assert [line["step"] for line in tail.new()] == [0, 1]
    log.resume_from(1)
    log.log(1, {"loss": 0.25})
    assert [(line["step"], line["loss"]) for line in tail.new()] == [(1, 0.25)]
    assert tail.new() == []


def test_step_line_leaves_out_what_is_not_there() -> None:
    metrics = {"step": 2, "env/success_once": 0.25, "train/actor/approx_kl": None, "time/step": 3.0}
    assert describe_step(metrics, 10) == "step 3/10  success 0.25  3.0 s"
    idle = metrics | {"train/actor/updates": 0.0}
    assert describe_step(idle, 10).endswith("success 0.25  no update: nothing to learn from  3.0 s")


def test_evaluation_is_reported_by_tenths() -> None:
    lines: list[str] = []
    progress = PlainProgress(lines.append, 1)
    for done in range(41):
        beat = Beat(rank=0, pid=1, phase="evaluate", step=0, done=done, total=40, count=done)
        progress.beats([beat])
    assert len(lines) == 10
    assert lines[-1] == "evaluation 40/40 episodes"
