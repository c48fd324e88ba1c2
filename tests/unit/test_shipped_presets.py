"""Every shipped preset resolves, and its batch arithmetic closes."""

from __future__ import annotations

import re

import pytest

from vlactl.config import catalogue, presets
from vlactl.config.compose import compose
from vlactl.config.run import SupervisedConfig
from vlactl.errors import ConfigError
from vlactl.launch.describe import describe
from vlactl.launch.hardware import GIB, Gpu, Hardware, suppose_gpus
from vlactl.launch.plan import environment_spec, make_plan

NAMES = [preset.name for preset in presets.shipped() if preset.distribution == "vlactl"]
SUITES = ("spatial", "object", "goal", "10", "90", "130")
DEVICES = (1, 2, 4, 8, 16)
GPU = Gpu(index=0, name="GPU", memory_bytes=80 * 2**30)
UNNORM_KEYS = {suite: f"libero_{suite}_no_noops" for suite in SUITES[:4]} | {
    suite: f"libero_{suite}_no_noops_trajall" for suite in SUITES[4:]
}
ON_ONE_MACHINE = {
    "toy_grpo": (1, 2, 4),
    "toy_ppo": (1, 2, 4),
    "toy_rft": (1, 2, 4),
    "libero_spatial_tiny_ppo": (1, 2),
    "libero_spatial_tiny_rft": (1, 2),
    "libero_object_tiny_vla_demo": (1, 2),
} | {f"libero_{suite}_tiny_grpo": (1, 2) for suite in SUITES[:4]}
DEMONSTRATED = [
    name for name in NAMES if re.fullmatch(r"libero_\w+_(small|tiny_vla)_(grpo|ppo|rft)", name)
]
"""Start from what `vlactl sft` makes; one GPU is enough."""
ON_ONE_MACHINE |= dict.fromkeys(DEMONSTRATED, DEVICES)


def test_all_that_is_promised_is_there():
    promised = {
        f"libero_{suite}_{algorithm}{variant}"
        for suite in SUITES
        for algorithm in ("grpo", "ppo")
        for variant in ("", "_lora", "_qlora")
    }
    assert set(NAMES) == promised | ON_ONE_MACHINE.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_resolves_to_whole_batches(name):
    config = compose(name).config
    assert config.summary
    assert config.summary.isascii()
    rollout, optim, group_size = config.rollout, config.optim, config.algorithm.group_size
    chunks = -(-config.env.max_episode_steps // config.model.chunk_length)
    assert rollout.episodes_per_step % group_size == 0
    assert rollout.episodes_per_step * chunks % optim.global_batch_size == 0
    for devices in ON_ONE_MACHINE.get(name, DEVICES):
        assert rollout.episodes_per_step // group_size % devices == 0
        assert config.env.num_envs % devices == 0
        share = optim.global_batch_size // devices
        assert share * devices == optim.global_batch_size
        assert share % min(share, optim.micro_batch_size) == 0


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_a_preset_can_be_planned_or_says_why_not(name, devices, tmp_path):
    """For GPUs of 80 GB with the host memory and cores that are usual beside them."""
    config = compose(name, [f"model.path={tmp_path}"] * (name not in ON_ONE_MACHINE)).config
    hardware = suppose_gpus(Hardware(cores=2, ram_bytes=16 * GIB), min(devices, 8))
    if devices not in ON_ONE_MACHINE.get(name, DEVICES):
        with pytest.raises(ConfigError) as caught:
            make_plan(config, hardware, gpus=len(hardware.gpus), nodes=max(1, devices // 8))
        assert "\n" not in caught.value.message
        assert "nearest" in caught.value.hint
        return
    plan = make_plan(config, hardware, gpus=len(hardware.gpus), nodes=max(1, devices // 8))
    assert plan.world_size == devices
    assert all(line.isascii() for line in describe(plan, tmp_path))
    if devices < 4 and name not in ON_ONE_MACHINE and "lora" not in name:
        [blocker] = plan.blockers  # all weights of 7.5 billion need more than two GPUs
        assert "4 devices or lora.rank = 32" in blocker
    else:
        assert plan.blockers == ()


@pytest.mark.parametrize("suite", SUITES)
def test_full_size_presets_match_the_published_recipe(suite):
    config = compose(f"libero_{suite}_grpo").config
    assert config.env.suite == f"libero_{suite}"
    assert config.algorithm.group_size == 8
    assert (config.env.max_episode_steps, config.rollout.temperature) == (512, 1.6)
    assert (config.optim.lr, config.optim.global_batch_size) == (2e-5, 16384)
    assert config.rollout.episodes_per_step == (4096 if suite in {"90", "130"} else 1024)
    assert config.algorithm.dual_clip is None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_ONE_MACHINE])
def test_full_size_presets_wait_for_their_model_only(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path))
    config = compose(name).config
    assert catalogue.find(config.model.checkpoint)
    hardware = Hardware(cores=64, ram_bytes=2**41, gpus=(GPU,) * 8)
    [blocker] = make_plan(config, hardware, gpus=8).blockers
    assert f"vlactl download {config.model.checkpoint}" in blocker


@pytest.mark.parametrize("suite", SUITES)
def test_full_size_presets_speak_the_dialect_of_the_recipe(suite):
    model = compose(f"libero_{suite}_grpo").config.model
    assert (model.head, model.image_pipeline, model.keep_stop_token) == ("tokens", "rlinf", False)
    assert (model.cameras, model.unnorm_key) == (("agentview",), UNNORM_KEYS[suite])


@pytest.mark.parametrize("name", [name for name in NAMES if "tiny" in name or "toy" in name])
def test_small_presets_can_start_anywhere(name):
    config = compose(name).config
    assert config.env.blockers() + config.model.blockers() + config.algorithm.blockers() == []
    assert config.train.dtype == "float32"


@pytest.mark.parametrize("name", DEMONSTRATED)
def test_presets_from_demonstrations_leave_official_states_to_results(name):
    """They train and measure on other states, and on different ones."""
    config = compose(name).config
    assert config.env.blockers() + config.model.blockers() + config.algorithm.blockers() == []
    tasks = environment_spec(config).tasks
    official = {trial for task in tasks for trial in task.eval_trials}
    trained, measured = set(config.rollout.trials), set(config.eval.trials)
    assert not trained & official
    assert not measured & official
    assert not trained & measured
    assert max(trained | measured) < min(task.num_trials for task in tasks)
    assert config.sft != SupervisedConfig(), "they say how to imitate"
    assert config.sft.data == (), "and nothing about this machine"


def test_there_is_something_between_full_size_and_tiny():
    assert {"libero_object_small_grpo", "libero_object_tiny_vla_grpo"} <= set(DEMONSTRATED)
