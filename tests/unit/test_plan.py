"""Plan arithmetic: tables of what comes out even, and messages for what does not."""

from pathlib import Path

import pytest

from vlactl.config.compose import compose
from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError, EnvironmentNotReadyError
from vlactl.launch.arithmetic import nearest_divisors, nearest_multiples
from vlactl.launch.hardware import GIB, Gpu, Hardware, detect, parse_gpus, suppose_gpus
from vlactl.launch.plan import Plan, describe, make_plan, plan_evaluation

CPU = Hardware(cores=16, ram_bytes=64 * GIB)


def gpus(count: int) -> Hardware:
    return suppose_gpus(CPU, count)


# 64 episodes = 8 groups x 8, 4 chunks each, 4 simulators, 2 optimizer steps of 128 samples
SUMS = (
    "env.num_envs=4",
    "env.max_episode_steps=16",
    "env.num_tasks=4",
    "env.num_trials=8",
    "model.chunk_length=4",
    "algorithm.group_size=8",
    "rollout.episodes_per_step=64",
    "optim.global_batch_size=128",
    "optim.update_epochs=1",
)


def toy(*overrides: str) -> RunConfig:
    return compose("toy_grpo", [*SUMS, *overrides]).config


@pytest.mark.parametrize(("ranks", "slots", "threads"), [(1, 4, 16), (2, 2, 8), (4, 1, 4)])
def test_shares_of_ranks(ranks: int, slots: int, threads: int) -> None:
    plan = make_plan(toy(), CPU, gpus=ranks)
    everyone = tuple(range(ranks))
    assert plan.roles == {"actor": everyone, "rollout": everyone, "env": everyone}
    assert (plan.world_size, plan.device) == (ranks, "cpu")
    assert plan.slots_per_env_rank == slots
    assert plan.inference_batch_size == 4  # whatever the number of ranks
    assert (plan.num_groups, plan.group_size, plan.episodes_per_step) == (8, 8, 64)
    assert (plan.max_episode_steps, plan.chunk_length, plan.chunks_per_episode) == (16, 4, 4)
    assert (plan.samples_per_step, plan.optimizer_steps) == (256, 2)
    assert plan.threads_per_rank == threads
    assert plan.environment == {"OMP_NUM_THREADS": str(threads)}
    assert plan.blockers == ()


def test_last_chunk_may_be_cut_short() -> None:
    overrides = ["env.max_episode_steps=18", "optim.global_batch_size=160"]
    plan = make_plan(toy(*overrides), CPU, gpus=1)
    assert (plan.chunks_per_episode, plan.samples_per_step, plan.optimizer_steps) == (5, 320, 2)


def test_all_passes_over_the_samples_count() -> None:
    assert make_plan(toy("optim.update_epochs=3"), CPU, gpus=1).optimizer_steps == 6


