"""LIBERO's tasks as files name them, versions, renderers and `doctor`: no simulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from pydantic import ValidationError
from vlactl_libero import checks, environment, rendering, tasks
from vlactl_libero.plugin import DEFAULT_MAX_EPISODE_STEPS, SUITES, LiberoConfig, base_suite
from vlactl_libero.rendering import Graphics

from vlactl.api.contracts import EnvContext
from vlactl.errors import ConfigError, EnvironmentNotReadyError

LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")
BOTH = Graphics(
    errors={"libOSMesa.so.8": "", "libOSMesa.so.6": "absent", "libEGL.so.1": ""}, egl_devices=[-1]
)
GPUS = Graphics(errors=BOTH.errors, egl_devices=[1, 0, -1])
NO_OSMESA = Graphics(
    errors={"libOSMesa.so.8": "gone", "libOSMesa.so.6": "gone", "libEGL.so.1": ""},
    egl_devices=[-1],
)
NOTHING = Graphics(
    errors={"libOSMesa.so.8": "gone", "libOSMesa.so.6": "gone", "libEGL.so.1": "no EGL"},
    egl_devices=[],
)
DUMP_BENCHMARK = """
import json, sys
from libero.libero import benchmark
suites = {}
for name in sys.argv[1:]:
    suite = benchmark.get_benchmark(name)()
    suites[name] = [
        [
            task.name,
            task.language,
            suite.get_task_bddl_file_path(i),
            len(suite.get_task_init_states(i)),
        ]
        for i, task in enumerate(suite.tasks)
    ]
print()
print(json.dumps(suites))
"""


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The tasks as LIBERO's own code lists them."""
    variables = {**os.environ, "LIBERO_CONFIG_PATH": str(tmp_path_factory.mktemp("libero"))}
    done = subprocess.run(
        [sys.executable, "-c", DUMP_BENCHMARK, *LIBERO_SUITES],
        capture_output=True,
        text=True,
        check=True,
        env=variables,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("suite", LIBERO_SUITES)
def test_tasks_are_those_of_the_benchmark_in_its_order(benchmark, suite):
    spec = tasks.make_spec(LiberoConfig(suite=suite))
    ours = [
        [task.name, task.instruction, files.bddl_file, task.num_trials]
        for task, files in zip(spec.tasks, tasks.suite_tasks(suite), strict=True)
    ]
    theirs = benchmark[suite]
    assert [task[:2] + task[3:] for task in ours] == [task[:2] + task[3:] for task in theirs]
    assert all(a[2].samefile(b[2]) for a, b in zip(ours, theirs, strict=True))


def test_libero_130_is_all_suites_in_order(benchmark):
    spec = tasks.make_spec(LiberoConfig(suite="libero_130"))
    names = [task[0] for suite in LIBERO_SUITES for task in benchmark[suite]]
    assert [task.name for task in spec.tasks] == names
    assert len(set(names)) == 130
    assert sum(task.num_trials for task in spec.tasks) == 6500


@pytest.mark.parametrize("suite", SUITES)
def test_spec(suite):
    spec = tasks.make_spec(LiberoConfig(suite=suite, image_size=64))
    assert spec.cameras == {"agentview": (64, 64), "wrist": (64, 64)}
    assert (spec.state_dim, spec.action_dim, spec.control_hz) == (8, 7, 20)
    assert spec.max_episode_steps == DEFAULT_MAX_EPISODE_STEPS[suite]
    assert [task.index for task in spec.tasks] == list(range(len(spec.tasks)))


def test_sampled_states_come_after_the_official_ones_and_are_not_evaluated():
    for suite, official in (("libero_spatial", 50), ("libero_goal_with_milk", 10)):
        plain = tasks.make_spec(LiberoConfig(suite=suite)).tasks
        more = tasks.make_spec(LiberoConfig(suite=suite, sampled_trials=1000)).tasks
        assert {task.num_trials for task in plain} == {official}
        assert {task.num_trials for task in more} == {official + 1000}
        assert {task.eval_trials for task in (*plain, *more)} == {range(official)}


# --------------------------------------------------------------------------------------------
# LIBERO-PRO
# --------------------------------------------------------------------------------------------
def test_complete_perturbed_suites():
    """Those that the package's own audit, `libero-pro list`, finds complete."""
    variants = {
        "libero_spatial": {"with_milk", "with_mug", "with_yellow_book"},
        "libero_object": {"two_normal_episodes", "with_mug", "with_yellow_book"},
        "libero_goal": {"with_milk", "with_mug", "with_yellow_book"},
        "libero_10": {"with_mug"},
    }
    assert set(tasks.perturbed_suites()) == {
        f"{suite}_{perturbation}"
        for suite, others in variants.items()
        for perturbation in {"lan", "object", "swap", "task"} | others
    }


@pytest.mark.parametrize("name", tasks.perturbed_suites())
def test_every_complete_perturbed_suite_can_be_planned(name):
    base = base_suite(name)
    spec = tasks.make_spec(LiberoConfig(suite=name))
    assert spec == tasks.make_spec(
        LiberoConfig(suite=base, perturbation=name.removeprefix(f"{base}_"))
    )
    assert spec.max_episode_steps == DEFAULT_MAX_EPISODE_STEPS[base]
    assert len(spec.tasks) == (2 if "two_normal" in name else 10)
    for task, files in zip(spec.tasks, tasks.suite_tasks(name), strict=True):
        assert task.num_trials in (10, 50)
        assert task.instruction == task.instruction.lower().strip() != ""
        assert files.bddl_file.is_file()


@pytest.mark.parametrize(
    ("suite", "index", "instruction"),
    [
        ("libero_goal", 0, "open the middle drawer of the cabinet"),
        ("libero_goal_task", 0, "open the bottom drawer of the cabinet"),
        ("libero_goal_lan", 1, "place the bowl on the stove"),
        (
            "libero_spatial_swap",
            1,
            "pick the akita black bowl next to the ramekin and place it on the plate",
        ),
        ("libero_10_swap", 8, "put both moka pots on the stove"),
    ],
)
def test_perturbed_suites_say_what_their_files_say(suite, index, instruction):
    assert tasks.suite_tasks(suite)[index].instruction == instruction


def test_languages_and_tasks_are_perturbed_all_over():
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        plain = [task.instruction for task in tasks.suite_tasks(suite)]
        for perturbation in ("lan", "task"):
            perturbed = tasks.suite_tasks(f"{suite}_{perturbation}")
            assert not set(plain) & {task.instruction for task in perturbed[:1]}
            assert [task.name for task in perturbed] == [
                task.name for task in tasks.suite_tasks(suite)
            ]


@pytest.mark.parametrize(
    ("suite", "problem"),
    [
        ("libero_spatial_swp", 'no suite "libero_spatial_swp"'),
        ("libero_goal_env", "is not defined"),
        ("libero_10_with_milk", "no readable initial states"),
        ("libero_object_with_trigger", "no readable initial states"),
        ("libero_goal_with_red_box", "no model of red_box"),
        ("libero_object_with_red_stick", "no model of red_sticker"),
    ],
)
def test_incomplete_perturbed_suites_say_what_is_missing(suite, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        tasks.make_spec(LiberoConfig(suite=suite))
    assert "lan, object, swap, task" in caught.value.hint


def test_a_misspelt_perturbation_is_guessed():
    with pytest.raises(ConfigError) as caught:
        tasks.make_spec(LiberoConfig(suite="libero_goal", perturbation="swpa"))
    assert 'did you mean "swap"?' in caught.value.hint


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"suite": "libero_spatail"}, 'did you mean "libero_spatial"'),
        ({"suite": "libero_90", "perturbation": "swap"}, "libero_90 cannot be perturbed"),
        ({"suite": "libero_goal_swap", "perturbation": "lan"}, "cannot be perturbed"),
        ({"backend": "stock", "slots_per_process": 2}, "a process of its own"),
    ],
)
def test_impossible_configurations_are_refused_without_libero(values, problem):
    with pytest.raises(ValidationError, match=problem):
        LiberoConfig(**values)


