"""OpenVLA-OFT of size `small`: the state as a token, its own stem, ranges from demonstrations."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from vlactl_openvla_oft import codec
from vlactl_openvla_oft.architecture import (
    ACTION_DIM,
    CHUNK_LENGTH,
    NUM_BINS,
    SMALL,
    SMALL_TOWER,
    VALUE_OUTPUTS,
)
from vlactl_openvla_oft.footprint import footprint
from vlactl_openvla_oft.model import build
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.policy import make_policy
from vlactl_openvla_oft.vision import ConvolutionalStem

from vlactl.api.contracts import (
    EnvSpec,
    Greedy,
    ModelContext,
    ObservationBatch,
    Sample,
    SupervisedBatch,
    TrainBatch,
)
from vlactl.api.plugins import FootprintContext
from vlactl.errors import ConfigError, IntegrityError

ENV = EnvSpec(
    cameras={"agentview": (64, 64)},
    state_dim=8,
    action_dim=ACTION_DIM,
    max_episode_steps=10,
    control_hz=20,
    tasks=(),
)
CONTEXT = ModelContext(env=ENV, device=torch.device("cpu"), dtype=torch.float32, seed=3)
CONFIG = OpenVlaOftConfig(size="small", max_prompt_length=24)
TINY_CONFIG = OpenVlaOftConfig(size="tiny", max_prompt_length=24)


def ranges(width):
    low, high = [-width] * 6 + [0.0], [width] * 6 + [1.0]
    return {
        "action": {"q01": low, "q99": high, "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-2.0] * 8, "q99": [2.0] * 8},
    }


DEMONSTRATED = {"some_suite": ranges(0.5)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small networks are fastest on one; on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy():
    return make_policy(CONFIG, replace(CONTEXT, statistics=DEMONSTRATED))


def observe(num_rows=2, seed=0):
    rng = np.random.default_rng(seed)
    return ObservationBatch(
        images={"agentview": rng.integers(0, 256, (num_rows, 64, 64, 3), dtype=np.uint8)},
        state=rng.normal(size=(num_rows, 8)).astype(np.float32),
        instructions=("open the drawer", "push the plate", "turn on the stove")[:num_rows],
    )


def imitate(**keys):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.5, 0.5, (2, CHUNK_LENGTH, ACTION_DIM)).astype(np.float32)
    actions[..., -1] = rng.choice([-1, 1], (2, CHUNK_LENGTH))
    valid = np.ones((2, CHUNK_LENGTH), bool)
    return SupervisedBatch(
        **({"observations": observe(), "actions_SKA": actions, "valid_SK": valid} | keys)
    )


def logits(policy, batch):
    with torch.no_grad():
        return policy._predict(batch).logits


def loss_of(policy, batch):
    with torch.no_grad():
        return float(policy.supervised_loss(batch))


# --------------------------------------------------------------------------------------------
# Reinforcement learning
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [Sample(1.0), Sample(1.6), Greedy()])
@pytest.mark.parametrize("values", ["none", "chunk"])
def test_evaluation_agrees_with_act(mode, values):
    policy = make_policy(CONFIG, replace(CONTEXT, values=values))
    batch = observe(3)
    chunks = policy.act(batch, mode, [5, 6, 7])
    temperature = mode.temperature if isinstance(mode, Sample) else 1.0
    tokens = torch.from_numpy(chunks.tokens_BKA)
    output = policy.evaluate_actions(
        TrainBatch(observations=batch, tokens_SKA=tokens, temperature=temperature)
    )
    logprobs = output.logprobs_SKA.detach().numpy()
    np.testing.assert_allclose(logprobs, chunks.logprobs_BKA, rtol=0, atol=1e-5)
    if values == "chunk":
        values_SK = output.values_SK.detach().numpy()
        np.testing.assert_allclose(values_SK, chunks.values_BK, rtol=0, atol=1e-5)


def test_the_reference_sees_the_state_too():
    policy = make_policy(CONFIG, replace(CONTEXT, reference=True))
    tokens = torch.from_numpy(policy.act(observe(), Sample(), [1, 2]).tokens_BKA)
    batch = TrainBatch(observations=observe(), tokens_SKA=tokens, temperature=1.0)
    with torch.no_grad():
        assert torch.equal(
            policy.reference_logprobs(batch), policy.evaluate_actions(batch).logprobs_SKA
        )


def test_the_state_matters_within_its_range(policy):
    batch = observe()
    moved = replace(batch, state=batch.state + np.float32(0.3))
    assert (logits(policy, moved) - logits(policy, batch)).abs().max() > 1e-2
    outside, further = (replace(batch, state=np.full((2, 8), x, np.float32)) for x in (2.5, 9))
    assert torch.equal(logits(policy, outside), logits(policy, further))


def test_the_tiny_one_takes_no_state():
    policy = make_policy(TINY_CONFIG, CONTEXT)
    batch = observe()
    moved = replace(batch, state=batch.state + np.float32(0.3))
    assert torch.equal(logits(policy, moved), logits(policy, batch))


def test_other_states_are_refused():
    with pytest.raises(ConfigError, match="takes a state of 8 numbers, the environment has 1"):
        make_policy(CONFIG, replace(CONTEXT, env=replace(ENV, state_dim=1)))


def test_the_stem_makes_the_patches_of_the_tower():
    stem = ConvolutionalStem(SMALL_TOWER)
    patches = stem(torch.zeros(2, 3, SMALL_TOWER.img_size, SMALL_TOWER.img_size))
    assert patches.shape == (2, SMALL_TOWER.num_patches, SMALL_TOWER.embed_dim)
    corner = torch.zeros(2, 3, 128, 128)
    corner[1, :, :16, :16] = 1
    with torch.no_grad():
        first, second = stem(corner)
    changed = (first - second).abs().amax(-1).reshape(8, 8) > 1e-3
    assert changed[0, 0], "rows of patches are rows of the picture"


def test_everything_trainable_is_taught(policy):
    policy.supervised_loss(imitate()).backward()
    untaught = {n for n, p in policy.trainable() if p.grad is None or not p.grad.any()}
    policy.module.zero_grad(set_to_none=True)
    assert not untaught


@pytest.mark.parametrize("values", ["none", "chunk", "action"])
def test_footprint_counts_the_network(values):
    module = build(replace(SMALL, value_outputs=VALUE_OUTPUTS[values]))
    size = footprint(CONFIG, FootprintContext(values=values))
    assert size.parameters == sum(p.numel() for p in module.parameters())
    assert size.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    if values == "none":
        assert round(size.parameters / 1e6) == 13, "as its description says"


# --------------------------------------------------------------------------------------------
# Imitation
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [CONFIG, TINY_CONFIG], ids=["small", "tiny"])
def test_the_plain_loss_is_that_of_the_demonstrated_bins(config):
    policy = make_policy(config, replace(CONTEXT, statistics=DEMONSTRATED))
    batch = imitate()
    valid = batch.valid_SK.copy()
    valid[0, 5:] = False
    log_p = torch.log_softmax(logits(policy, batch.observations), -1)
    normalized = np.clip(batch.actions_SKA / 0.5, -1, 1).astype(np.float64)
    normalized[..., -1] = (1 - batch.actions_SKA[..., -1]) / 2
    bins = torch.from_numpy(codec.encode(normalized, NUM_BINS)).flatten(1)
    losses = -log_p.gather(-1, bins.unsqueeze(-1)).reshape(2, CHUNK_LENGTH, ACTION_DIM)
    assert loss_of(policy, batch) == pytest.approx(float(losses.mean()), rel=1e-4)
    part = losses[torch.from_numpy(valid)].mean()
    assert loss_of(policy, replace(batch, valid_SK=valid)) == pytest.approx(float(part), rel=1e-4)
    assert loss_of(policy, replace(batch, label_width=1.5)) != loss_of(policy, batch)


def test_what_is_demonstrated_is_what_would_be_done(policy):
    """Bins of actions are decoded to the actions, the gripper's sign included."""
    actions = imitate().actions_SKA
    blueprint = policy._blueprint
    tokens = codec.encode(
        blueprint.actions.normalize(codec.from_simulator(actions)), SMALL.action_end
    )
    decoded = codec.to_simulator(
        blueprint.actions.unnormalize(codec.decode(tokens, SMALL.action_end))
    )
    assert np.abs(decoded[..., :6] - actions[..., :6]).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(decoded[..., -1], actions[..., -1])


