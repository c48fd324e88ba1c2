"""Which ranks count as hung, without processes: the rules, second by second."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from vlactl.launch.hangs import Hang, HangWatch, Patience
from vlactl.launch.status import Beat

Story = Callable[[int, int], Beat]
PATIENCE = Patience(hang_timeout=50, saving=300)


def beat(rank: int, second: int, **changes: object) -> Beat:
    """Of a rank that is fine: both counters move."""
    fine = Beat(
        rank=rank,
        pid=1,
        phase="rollout",
        step=2,
        done=0,
        total=0,
        count=second,
        alive=second,
    )
    return replace(fine, **changes)


def watch(story: Story, seconds: int, num_ranks: int = 2) -> tuple[int, Hang] | None:
    """When ranks that behave like `story(rank, second)` are called hung, and how."""
    hangs = HangWatch(num_ranks, PATIENCE)
    for second in range(seconds):
        if hang := hangs.look([story(rank, second) for rank in range(num_ranks)], 1000.0 + second):
            return second, hang
    return None


def test_ranks_that_move_are_fine() -> None:
    assert watch(beat, 2000) is None


def test_a_rank_that_does_nothing_is_named_and_one_that_waits_for_it_is_not() -> None:
    def story(rank: int, second: int) -> Beat:
        return beat(rank, second, count=7, waiting=rank == 0)

    second, hang = watch(story, 100)
    assert (second, hang.ranks, hang.reason) == (51, (1,), "no progress for 50 s")
    assert "train.hang_timeout" in hang.advice


def test_a_stopped_process_is_named_in_any_phase_and_state() -> None:
    def story(rank: int, second: int) -> Beat:
        stopped = {"alive": 3, "count": 3, "waiting": True, "phase": "checkpoint"}
        return beat(rank, second, **(stopped if rank == 1 else {}))

    second, hang = watch(story, 100)
    assert (second, hang.ranks, hang.reason) == (46, (1,), "no sign of life for 45 s")


def test_ranks_that_wait_for_each_other() -> None:
    def story(rank: int, second: int) -> Beat:
        return beat(rank, second, count=7, waiting=True, phase="update")

    reason = "all ranks wait for each other since 50 s"
    assert watch(story, 100) == (51, Hang(ranks=(0, 1), reason=reason))


@pytest.mark.parametrize("phase", ["start", "checkpoint"])
def test_starting_and_saving_take_their_time(phase: str) -> None:
    def story(rank: int, second: int) -> Beat:
        return beat(rank, second, count=0, phase=phase)

    found = watch(story, 700)
    assert found is not None
    assert found[0] == 601


def test_saving_may_take_as_long_as_the_configuration_says() -> None:
    assert Patience(hang_timeout=50, saving=900).of("checkpoint") == 900
    assert Patience(hang_timeout=1200, saving=900).of("checkpoint") == 1200
    assert Patience(hang_timeout=50, saving=900).of("update") == 50


def test_the_clock_of_own_work_starts_when_the_others_have_let_a_rank_go() -> None:
    def story(rank: int, second: int) -> Beat:
        return beat(rank, second, count=second // 90, waiting=second % 90 < 45)

    assert watch(story, 400) is None


def test_a_rank_that_is_done_waits_for_nobody() -> None:
    def story(rank: int, second: int) -> Beat:
        gone = {"left": True, "alive": 9, "count": 9}
        return beat(rank, second, **(gone if rank == 0 else {}))

    assert watch(story, 300) is None


def test_processes_that_do_not_end() -> None:
    def story(rank: int, second: int) -> Beat:
        return beat(rank, second, left=True, alive=9, count=9)

    assert watch(story, 100) == (51, Hang(ranks=(0, 1), reason="the processes do not end"))


def test_ranks_that_never_report() -> None:
    hangs = HangWatch(3, PATIENCE)
    found = [hangs.look([beat(1, second)], second) for second in range(700)]
    assert found.index(Hang(ranks=(0, 2), reason="not started after 600 s")) == 601


def test_a_frozen_machine_is_not_a_hang() -> None:
    """The supervisor was held up as well: nobody could have made progress."""
    hangs = HangWatch(1, PATIENCE)
    assert hangs.look([beat(0, 1)], 0.0) is None
    assert hangs.look([beat(0, 1)], 3600.0) is None
    assert hangs.look([beat(0, 2)], 3601.0) is None