@pytest.mark.parametrize(
    ("overrides", "ranks", "message", "hint"),
    [
        (
            ["rollout.episodes_per_step=60"],
            1,
            "rollout.episodes_per_step = 60 is not a multiple of algorithm.group_size = 8: "
            "60 = 7 x 8 + 4",
            "nearest rollout.episodes_per_step: 56 or 64",
        ),
        (
            ["env.num_envs=12"],
            3,
            "8 groups (64 episodes / group size 8) cannot be shared by 3 env ranks: 8 = 2 x 3 + 2",
            "nearest rollout.episodes_per_step: 48 or 72; or use 2 or 4 devices",
        ),
        (
            ["env.num_envs=6"],
            4,
            "env.num_envs = 6 is not a multiple of env ranks = 4: 6 = 1 x 4 + 2",
            "nearest env.num_envs: 4 or 8; or use 2 devices",
        ),
        (
            ["rollout.pipeline_stages=3"],
            1,
            "env.num_envs = 4 is not a multiple of env ranks x rollout.pipeline_stages = 3: "
            "4 = 1 x 3 + 1",
            "nearest env.num_envs: 3 or 6",
        ),
        (
            ["optim.global_batch_size=100"],
            1,
            "optim.global_batch_size = 100 does not divide the 256 samples of a step "
            "(64 episodes x 4 chunks): 256 = 2 x 100 + 56",
            "nearest: 64 or 128",
        ),
        (
            ["optim.global_batch_size=2"],
            4,
            "optim.global_batch_size = 2 cannot be shared by 4 actor ranks: 2 = 0 x 4 + 2",
            "nearest: 4",
        ),
    ],
)
def test_sums_that_do_not_come_out(
    overrides: list[str], ranks: int, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(toy(*overrides), CPU, gpus=ranks)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_nearest_values() -> None:
    assert nearest_multiples(5, 8) == (8,)
    assert nearest_multiples(60, 8) == (56, 64)
    assert nearest_divisors(100, 256) == (64, 128)
    assert nearest_divisors(1, 256, 4) == (4,)
    assert nearest_divisors(3, 0) == ()


def test_more_gpus_than_visible() -> None:
    two = Hardware(
        cores=8,
        ram_bytes=GIB,
        gpus=tuple(Gpu(index=index, name="x", memory_bytes=80 * GIB) for index in (2, 3)),
    )
    with pytest.raises(ConfigError, match=r"--gpus 4: only 2 visible: 2-3"):
        make_plan(toy(), two, gpus=4)
    with pytest.raises(ConfigError, match="at least 1"):
        make_plan(toy(), two, gpus=0)
    assert make_plan(toy(), two, gpus=None).world_size == 2


def test_more_cpu_ranks_than_cores() -> None:
    with pytest.raises(ConfigError, match="32 CPU ranks need 32 cores; this machine has 16"):
        make_plan(toy(), CPU, gpus=32)
    assert make_plan(toy(), CPU, gpus=None).world_size == 1


FORMS = {
    "shared": {},
    "hybrid": {"env": "0-1", "rollout": "2-3", "actor": "0-3"},
    "separate": {"env": "0", "rollout": "1", "actor": "2-3"},
    "separate from both": {"env": "0-1", "rollout": "0-1", "actor": "2-3"},
}


def placed(**roles: str) -> list[str]:
    return [f"placement.{role}={devices}" for role, devices in roles.items()]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_placement(form: str) -> None:
    plan = make_plan(toy(*placed(**FORMS[form])), gpus(4), gpus=4)
    assert plan.world_size == 4
    assert plan.blockers == ()
    assert f"   {form.split()[0]} on cuda" in describe(plan, Path("runs/x"))[0]


def test_ranks_of_roles_apart() -> None:
    plan = make_plan(toy(*placed(**FORMS["hybrid"])), gpus(4), gpus=4)
    assert plan.roles == {"actor": (0, 1, 2, 3), "rollout": (2, 3), "env": (0, 1)}
    assert describe(plan, Path("runs/x"))[1:3] == [
        "ranks     0-1 on devices 0-1: actor + env",
        "ranks     2-3 on devices 2-3: actor + rollout",
    ]


def test_devices_that_nobody_uses_have_no_rank() -> None:
    unused = placed(env="2-3", rollout="2-3", actor="2-3")
    plan = make_plan(toy(*unused), gpus(4), gpus=4)
    assert (plan.world_size, plan.devices) == (2, (2, 3))


def test_several_machines_number_devices_through() -> None:
    plan = make_plan(toy(*placed(env="0-1", rollout="2-3")), gpus(2), gpus=2, nodes=2)
    assert (plan.nodes, plan.world_size, plan.devices) == (2, 4, (0, 1, 0, 1))
    lines = describe(plan, Path("runs/x"))
    assert "hybrid on cuda, 2 machines" in lines[0]
    assert lines[2] == "ranks     2-3 on devices 0-1 of node 1: actor + rollout"
    assert any("--nproc-per-node 2 " in line for line in lines)
    assert plan.threads_per_rank == 16  # of each machine's 32 cores


def test_machines_need_equal_numbers_of_ranks() -> None:
    uneven = toy(*placed(env="0-2", rollout="0-2", actor="0-2"))
    with pytest.raises(ConfigError, match="2 machines: node 0 2, node 1 1"):
        make_plan(uneven, gpus(2), gpus=2, nodes=2)


def test_several_env_processes_on_a_device() -> None:
    plan = make_plan(toy('placement.env="0-1:0-3"'), gpus(2), gpus=2)
    assert plan.roles["env"] == (0, 0, 1, 1)
    assert plan.slots_per_env_rank == 1
    assert "env 0-1 x 2 (1 simulators each)" in describe(plan, Path("runs/x"))[0]
    with pytest.raises(ConfigError, match=r"cannot be shared by 16 env processes"):
        make_plan(toy('placement.env="0-1:0-15"', "env.num_envs=16"), gpus(2), gpus=2)


def test_an_env_process_with_several_devices_lives_on_the_first() -> None:
    plan = make_plan(toy('placement.env="0-3:0-1"', *placed(rollout="0,2")), gpus(4), gpus=4)
    assert plan.roles["env"] == plan.roles["rollout"] == (0, 2)
    assert any(note.endswith("live on the first: 0,2") for note in plan.notes)


@pytest.mark.parametrize(
    ("roles", "message", "hint"),
    [
        (
            {"actor": '"0-1:0-3"'},
            "several actor processes share device 0",
            'placement.actor = "0-1"',
        ),
        (
            {"rollout": '"0-3:0-1"'},
            "rollout processes own several devices",
            'placement.rollout = "0-3"',
        ),
        (
            {"env": "0-1", "rollout": "0-3"},
            r"\(ranks 0-1\) and placement.rollout \(ranks 0-3\) share some ranks",
            "the same devices, or disjoint ones",
        ),
        (
            {"env": "0-1", "rollout": "2-4"},
            "2 env ranks and 3 rollout ranks cannot be paired: 3 = 1 x 2 \\+ 1",
            "a multiple of the other",
        ),
    ],
)
def test_placements_that_cannot_work(roles: dict[str, str], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_plan(toy(*placed(**roles)), gpus(8), gpus=8)
    assert hint in caught.value.hint


def test_rollouts_that_lag_behind_need_actors_of_their_own() -> None:
    with pytest.raises(ConfigError, match="ranks 0-3 do both") as caught:
        make_plan(toy("train.staleness=1"), gpus(4), gpus=4)
    assert "placement.actor" in caught.value.hint
    apart = ["train.staleness=1", *placed(**FORMS["separate from both"])]
    assert make_plan(toy(*apart), gpus(4), gpus=4).blockers == ()


def test_eight_bit_optimizers_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy("optim.optimizer=adamw8bit")
    assert make_plan(config, gpus(1), gpus=1).blockers == ()
    monkeypatch.setattr("vlactl.launch.plan.find_spec", lambda name: None)
    (blocker,) = make_plan(config, gpus(1), gpus=1).blockers
    assert 'pip install "vlactl[quantization]"' in blocker


@pytest.mark.parametrize(
    "roles", [{"env": "0-2", "actor": "2-3"}, {"rollout": "0-1", "env": "1-2"}]
)
def test_roles_that_overlap_half_way(roles: dict[str, str]) -> None:
    overrides = [f"placement.{role}={devices}" for role, devices in roles.items()]
    with pytest.raises(ConfigError, match="overlap half-way") as caught:
        make_plan(toy(*overrides), gpus(4), gpus=4)
    assert "visible devices: 0-3" in caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["rollout.tasks=[1, 9]"], "rollout.tasks: there is no 9"),
        (["rollout.trials=0-8"], "rollout.trials: there is no 8"),
        (["eval.trials=0-11"], "eval.trials: there is no 8-11"),
        (['model.cameras=["behind"]'], 'no camera "behind"'),
    ],
)
def test_names_that_the_environment_does_not_have(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_plan(toy(*overrides), CPU, gpus=1)


def test_lanes_are_for_algorithms_that_compare_no_episodes() -> None:
    with pytest.raises(ConfigError, match="grpo compares whole episodes"):
        make_plan(toy("rollout.auto_reset=true"), CPU, gpus=1)
    make_plan(compose("toy_ppo").config, CPU, gpus=1)


def test_more_groups_wanted_than_a_step_has() -> None:
    with pytest.raises(ConfigError, match="min_groups = 9: a step has 8 groups") as caught:
        make_plan(toy("rollout.min_groups=9"), CPU, gpus=1)
    assert caught.value.hint == "at most 8"


def test_a_warm_up_without_an_end() -> None:
    config = compose("toy_ppo", ["algorithm.critic_warmup_steps=20"]).config
    (note,) = make_plan(config, CPU, gpus=1).notes
    assert note.startswith("the policy is not trained: the critic is warmed up for 20 steps")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optim.value_lr=1"], "optim.value_lr"),
        (["lora.alpha=4"], "lora.alpha"),
        (["lora.targets=published"], "lora.targets"),
        (["eval.greedy=true", "eval.top_k=3"], "eval.top_k"),
    ],
)
def test_keys_that_change_nothing_are_told(overrides: list[str], key: str) -> None:
    (note,) = make_plan(toy(*overrides), CPU, gpus=1).notes
    assert key in note
    assert "no effect" in note


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        ([], False),  # the benchmark's usual protocol
        (["env.sampled_trials=10"], True),
        (["env.sampled_trials=10", "rollout.trials=50-59"], False),
        (["env.sampled_trials=10", "rollout.trials=45-59", "eval.trials=0-39"], False),
        (["env.sampled_trials=10", "rollout.trials=50-59", "eval.trials=55-59"], True),
    ],
)
def test_states_used_twice_are_told(overrides: list[str], is_told: bool) -> None:
    all_states = ["rollout.trials=none", "eval.trials=none"]
    config = compose("libero_spatial_tiny_grpo", [*all_states, *overrides]).config
    notes = make_plan(config, CPU, gpus=1).notes
    assert any("initial states that evaluations use" in note for note in notes) == is_told


