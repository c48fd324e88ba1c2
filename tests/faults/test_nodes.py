"""Two machines, one run, under real torchrun: two launchers here, which share a run directory."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from vlactl.errors import ConfigError, TrainingError
from vlactl.launch.follow import _Follower, follow
from vlactl.launch.network import Cluster
from vlactl.launch.nodes import LEADER, NODES, Followers, Told, leading, send_home
from vlactl.launch.status import read_heartbeats
from vlactl.launch.stops import StopRequests

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
Launch = Callable[..., list[subprocess.Popen[str]]]
TWO = Cluster(nnodes=2, node_rank=0, host="127.0.0.1", port=29500)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start both launchers of a job that follows a script; nothing of them may be left."""
    started: list[subprocess.Popen[str]] = []
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def start(
        *script: str, settings: tuple[str, ...] = (), run_dir: Path = tmp_path
    ) -> list[subprocess.Popen[str]]:
        run_dir.mkdir(exist_ok=True)
        (run_dir / "script.json").write_text(json.dumps(script))
        port = str(free_port())
        for rank in ("1", "0"):  # the order does not matter
            program = [sys.executable, HERE / "scripted_node.py", run_dir, rank, port]
            started.append(
                subprocess.Popen(
                    [*map(str, program), *settings],
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return started[:-3:-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_ranks(run_dir: Path, launchers: list[subprocess.Popen[str]]) -> None:
    while len(read_heartbeats(run_dir)) < 2:
        assert all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.1)


def ends(launchers: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit codes and what was said."""
    said = [launcher.communicate(timeout=100)[0] for launcher in launchers]
    return [launcher.returncode for launcher in launchers], said


def test_killed_rank_of_another_node_is_named_and_the_job_starts_again(launch: Launch) -> None:
    codes, (leader, _) = ends(launch("kill", "finish"))
    assert codes == [0, 0]
    assert "rank 1 was killed by SIGKILL in rollout of step 3; starting again" in leader
    assert "step 2/2" in leader


def test_what_a_rank_of_another_node_says_is_said_everywhere(launch: Launch) -> None:
    codes, said = ends(launch("refuse"))
    assert codes == [3, 3]
    for text in said:
        assert " error: no renderer\n        install one" in text
        assert "Traceback" not in text


def test_hung_rank_of_another_node_is_named_with_stacks_of_all(
    launch: Launch, tmp_path: Path
) -> None:
    settings = ("train.hang_timeout=4", "train.max_restarts=0")
    codes, said = ends(launch("stall", settings=settings))
    assert codes == [4, 4]
    for text in said:
        assert "rank 1 in rollout of step 3: no progress for 4 s" in text
    for rank in (0, 1):
        stacks = (tmp_path / f"logs/attempt-1/rank-{rank}.log").read_text()
        assert "most recent call first" in stacks


@pytest.mark.parametrize(
    ("node", "number", "code"), [(1, signal.SIGTERM, 75), (1, signal.SIGINT, 130)]
)
def test_a_signal_to_one_node_ends_the_job_on_all(
    launch: Launch, tmp_path: Path, node: int, number: int, code: int
) -> None:
    launchers = launch("wait")
    await_ranks(tmp_path, launchers)
    launchers[node].send_signal(number)
    codes, said = ends(launchers)
    assert codes == [code, code]
    assert "Traceback" not in "".join(said)


@pytest.mark.slow
def test_killed_launchers_are_noticed_within_a_minute(launch: Launch, tmp_path: Path) -> None:
    """Two jobs at once, because both wait most of the time: one loses a node, one node 0."""
    jobs = {}
    for name in ("other", "node 0"):
        jobs[name] = launch("wait", run_dir=tmp_path / name)
        await_ranks(tmp_path / name, jobs[name])
    jobs["other"][1].kill()
    jobs["node 0"][0].kill()
    started = time.monotonic()
    survivors = jobs["other"][0], jobs["node 0"][1]
    codes, (leader, follower) = ends(survivors)
    assert time.monotonic() - started < 65
    assert codes == [4, 4]
    host = socket.gethostname()
    assert f"node 1 ({host}), ranks 1 in rollout of step 3: lost" in leader
    assert f"node 0 ({host}) is not heard of any more" in follower


def test_a_node_that_never_comes(tmp_path: Path) -> None:
    followers = Followers(tmp_path, TWO)
    with pytest.raises(ConfigError, match=r"node 1 has not come to .* within 0\.5 s") as caught:
        followers.gather(StopRequests(), seconds=0.5)
    assert "a disk that all nodes share" in caught.value.hint


def test_node_0_that_never_comes(tmp_path: Path) -> None:
    cluster = Cluster(nnodes=2, node_rank=1, host="127.0.0.1", port=29500)
    with pytest.raises(ConfigError, match=r"node 0 has not come to .* within 0\.5 s"):
        follow(tmp_path, cluster, check=lambda *_: None, note=lambda _: None, seconds=0.5)
    # What an earlier launch has left is no sign of life.
    Followers(tmp_path, TWO).end(Told(exit_code=0))
    with pytest.raises(ConfigError, match=r"node 0 has not come to .* within 0\.5 s"):
        follow(tmp_path, cluster, check=lambda *_: None, note=lambda _: None, seconds=0.5)


def test_others_hear_of_the_error_that_node_0_ends_with(tmp_path: Path) -> None:
    with pytest.raises(TrainingError), leading(tmp_path, TWO):
        raise TrainingError("it broke", hint="mend it")
    said = json.loads((tmp_path / NODES / LEADER).read_text())
    assert said["state"] == "end"
    assert said["end"] == {"exit_code": 4, "message": "it broke", "hint": "mend it"}
    with pytest.raises(ZeroDivisionError), leading(tmp_path, TWO):
        raise ZeroDivisionError
    said = json.loads((tmp_path / NODES / LEADER).read_text())
    assert said["end"]["exit_code"] == 1


@pytest.fixture
def second_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Follows in a thread, with a plan that it never gets to carry out; how it leaves."""
    monkeypatch.setattr("vlactl.launch.follow.read_run", lambda _: (None, None))
    codes: list[int] = []
    follower = _Follower(
        run_dir=tmp_path,
        cluster=PAIR[1],
        check=lambda *_: None,
        note=lambda _: None,
        worker_module="nobody",
        stop=StopRequests(),
        seconds=60,
    )
    (tmp_path / NODES / "1").mkdir(parents=True)
    thread = threading.Thread(target=lambda: codes.append(follower.run()))
    thread.start()
    yield codes
    thread.join(20)


PAIR = [Cluster(nnodes=2, node_rank=rank, host="localhost", port=29999) for rank in (0, 1)]


def wait_for(codes: list[int]) -> int:
    deadline = time.monotonic() + 30
    while not codes and time.monotonic() < deadline:
        time.sleep(0.1)
    return codes[0]


def test_an_attempt_that_was_over_before_a_node_heard_of_it(
    tmp_path: Path, second_node: list[int]
) -> None:
    """Node 0 must not wait for an answer that nobody would give."""
    followers = Followers(tmp_path, PAIR[0])
    followers.gather(StopRequests(), seconds=60)
    followers._said = replace(followers._said, state="running", attempt=1)  # too short to be seen
    followers.over()
    assert followers.wait_for_all() == []
    followers.end(Told(exit_code=130))
    assert wait_for(second_node) == 130


def test_nodes_leave_in_peace_where_nothing_is_left_to_do(
    tmp_path: Path, second_node: list[int]
) -> None:
    send_home(tmp_path, PAIR[0], seconds=60)
    assert wait_for(second_node) == 0