def test_the_published_loss_is_that_of_the_whole_vocabulary():
    policy = make_policy(TINY_CONFIG.model_copy(update={"keep_stop_token": True}), CONTEXT)
    loss = loss_of(policy, imitate())
    assert loss == pytest.approx(np.log(448), abs=0.1)
    assert loss > np.log(NUM_BINS) + 0.3


@pytest.mark.parametrize("change", ["width", "valid"])
def test_the_published_loss_knows_no_other_labels(change):
    policy = make_policy(TINY_CONFIG.model_copy(update={"keep_stop_token": True}), CONTEXT)
    valid = np.arange(CHUNK_LENGTH) < np.array([[8], [3]])
    batch = imitate(**({"label_width": 1.0} if change == "width" else {"valid_SK": valid}))
    with pytest.raises(ConfigError, match="whole chunks and single bins only") as caught:
        policy.supervised_loss(batch)
    assert "sft.whole_chunks = true" in caught.value.hint


def test_it_learns_and_acts_as_shown():
    policy = make_policy(TINY_CONFIG, replace(CONTEXT, statistics=DEMONSTRATED))
    batch = imitate()
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=3e-3)
    losses = []
    for _ in range(80):
        loss = policy.supervised_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    chunks = policy.act(batch.observations, Greedy(), [0, 0])
    close = np.abs(chunks.actions_BKA - batch.actions_SKA) < 0.01
    assert close.mean() > 0.5, "by chance it would be 0.02"


