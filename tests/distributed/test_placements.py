"""The same run in every placement: results do not depend on who plays, acts and trains."""

from collections.abc import Callable

import pytest

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
STEPS = "train.max_steps=5"
PLACEMENTS = {
    "shared on 2": (2, "all", "all", "all"),
    "shared on 4": (4, "all", "all", "all"),
    "two env processes per rank": (2, "0-1:0-3", "all", "all"),
    "hybrid on 2": (2, "0", "1", "0-1"),
    "hybrid on 4": (4, "0-1", "2-3", "0-3"),
    "separate on 3": (3, "0", "1", "2"),
    "separate on 4": (4, "0", "1", "2-3"),
    "more rollout than env ranks": (3, "0", "1-2", "0"),
    "actors are some of the rollout ranks": (4, "0-1", "2-3", "2"),
}


@pytest.fixture(scope="module")
def reference(train: Callable):
    return train(STEPS)


def place(env: str, rollout: str, actor: str) -> list[str]:
    return [f"placement.env={env}", f"placement.rollout={rollout}", f"placement.actor={actor}"]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placement_does_not_matter(
    name: str, train: Callable, reference, same_results: Callable
) -> None:
    ranks, *roles = PLACEMENTS[name]
    run = train(STEPS, "rollout.pipeline_stages=1", *place(*roles), ranks=ranks)
    same_results(reference, run)
