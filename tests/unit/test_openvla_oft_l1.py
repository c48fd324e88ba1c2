"""The regression head: files, normalisation, and what such a policy refuses."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vlactl_openvla_oft import codec, l1, loading
from vlactl_openvla_oft.architecture import ACTION_DIM, CHUNK_LENGTH, STATE_DIM, TINY
from vlactl_openvla_oft.init import random_state
from vlactl_openvla_oft.model import build
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.policy import make_policy

from vlactl.api.contracts import (
    EnvSpec,
    Greedy,
    LoraContext,
    ModelContext,
    ObservationBatch,
    Sample,
    TrainBatch,
)
from vlactl.errors import ConfigError, IntegrityError, UserError

SPEC = EnvSpec(
    cameras={"agentview": (64, 64), "wrist": (48, 48)},
    state_dim=STATE_DIM,
    action_dim=ACTION_DIM,
    max_episode_steps=64,
    control_hz=20,
    tasks=(),
)
CONTEXT = ModelContext(env=SPEC, device=torch.device("cpu"), dtype=torch.float32, seed=0)
CONFIG = OpenVlaOftConfig(
    size="tiny",
    head="l1",
    cameras=("agentview", "wrist"),
    keep_stop_token=True,
    image_pipeline="official",
)
HIDDEN = TINY.language.hidden_size
PUBLISHED_FILES = {
    "action_head": "action_head--50000_checkpoint.pt",
    "proprio_projector": "proprio_projector--50000_checkpoint.pt",
}


@pytest.fixture(scope="module")
def policy():
    return make_policy(CONFIG, CONTEXT)


@pytest.fixture
def observations():
    rng = np.random.default_rng(0)
    return ObservationBatch(
        images={
            name: rng.integers(0, 256, (2, *sides, 3), dtype=np.uint8)
            for name, sides in SPEC.cameras.items()
        },
        state=rng.uniform(-1, 1, (2, STATE_DIM)).astype(np.float32),
        instructions=("open the drawer", "close the drawer"),
    )


@pytest.fixture(scope="module")
def extras():
    network = l1.surround(build(TINY), HIDDEN)
    return l1.random_extras(network, 7)


def write_published(directory, extras, prefix="module."):
    for part, file in PUBLISHED_FILES.items():
        state = {
            prefix + name.removeprefix(f"{part}."): tensor
            for name, tensor in extras.items()
            if name.startswith(part)
        }
        torch.save(state, directory / file)


def write_weights(directory):
    save_file(random_state(build(TINY), 0), directory / "model.safetensors")


def actions_of(policy, observations):
    return policy.act(observations, Greedy(), [0] * len(observations)).actions_BKA


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_an_action_chunk_and_nothing_to_learn_from(policy, observations):
    chunks = policy.act(observations, Sample(1.6), [1, 2])
    assert chunks.actions_BKA.shape == (2, CHUNK_LENGTH, ACTION_DIM)
    assert chunks.actions_BKA.dtype == np.float64
    assert set(np.unique(chunks.actions_BKA[..., codec.GRIPPER])) <= {-1.0, 1.0}
    assert chunks.tokens_BKA is chunks.logprobs_BKA is chunks.values_BK is None
    assert not list(policy.trainable())
    assert not any(parameter.requires_grad for parameter in policy.module.parameters())


def test_rows_do_not_depend_on_each_other(policy, observations):
    both = actions_of(policy, observations)
    for row in range(2):
        alone = ObservationBatch(
            images={name: image[row : row + 1] for name, image in observations.images.items()},
            state=observations.state[row : row + 1],
            instructions=observations.instructions[row : row + 1],
        )
        np.testing.assert_allclose(actions_of(policy, alone)[0], both[row], atol=1e-5)


def test_the_state_matters(policy, observations):
    other = replace(observations, state=-observations.state)
    difference = actions_of(policy, other) - actions_of(policy, observations)
    assert np.abs(difference[..., : codec.GRIPPER]).max() > 1e-3


def test_every_parameter_is_in_a_unit_or_near_the_root(policy):
    units = {id(p) for unit in policy.shard_units() for p in unit.parameters()}
    others = {name for name, p in policy.module.named_parameters() if id(p) not in units}
    assert all(name.startswith("vla.language_model.") for name in others)


def test_learning_is_refused(policy, observations, tmp_path):
    batch = TrainBatch(
        observations=observations, tokens_SKA=torch.zeros(2, 8, 7, dtype=int), temperature=1.0
    )
    for call in (
        lambda: policy.evaluate_actions(batch),
        lambda: policy.reference_logprobs(batch),
        lambda: policy.export(tmp_path, adapter_only=False),
    ):
        with pytest.raises(UserError, match="without probabilities"):
            call()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_files_are_read(tmp_path, extras, prefix):
    write_published(tmp_path, extras, prefix)
    assert same(l1.read_extras(tmp_path), extras)


def test_safetensors_are_read(tmp_path, extras):
    (tmp_path / "one").mkdir()
    save_file(extras, tmp_path / "one" / l1.EXTRAS)
    assert same(l1.read_extras(tmp_path / "one"), extras)
    for part in l1.PARTS:
        own = {n.removeprefix(f"{part}."): t for n, t in extras.items() if n.startswith(part)}
        save_file(own, tmp_path / f"{part}--7.safetensors")
    assert same(l1.read_extras(tmp_path), extras)


def test_a_directory_gives_a_policy(tmp_path, extras, observations):
    write_weights(tmp_path)
    write_published(tmp_path, extras)
    config = CONFIG.model_copy(update={"path": str(tmp_path)})
    policy = make_policy(config, CONTEXT)
    read = dict(policy.module.named_parameters())
    assert all(torch.equal(read[name], tensor) for name, tensor in extras.items())
    assert np.isfinite(actions_of(policy, observations)).all()


def test_a_checkpoint_of_tokens_has_no_such_head(tmp_path):
    write_weights(tmp_path)
    with pytest.raises(IntegrityError, match=r"one file action_head--<step>_checkpoint\.pt"):
        make_policy(CONFIG.model_copy(update={"path": str(tmp_path)}), CONTEXT)


def test_such_a_checkpoint_has_no_token_head(tmp_path, extras):
    write_published(tmp_path, extras)
    config = OpenVlaOftConfig(path=str(tmp_path))
    with pytest.raises(ConfigError, match="regression head") as caught:
        make_policy(config, CONTEXT)
    assert 'model.head = "l1"' in caught.value.hint


def test_two_heads_are_one_too_many(tmp_path, extras):
    write_published(tmp_path, extras)
    torch.save({}, tmp_path / "action_head--60000_checkpoint.pt")
    with pytest.raises(IntegrityError, match=r"50000_checkpoint\.pt, action_head--60000"):
        l1.read_extras(tmp_path)


def test_film_is_refused(tmp_path, extras):
    write_published(tmp_path, extras)
    (tmp_path / "vision_backbone--50000_checkpoint.pt").touch()
    with pytest.raises(IntegrityError, match="FiLM"):
        l1.read_extras(tmp_path)


class Intruder:
    """Creates a folder when it is unpickled by someone careless."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_cannot_execute_anything(tmp_path, extras):
    write_published(tmp_path, extras)
    torch.save({"w": Intruder(tmp_path / "executed")}, tmp_path / PUBLISHED_FILES["action_head"])
    with pytest.raises(IntegrityError, match="holds more than tensors"):
        l1.read_extras(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", b"PK\x03\x04 half a zip", b"\x80\x02h\x01."]
)
def test_a_damaged_file_is_named(tmp_path, extras, content):
    write_published(tmp_path, extras)
    (tmp_path / PUBLISHED_FILES["proprio_projector"]).write_bytes(content)
    with pytest.raises(IntegrityError, match=r"proprio_projector--50000.*damaged"):
        l1.read_extras(tmp_path)