def test_spelling_of_suites_is_free():
    config = LiberoConfig(suite="LIBERO-Spatial", perturbation="With-Mug")
    assert config.full_suite == "libero_spatial_with_mug"
    assert LiberoConfig(suite="libero-130", perturbation="none").full_suite == "libero_130"


@pytest.mark.parametrize(
    ("interesting", "expected"), [(["plate_1", "bowl_1"], "plate_1"), ([], "bowl_1")]
)
def test_name_of_interest(interesting, expected):
    goal = [["on", "bowl_1", "plate_1"], ["close", "drawer_1"]]
    problem = {"obj_of_interest": interesting, "goal_state": goal}
    assert tasks.name_of_interest(problem) == expected


def test_joined_suites_are_numbered_through():
    together = LiberoConfig(suite="libero-spatial+libero-object")
    parts = [LiberoConfig(suite=suite) for suite in ("libero_spatial", "libero_object")]
    names = [task.name for config in parts for task in tasks.make_spec(config).tasks]
    assert [task.name for task in tasks.make_spec(together).tasks] == names
    assert tasks.make_spec(together).max_episode_steps == 280
    with pytest.raises(ValidationError, match='unknown suite "libero_objekt"; did you mean'):
        LiberoConfig(suite="libero_spatial+libero_objekt")


def test_horizon_can_be_set():
    spec = tasks.make_spec(LiberoConfig(suite="libero_goal", max_episode_steps=12))
    assert spec.max_episode_steps == 12