def test_an_adapter_to_start_from_needs_a_rank_and_a_directory() -> None:
    blockers = make_plan(toy("lora.adapter=nowhere"), CPU, gpus=1).blockers
    assert [line.partition(":")[0] for line in blockers] == [
        "lora.adapter is set, but lora.rank is 0",
        "lora.adapter",
    ]


def test_plan_survives_json() -> None:
    plan = make_plan(toy(), gpus(4), gpus=4)
    assert Plan.from_json(plan.to_json()) == plan


def test_evaluation_shares_whatever_there_is() -> None:
    plan = plan_evaluation(toy(), CPU, gpus=3, num_episodes=10)
    assert (plan.world_size, plan.slots_per_env_rank, plan.episodes_per_step) == (3, 1, 10)
    assert plan_evaluation(toy(), CPU, gpus=3, num_episodes=1).world_size == 1


@pytest.fixture
def ghost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment whose descriptor is installed, and whose package is not."""
    (tmp_path / "ghost.py").write_text(
        "from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin\n"
        "class Config(EnvironmentConfig):\n"
        "    max_episode_steps: int | None = None\n"
        "PLUGIN = EnvironmentPlugin(name='ghost', summary='', config=Config, api_version=1,\n"
        "                           factory='ghost_body:make', spec='ghost_body:make_spec')\n"
    )
    info = tmp_path / "ghost-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ghost\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlactl.environments]\nghost = ghost:PLUGIN\n")
    monkeypatch.syspath_prepend(tmp_path)
    preset = tmp_path / "ghost.toml"
    preset.write_text(
        "[env]\nname = 'ghost'\n[model]\nname = 'toy'\nchunk_length = 4\n"
        "[algorithm]\nname = 'grpo'\n[optim]\nglobal_batch_size = 64\n"
    )
    return str(preset)


def test_horizon_without_the_environments_package(ghost: str) -> None:
    plan = make_plan(compose(ghost, ["env.max_episode_steps=16"]).config, CPU, gpus=1)
    assert plan.max_episode_steps == 16
    assert plan.notes == ('episode length from the preset: "ghost" is not installed',)
    with pytest.raises(EnvironmentNotReadyError, match="episode length is unknown"):
        make_plan(compose(ghost).config, CPU, gpus=1)


def test_gpus_as_nvidia_smi_lists_them() -> None:
    listing = "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559\n1, GPU-bb, Orin, [N/A]\nNo devices\n"
    first, second = parse_gpus(listing)
    assert (first.index, first.name, first.memory_bytes) == (
        0,
        "NVIDIA H100 80GB HBM3",
        81559 * 2**20,
    )
    assert second.memory_bytes > 0


@pytest.mark.parametrize(
    ("setting", "names"),
    [("1", ["b"]), ("1,0", ["b", "a"]), ("", []), ("0,-1,1", ["a"]), ("GPU-b", ["b"]), ("7", [])],
)
def test_visible_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, names: list[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-aa, a, 100'\necho '1, GPU-bb, b, 100'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert [gpu.name for gpu in detect().gpus] == names