@pytest.mark.parametrize("value", [torch.zeros(3), {"w": 3}, [1, 2]])
def test_other_things_than_named_tensors_are_refused(tmp_path, extras, value):
    write_published(tmp_path, extras)
    torch.save(value, tmp_path / PUBLISHED_FILES["action_head"])
    with pytest.raises(IntegrityError, match="tensors by name"):
        l1.read_extras(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("action_head.model.fc2.bias"), "missing: action_head.model.fc2.bias"),
        (lambda e: e.update({"action_head.x": torch.zeros(1)}), "unexpected: action_head.x"),
        (
            lambda e: e.update({"proprio_projector.fc1.weight": torch.zeros(HIDDEN, 9)}),
            r"proprio_projector.fc1.weight \[128, 9\] instead of \[128, 8\]",
        ),
    ],
)
def test_tensors_must_be_those_of_the_head(tmp_path, extras, change, message):
    changed = dict(extras)
    change(changed)
    network = l1.surround(build(TINY), HIDDEN)
    with pytest.raises(IntegrityError, match=message):
        l1.add_extras(network, changed, tmp_path, CONTEXT.device, torch.float32)


STATE = {"q01": [0.0] * 8, "q99": [2.0] * 8}


def test_states_are_normalised_and_cut_off():
    statistics = loading.state_statistics({"a": {"proprio": STATE}}, "")
    state = np.array([0.0, 1.0, 2.0, 5.0, -5.0, 0.5, 1.5, 1.0])
    np.testing.assert_allclose(
        statistics.normalize(state), [-1, 0, 1, 1, -1, -0.5, 0.5, 0], atol=1e-7
    )


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"action": {}}, "lack q01"),
        ({"proprio": {"q01": [0.0] * 8}}, "lack q01"),
        ({"proprio": {"q01": [0.0] * 7, "q99": [1.0] * 7}}, "not of 8 numbers"),
        ({"proprio": {"q01": [float("nan")] * 8, "q99": [1.0] * 8}}, "not finite"),
    ],
)
def test_state_statistics_are_checked(statistics, message):
    with pytest.raises(IntegrityError, match=message):
        loading.state_statistics({"a": statistics}, "a")


def test_the_environment_must_have_that_state():
    context = replace(CONTEXT, env=replace(SPEC, state_dim=9))
    with pytest.raises(ConfigError, match="state of 8 numbers, the environment has 9"):
        make_policy(CONFIG, context)


@pytest.mark.parametrize("change", [{"keep_stop_token": False}, {"image_pipeline": "rlinf"}])
def test_only_the_official_dialect(change):
    with pytest.raises(ConfigError, match="official dialect"):
        make_policy(CONFIG.model_copy(update=change), CONTEXT)


def test_adapters_have_nothing_to_learn_from():
    context = replace(CONTEXT, lora=LoraContext(rank=2, alpha=2))
    with pytest.raises(ConfigError, match="without probabilities"):
        make_policy(CONFIG, context)


def test_export_is_refused_before_anything_is_read(tmp_path):
    config = CONFIG.model_copy(update={"path": str(tmp_path / "nowhere"), "size": "full"})
    with pytest.raises(ConfigError, match="nor exported"):
        make_policy(config, replace(CONTEXT, for_export=True))