def test_plan_side_imports_no_simulator():
    script = (
        "import sys\n"
        "from vlactl_libero import checks, environment, tasks\n"
        "from vlactl_libero.plugin import LiberoConfig\n"
        "tasks.make_spec(LiberoConfig()); checks.findings()\n"
        "print([m for m in ('torch', 'mujoco', 'robosuite', 'libero', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_without_libero_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:2])  # an editable finder would still know
    monkeypatch.delitem(sys.modules, "libero", raising=False)
    with pytest.raises(EnvironmentNotReadyError, match="not installed") as caught:
        tasks.package_root()
    assert 'pip install "vlactl[libero]"' in caught.value.hint


# --------------------------------------------------------------------------------------------
# Versions
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "version"), [("mujoco", "3.4.0"), ("robosuite", "1.5.1")])
def test_other_simulators_are_refused_unless_allowed(fake_distribution, name, version):
    fake_distribution(name, {}, {}, version=version)
    with pytest.raises(EnvironmentNotReadyError, match=f"{version} is installed") as caught:
        environment.check_versions(LiberoConfig())
    assert "env.allow_untested_versions" in caught.value.hint
    environment.check_versions(LiberoConfig(allow_untested_versions=True))


def test_unknown_camera_is_refused():
    with pytest.raises(ConfigError, match='no camera "front"'):
        environment.make_environment(
            LiberoConfig(), EnvContext(num_slots=1, cameras=("agentview", "front"))
        )


# --------------------------------------------------------------------------------------------
# Renderers
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("renderer", "device_index", "graphics", "chosen"),
    [
        ("auto", -1, BOTH, "osmesa"),
        ("auto", -1, NO_OSMESA, "egl"),
        ("auto", 0, GPUS, "egl"),
        ("osmesa", 0, GPUS, "osmesa"),
        ("egl", -1, BOTH, "egl"),
    ],
)
def test_renderer(renderer, device_index, graphics, chosen):
    assert rendering.choose(LiberoConfig(renderer=renderer), device_index, graphics) == chosen


@pytest.mark.parametrize(
    ("renderer", "device_index", "graphics", "problem", "fix"),
    [
        ("auto", -1, NOTHING, "osmesa: gone", "apt-get install libosmesa6"),
        ("auto", 0, NOTHING, "egl: no EGL", "apt-get install libegl1 libgl1"),
        ("osmesa", 0, NO_OSMESA, "osmesa: gone", "apt-get install libosmesa6"),
    ],
)
def test_missing_renderer_names_the_package(renderer, device_index, graphics, problem, fix):
    with pytest.raises(EnvironmentNotReadyError, match=problem) as caught:
        rendering.choose(LiberoConfig(renderer=renderer), device_index, graphics)
    assert fix in caught.value.hint


@pytest.mark.parametrize(("device_index", "egl_index"), [(0, "1"), (1, "0"), (-1, "2")])
def test_egl_renders_on_the_gpu_that_cuda_numbers(device_index, egl_index):
    variables = rendering.variables("egl", device_index, GPUS)
    assert variables["MUJOCO_EGL_DEVICE_ID"] == egl_index
    # robosuite refuses to start when the device is not among the visible ones.
    assert variables["CUDA_VISIBLE_DEVICES"] == egl_index


def test_egl_without_the_gpu_says_so():
    with pytest.raises(EnvironmentNotReadyError, match="no device for GPU 0"):
        rendering.variables("egl", 0, BOTH)


def test_osmesa_leaves_devices_alone():
    assert rendering.variables("osmesa", 3, GPUS) == {
        "MUJOCO_GL": "osmesa",
        "PYOPENGL_PLATFORM": "osmesa",
    }


def test_probe_tells_what_loads():
    graphics = rendering.probe("libc.so.6", "libnot-there.so.1")
    assert graphics.errors["libc.so.6"] == ""
    assert "libnot-there.so.1" in graphics.errors["libnot-there.so.1"]


def test_simulators_never_read_a_config_of_libero():
    variables = environment.simulator_variables(LiberoConfig(), -1)
    assert not os.path.exists(os.path.join(variables["LIBERO_CONFIG_PATH"], "config.yaml"))


# --------------------------------------------------------------------------------------------
# Doctor
# --------------------------------------------------------------------------------------------
def test_doctor_counts_the_tasks():
    found = {finding.subject: finding for finding in checks.findings()}
    assert found["LIBERO tasks"].level == "ok"
    assert found["LIBERO tasks"].detail == "130 of 130"
    assert found["LIBERO-PRO"].detail == "26 complete suites"
    assert found["renderer osmesa"].level in ("ok", "warn")


def test_doctor_fails_on_another_mujoco(fake_distribution):
    fake_distribution("mujoco", {}, {}, version="3.9.0")
    failed = [finding for finding in checks.findings() if finding.level == "FAIL"]
    assert [finding.subject for finding in failed] == ["mujoco 3.9.0"]
    assert "libero_spatial task 5" in failed[0].detail
    assert failed[0].fix == 'pip install "mujoco>=3.3,<3.4"'


def test_doctor_warns_of_stale_configs(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    stale = tmp_path / ".libero" / "config.yaml"
    stale.parent.mkdir()
    stale.write_text("assets: /nowhere\n")
    warnings = [finding for finding in checks.findings() if finding.subject == "libero config"]
    assert [finding.level for finding in warnings] == ["warn"]
    assert str(stale) in warnings[0].detail
