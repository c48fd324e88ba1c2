"""Real training on two machines over gloo: the numbers are those of one machine with two ranks.

The second test gives each machine a network of its own, which takes Linux and root.
"""

import json
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.dist]

SMALL = [
    "train.max_steps=2",
    "rollout.episodes_per_step=16",
    "algorithm.group_size=4",
    "optim.global_batch_size=32",
    "optim.micro_batch_size=8",
    "env.num_envs=2",
    "env.num_tasks=4",
    "env.num_trials=8",
    "algorithm.entropy_coef=0.01",
    "sinks=[]",
]
VLACTL = [sys.executable, "-m", "vlactl.cli.app"]


def command(run_dir: Path, *options: str) -> list[str]:
    sets = [part for override in SMALL for part in ("--set", override)]
    return [*VLACTL, "train", "--preset", "toy_grpo", "--run-dir", str(run_dir), *sets, *options]


def start_nodes(
    run_dir: Path, rdzv: str, *options: str, prefixes: Sequence[Sequence[str]] = ((), ())
) -> list[subprocess.Popen[str]]:
    several = ["--gpus", "1", "--nnodes", "2", "--rdzv", rdzv, *options]
    return [
        subprocess.Popen(
            [*prefix, *command(run_dir, *several, "--node-rank", str(rank))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, prefix in enumerate(prefixes)
    ]


def await_ends(nodes: Sequence[subprocess.Popen[str]], code: int) -> list[str]:
    """What both nodes say in the end; they leave with this exit code."""
    try:
        said = [node.communicate(timeout=170)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [code, code], said
    return said


def metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [{k: v for k, v in step.items() if not k.startswith("time")} for step in steps]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    subprocess.run(command(run_dir, "--gpus", "2"), check=True, timeout=170, capture_output=True)
    return run_dir


def assert_same_result(run_dir: Path, one_node: Path) -> None:
    for step, expected in zip(metrics(run_dir), metrics(one_node), strict=True):
        assert step.keys() == expected.keys()
        for name, value in expected.items():
            assert step[name] == pytest.approx(value, rel=1e-6), name
    plan = json.loads((run_dir / "plan.json").read_text())
    assert (plan["nodes"], plan["world_size"]) == (2, 2)


def test_two_nodes_give_the_result_of_one(one_node: Path, tmp_path: Path) -> None:
    leader, follower = await_ends(start_nodes(tmp_path / "run", "127.0.0.1:29871"), 0)
    assert_same_result(tmp_path / "run", one_node)
    assert "step 2/2" in leader
    assert "finished" in follower


def test_sigterm_saves_and_the_nodes_go_on_together(one_node: Path, tmp_path: Path) -> None:
    """P3 on two machines: what a batch system does when their time is up, and later."""
    run_dir, rdzv = tmp_path / "run", "127.0.0.1:29881"
    endless = ("--resume", "auto", "--set", "train.max_steps=999")
    nodes = start_nodes(run_dir, rdzv, *endless)
    leader = nodes[0]
    assert leader.stdout is not None
    assert any(line.startswith("step 1/") for line in leader.stdout)
    leader.send_signal(signal.SIGTERM)
    await_ends(nodes, 75)
    done = len(metrics(run_dir))
    again = ("--resume", "auto", "--set", f"train.max_steps={done + 1}")
    said, _ = await_ends(start_nodes(run_dir, rdzv, *again), 0)
    assert f"going on after step {done}" in said
    steps = metrics(run_dir)
    assert [step["step"] for step in steps] == list(range(done + 1))
    for step, expected in zip(steps, metrics(one_node), strict=False):
        assert step == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def networks() -> Iterator[list[str]]:
    """Two network namespaces that are joined by a cable, 10.77.0.1 and 10.77.0.2."""
    tag = uuid.uuid4().hex[:6]
    names, ends = [f"vla-{tag}-{i}" for i in (1, 2)], [f"v{tag}{i}" for i in (1, 2)]
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here")
    if not _ip("netns", "add", names[0]):
        pytest.skip("network namespaces need root")
    try:
        assert _ip("netns", "add", names[1])
        assert _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for i, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            assert _ip("link", "set", end, "netns", name)
            assert _ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", end)
            assert _ip("-n", name, "link", "set", end, "up")
            assert _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            _ip("netns", "del", name)


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode == 0


def test_nodes_meet_across_a_network(
    one_node: Path, tmp_path: Path, networks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They see nothing of each other but the run directory and one address."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    prefixes = [["ip", "netns", "exec", name] for name in networks]
    await_ends(start_nodes(tmp_path / "run", "10.77.0.1:29500", prefixes=prefixes), 0)
    assert_same_result(tmp_path / "run", one_node)