# --------------------------------------------------------------------------------------------
# Directories
# --------------------------------------------------------------------------------------------
def export(policy, directory, config=CONFIG):
    directory.mkdir()
    policy.export(directory, adapter_only=False)
    return config.model_copy(update={"path": str(directory)})


def statistics_in(config):
    with open(f"{config.path}/dataset_statistics.json") as file:
        return json.load(file)


def test_a_policy_comes_back_bit_by_bit_with_its_ranges(policy, tmp_path):
    config = export(policy, tmp_path / "one")
    assert statistics_in(config) == DEMONSTRATED
    again = make_policy(config, replace(CONTEXT, seed=9))
    state = policy.module.state_dict()
    assert all(torch.equal(state[n], value) for n, value in again.module.state_dict().items())
    first, second = (each.act(observe(), Sample(), [1, 2]) for each in (policy, again))
    np.testing.assert_array_equal(first.actions_BKA, second.actions_BKA)
    np.testing.assert_array_equal(first.logprobs_BKA, second.logprobs_BKA)
    assert np.abs(first.actions_BKA[..., :6]).max() <= 0.5


@pytest.mark.parametrize("config", [CONFIG, TINY_CONFIG], ids=["small", "tiny"])
def test_new_demonstrations_beat_the_directory_which_beats_none(tmp_path, config):
    def reach(config, statistics=None):
        policy = make_policy(config, replace(CONTEXT, statistics=statistics))
        return np.abs(policy.act(observe(), Sample(), [1, 2]).actions_BKA[..., :6]).max(), policy

    none, untrained = reach(config)
    assert 0.9 < none <= 1
    of_nobody, _ = reach(export(untrained, tmp_path / "zero", config))
    assert of_nobody == none
    shown, policy = reach(config, DEMONSTRATED)
    assert 0.45 < shown <= 0.5
    exported = export(policy, tmp_path / "one", config)
    beside, _ = reach(exported)
    assert beside == shown
    new, policy = reach(exported, {"new": ranges(3.0)})
    assert new > 2.5
    assert statistics_in(export(policy, tmp_path / "two", config)) == {"new": ranges(3.0)}


def test_demonstrations_answer_to_the_name_that_is_asked_for(tmp_path):
    """So the preset that was imitated with reads the result, too."""
    config = TINY_CONFIG.model_copy(update={"unnorm_key": "libero_object_no_noops"})
    policy = make_policy(config, replace(CONTEXT, statistics=DEMONSTRATED))
    exported = export(policy, tmp_path / "one", config)
    assert statistics_in(exported) == {"libero_object_no_noops": ranges(0.5)}
    make_policy(exported, CONTEXT)


def test_ranges_must_be_of_state_and_action():
    lacking = {"some_suite": {"action": ranges(1.0)["action"]}}
    with pytest.raises(IntegrityError, match='proprio statistics of "some_suite"'):
        make_policy(CONFIG, replace(CONTEXT, statistics=lacking))
    make_policy(TINY_CONFIG, replace(CONTEXT, statistics=lacking))


def test_other_sizes_are_refused(policy, tmp_path):
    config = export(policy, tmp_path / "one")
    with pytest.raises(IntegrityError):
        make_policy(config.model_copy(update={"size": "tiny"}), CONTEXT)
    with pytest.raises(IntegrityError, match="vlactl-openvla-oft-small"):
        make_policy(config.model_copy(update={"size": "full"}), CONTEXT)
