"""Simulators and their processes die, hang and return nonsense; the pool reports it and goes on
(rows 17-20).

Two simulators play here: the toy one, and one that does as it is told.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
from vlactl_toy.environment import make_environment, make_spec
from vlactl_toy.plugin import ToyEnvConfig

from vlactl.api.contracts import ChunkResult, EnvContext, Episode, Observation, Outcome
from vlactl.api.simulators import SimulatorPool
from vlactl.errors import IntegrityError

ACTIONS_KA = np.ones((4, 1))
SERIAL = itertools.count()


class Order(IntEnum):
    PLAY = 0
    FINISH = 1
    NAP = 2
    HANG = 3
    RAISE = 4
    RAISE_AND_STICK = 5
    BAD_STATE = 6
    BAD_REWARD = 7
    BAD_PICTURE = 8
    DIE = 9
    EXIT = 10


class ScriptedSimulator:
    """Obeys the order that an episode has for its task, and those that are its action chunks.

    Pictures are filled with the episode's trial. The state is (how many simulators its process had
    before this one, chunks since the episode began). A simulator that is closed leaves a note in
    the folder `fault_dir`.
    """

    def __init__(self, config, context):
        self.thread = threading.get_ident()
        self.size, self.folder = config.image_size, config.fault_dir
        self.serial = next(SERIAL)
        self.sticks = False
        self.color = self.num_chunks = 0

    def begin(self, episode):
        self.num_chunks, self.color = 0, episode.trial
        return self.obey(Order(episode.task), num_rewards=0)

    def advance(self, actions_KA):
        self.num_chunks += 1
        return self.obey(Order(int(actions_KA[0, 0])), num_rewards=len(actions_KA))

    def close(self):
        self.check_thread()
        if self.sticks:
            raise RuntimeError("the simulator is stuck")
        if self.folder:
            (Path(self.folder) / f"closed-{os.getpid()}-{self.serial}").touch()

    def obey(self, order, num_rewards):
        self.check_thread()
        if order == Order.NAP:
            time.sleep(1.5)
        elif order == Order.HANG:
            time.sleep(3600)
        elif order in (Order.RAISE, Order.RAISE_AND_STICK):
            self.sticks = order == Order.RAISE_AND_STICK
            raise RuntimeError("the simulator raises")
        elif order == Order.DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        elif order == Order.EXIT:
            sys.exit(3)
        return self.result(order, np.full(num_rewards, np.nan if order == Order.BAD_REWARD else 1))

    def result(self, order, rewards):
        if order == Order.FINISH:
            steps = self.num_chunks
            outcome = Outcome(
                success_step=steps, success_at_end=True, terminated=True, num_steps=steps
            )
            return ChunkResult(rewards=rewards, outcome=outcome)
        state = [self.serial, np.nan if order == Order.BAD_STATE else self.num_chunks]
        size = self.size + (order == Order.BAD_PICTURE)
        observation = Observation(
            images={"front": np.full((size, size, 3), self.color, np.uint8)},
            state=np.array(state, np.float32),
            instruction="",
        )
        return ChunkResult(rewards=rewards, observation=observation)

    def check_thread(self):
        if threading.get_ident() != self.thread:
            raise RuntimeError("called from a thread that is not the simulator's own")


def episode(task: int = 0, trial: int = 0, member: int = 0) -> Episode:
    return Episode(task=task, trial=trial, group=0, member=member, seed=1)


@pytest.fixture
def make_pool():
    pools = []

    def make(num_slots: int = 2, **keys) -> SimulatorPool:
        config = ToyEnvConfig(**{"step_timeout": 20.0} | keys)
        pools.append(make_environment(config, EnvContext(num_slots=num_slots, cameras=("front",))))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def make_scripted_pool(num_slots: int, num_processes: int | None, **keys) -> SimulatorPool:
    config = ToyEnvConfig(**{"step_timeout": 20.0} | keys)
    return SimulatorPool(
        f"{Path(__file__).stem}:ScriptedSimulator",
        config,
        EnvContext(num_slots=num_slots, cameras=("front",)),
        make_spec(config),
        {"PYTHONPATH": str(Path(__file__).parent)},
        num_processes,
    )


@pytest.fixture
def make_scripted():
    """A pool of simulators that do as they are told; the slots in `begin` (all) have an episode."""
    pools = []

    def make(num_slots: int, num_processes: int | None, begin=None, **keys) -> SimulatorPool:
        pools.append(make_scripted_pool(num_slots, num_processes, **keys))
        slots = range(num_slots) if begin is None else begin
        for slot in slots:
            pools[-1].begin(slot, episode())
        assert all(event.result for event in collect(pools[-1], len(slots)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def collect(pool: SimulatorPool, count: int):
    """Exactly so many events, ordered by slot."""
    events, end = [], time.monotonic() + 20.0
    while len(events) < count and time.monotonic() < end:
        events += pool.wait(count - len(events), 20.0)
    assert len(events) == count
    return sorted(events, key=lambda event: event.slot)


def one_event(pool: SimulatorPool):
    (event,) = pool.wait(1, 20.0)
    return event


def tell(pool: SimulatorPool, slot: int, order: Order) -> None:
    pool.advance(slot, np.full((4, 1), float(order)))


def played(pool: SimulatorPool, slot: int) -> list[float]:
    """The state after one more chunk: [number of the simulator, chunks]."""
    tell(pool, slot, Order.PLAY)
    event = one_event(pool)
    assert event.slot == slot
    return event.result.observation.state.tolist()


def assert_ends(pid: int) -> None:
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


def test_episode_runs_to_its_outcome_with_pictures_of_the_right_slot(make_pool):
    pool = make_pool()
    pool.begin(0, episode(task=0))
    pool.begin(1, episode(task=3))
    first = {event.slot: event.result.observation for event in collect(pool, 2)}
    goal_columns = [int(first[slot].images["front"][0, :, 0].argmax()) for slot in (0, 1)]
    assert goal_columns[0] < goal_columns[1]
    while (event := _advance(pool, 1)).result.outcome is None:
        assert event.result.rewards.shape == (4,)
    assert event.result.outcome.success
    assert event.result.rewards[-1] == 5.0


def _advance(pool, slot):
    pool.advance(slot, ACTIONS_KA)
    return one_event(pool)


def test_killed_process_is_reported_and_replaced(make_pool):
    pool = make_pool()
    pool.begin(0, episode())
    before = one_event(pool).result.observation
    os.kill(pool.process_ids[0], signal.SIGKILL)
    pool.advance(0, ACTIONS_KA)
    assert "SIGKILL" in one_event(pool).failure
    pool.begin(0, episode())
    after = one_event(pool).result.observation
    assert np.array_equal(before.state, after.state)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("die", "SIGKILL"),
        ("nan", "not finite"),
        ("raise", "injected"),
        ("hang", "no answer within"),
    ],
)
def test_faults_cost_one_episode(make_pool, tmp_path: Path, fault, text):
    pool = make_pool(faults={"1/2/3": fault}, fault_dir=str(tmp_path), step_timeout=4.0)
    pool.begin(0, episode(1, 2, 3))
    assert text in one_event(pool).failure
    pool.begin(0, episode(1, 2, 3))
    assert one_event(pool).result.observation is not None


def test_answer_to_an_abandoned_request_is_ignored(make_pool):
    pool = make_pool()
    pool.begin(0, episode(task=0))
    pool.begin(0, episode(task=3))
    assert one_event(pool).result.observation.instruction == "reach goal 3"
    assert pool.wait(1, 0.2) == []


def test_processes_are_recycled(make_pool):
    pool = make_pool(recycle_after=2)
    pids = []
    for _ in range(4):
        pool.begin(0, episode())
        one_event(pool)
        pids.append(pool.process_ids[0])
    assert pids[0] == pids[1] != pids[2] == pids[3]


@pytest.mark.parametrize(
    ("num_slots", "num_processes", "sizes"),
    [(5, 2, [2, 3]), (3, 1, [3]), (2, 5, [1, 1]), (2, None, [1, 1])],
)
def test_slots_are_dealt_in_contiguous_blocks(make_scripted, num_slots, num_processes, sizes):
    pool = make_scripted(num_slots, num_processes)
    pids = [pool.process_ids[slot] for slot in range(num_slots)]
    assert [len(list(block)) for _, block in itertools.groupby(pids)] == sizes
    assert len(set(pids)) == len(sizes)


def test_slots_of_one_process_do_not_wait_for_each_other(make_scripted):
    pool = make_scripted(2, 1)
    tell(pool, 0, Order.NAP)
    assert [played(pool, 1)[1] for _ in range(10)] == list(range(1, 11))
    assert one_event(pool).slot == 0


def test_pictures_of_slots_are_kept_apart(make_scripted):
    pool = make_scripted(3, 1)
    for slot in range(3):
        pool.begin(slot, episode(trial=50 + slot))
    for _ in range(5):
        events = collect(pool, 3)
        for event in events:
            picture = event.result.observation.images["front"]
            assert picture.shape == (8, 8, 3)
            assert (picture == 50 + event.slot).all()
        for slot in range(3):
            tell(pool, slot, Order.PLAY)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (Order.RAISE, "the simulator raises"),
        (Order.BAD_STATE, "a state that is not finite"),
        (Order.BAD_REWARD, "a reward that is not finite"),
        (Order.BAD_PICTURE, "picture front is"),
    ],
)
def test_broken_simulator_is_replaced_beside_its_neighbours(make_scripted, tmp_path, order, text):
    pool = make_scripted(2, 1, fault_dir=str(tmp_path))
    pid = pool.process_ids[0]
    broken, neighbour = played(pool, 0)[0], played(pool, 1)[0]
    tell(pool, 0, order)
    assert text in one_event(pool).failure
    assert [file.name for file in tmp_path.iterdir()] == [f"closed-{pid}-{broken:.0f}"]
    assert played(pool, 1) == [neighbour, 2]
    pool.begin(0, episode())
    assert one_event(pool).result.observation.state.tolist() == [2, 0]
    assert pool.process_ids == {0: pid, 1: pid}


@pytest.mark.parametrize(("order", "text"), [(Order.DIE, "SIGKILL"), (Order.EXIT, "exit code 1")])
def test_death_costs_the_episodes_of_the_process_and_no_others(make_scripted, order, text):
    pool = make_scripted(6, 2, begin=(0, 1, 2, 3))
    before = pool.process_ids
    tell(pool, 2, Order.HANG)
    tell(pool, 0, order)
    failures = collect(pool, 2)  # slot 1 is between its observation and its next chunk
    assert [event.slot for event in failures] == [0, 2]
    assert all(text in event.failure for event in failures)
    assert pool.wait(1, 0.1) == []
    tell(pool, 1, Order.PLAY)
    lost = one_event(pool)
    assert lost.slot == 1
    assert text in lost.failure
    assert played(pool, 3)[1] == 1
    for slot in (2, 0, 1, 4):
        pool.begin(slot, episode())
    assert all(event.result for event in collect(pool, 4))
    after = pool.process_ids
    assert after[0] == after[1] == after[2] != before[0]
    assert after[4] == after[3] == before[3]


def test_death_among_idle_slots_goes_unnoticed(make_scripted):
    pool = make_scripted(2, 1)
    tell(pool, 1, Order.FINISH)
    assert one_event(pool).result.outcome.success
    tell(pool, 0, Order.DIE)
    assert one_event(pool).slot == 0
    assert pool.wait(1, 0.1) == []
    pool.begin(1, episode())
    assert one_event(pool).result.observation is not None


def test_death_is_not_blamed_on_the_next_episode(make_scripted):
    pool = make_scripted(3, 1)
    os.kill(pool.process_ids[0], signal.SIGKILL)
    os.waitid(os.P_PID, pool.process_ids[0], os.WEXITED | os.WNOWAIT)
    tell(pool, 0, Order.PLAY)
    tell(pool, 1, Order.PLAY)
    pool.begin(0, episode())
    begun, lost = collect(pool, 2)
    assert begun.result.observation is not None
    assert "SIGKILL" in lost.failure
    tell(pool, 2, Order.PLAY)
    pool.begin(2, episode())
    assert one_event(pool).result.observation is not None
    assert pool.wait(1, 0.1) == []


def test_simulator_that_hangs_takes_its_process_along(make_scripted):
    pool = make_scripted(3, 1, step_timeout=4.0)
    pid = pool.process_ids[0]
    tell(pool, 2, Order.HANG)
    time.sleep(0.5)
    tell(pool, 0, Order.HANG)
    first, second = collect(pool, 2)
    ended = "simulator process was ended: slot 2 gave no answer within 4 s"
    assert (first.failure, second.failure) == (ended, "no answer within 4 s")
    assert_ends(pid)
    tell(pool, 1, Order.PLAY)
    assert one_event(pool).failure == ended


def test_simulator_that_cannot_be_closed_costs_its_process(make_scripted):
    pool = make_scripted(2, 1)
    pid = pool.process_ids[0]
    tell(pool, 1, Order.HANG)
    tell(pool, 0, Order.RAISE_AND_STICK)
    broken, neighbour = collect(pool, 2)
    assert "the simulator raises" in broken.failure
    assert "the simulator is stuck" in broken.failure
    assert "slot 0 could not close its simulator" in neighbour.failure
    assert_ends(pid)
    pool.begin(0, episode())
    assert one_event(pool).result.observation.state.tolist() == [0, 0]


def test_process_that_became_unfit_over_an_abandoned_request_is_not_kept(make_scripted):
    pool = make_scripted(1, 1)
    pid = pool.process_ids[0]
    tell(pool, 0, Order.RAISE_AND_STICK)
    pool.begin(0, episode())
    assert "slot 0 could not close its simulator" in one_event(pool).failure
    assert_ends(pid)


def test_worn_out_process_is_left_slot_by_slot(make_scripted, tmp_path):
    pool = make_scripted(2, 1, recycle_after=1, fault_dir=str(tmp_path))
    old = pool.process_ids[0]
    tell(pool, 1, Order.NAP)
    pool.begin(0, episode())
    moved = one_event(pool)  # while slot 1 is in the middle of a chunk
    assert moved.slot == 0
    assert pool.process_ids[0] != pool.process_ids[1] == old
    assert one_event(pool).result.observation.state[1] == 1
    assert played(pool, 1)[1] == 2
    pool.begin(1, episode())
    assert one_event(pool).slot == 1
    assert pool.process_ids[0] == pool.process_ids[1]
    while Path(f"/proc/{old}").exists():
        played(pool, 1)
    assert len(list(tmp_path.glob(f"closed-{old}-*"))) == 2


def test_nothing_is_left_behind(make_pool):
    pool = make_pool()
    for slot in (0, 1):
        pool.begin(slot, episode())
    collect(pool, 2)
    pids = list(pool.process_ids.values())
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_close_does_not_wait_for_a_simulator_that_is_busy(make_scripted, tmp_path):
    pool = make_scripted(3, 1, fault_dir=str(tmp_path))
    pid = pool.process_ids[0]
    tell(pool, 1, Order.HANG)
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 5.0
    assert_ends(pid)
    assert len(list(tmp_path.iterdir())) == 2


def test_processes_die_with_their_engine():
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from {Path(__file__).stem} import *\n"
        "pool = make_scripted_pool(2, 1)\n"
        "pool.begin(0, episode())\n"
        "one_event(pool)\n"
        "pool.begin(1, episode(task=Order.HANG))\n"
        "print(pool.process_ids[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    engine = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, timeout=60.0
    )
    assert engine.returncode == -signal.SIGKILL, engine.stderr
    assert_ends(int(engine.stdout))


def test_user_error_of_a_simulator_reaches_the_user(tmp_path: Path):
    (tmp_path / "refusing_simulator.py").write_text(
        "from vlactl.errors import IntegrityError\n"
        "def make(config, context):\n"
        "    raise IntegrityError('states.npz is damaged', hint='install it again')\n"
    )
    config = ToyEnvConfig()
    pool = SimulatorPool(
        "refusing_simulator:make",
        config,
        EnvContext(num_slots=2, cameras=()),
        make_spec(config),
        {"PYTHONPATH": str(tmp_path)},
        num_processes=1,
    )
    pool.begin(0, episode())
    with pytest.raises(IntegrityError, match=r"states\.npz is damaged"):
        pool.wait(1, 20.0)
    pool.close()
