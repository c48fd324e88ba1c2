"""The tiny VLA as a policy."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from vlactl_libero import tasks
from vlactl_libero.plugin import LiberoConfig
from vlactl_tiny_vla import words
from vlactl_tiny_vla.network import TinyVla
from vlactl_tiny_vla.plugin import (
    ACTION_DIM,
    CHUNK_LENGTH,
    NUM_BINS,
    VALUE_OUTPUTS,
    WEIGHTS,
    TinyVlaConfig,
    footprint,
)
from vlactl_tiny_vla.policy import NUM_FEATURES, make_policy

from vlactl.api.contracts import (
    EnvSpec,
    Greedy,
    LoraContext,
    ModelContext,
    ObservationBatch,
    Sample,
    SupervisedBatch,
    TrainBatch,
)
from vlactl.api.plugins import FootprintContext
from vlactl.errors import ConfigError, IntegrityError

CAMERAS = ("agentview", "wrist")
ENV = EnvSpec(
    cameras=dict.fromkeys(CAMERAS, (48, 48)),
    state_dim=8,
    action_dim=ACTION_DIM,
    max_episode_steps=10,
    control_hz=20,
    tasks=(),
)
LOW, HIGH = [-0.9] * 6 + [0.0], [0.7] * 6 + [1.0]
STATISTICS = {
    "some_suite": {
        "action": {"q01": LOW, "q99": HIGH, "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-0.2, -0.3, 0.8, 1, 1, 1, 0, -0.04], "q99": [0.2, 0.3, 1.3] + [2] * 5},
    }
}
CONTEXT = ModelContext(env=ENV, device=torch.device("cpu"), dtype=torch.float32, seed=3)
KNOWS = replace(CONTEXT, statistics=STATISTICS)
CONFIG = TinyVlaConfig(image_size=32, width=64, depth=2, num_heads=2, num_keypoints=8)
TWO = CONFIG.model_copy(update={"cameras": CAMERAS})
INSTRUCTIONS = ("open the middle drawer", "push the plate", "put the bowl on the stove", "turn on")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small networks are fastest on one; on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy():
    return make_policy(CONFIG, KNOWS)


def observe(num_rows, seed=0, size=48):
    rng = np.random.default_rng(seed)
    shape = (num_rows, size, size, 3)
    return ObservationBatch(
        images={name: rng.integers(0, 256, shape, dtype=np.uint8) for name in CAMERAS},
        state=rng.normal(size=(num_rows, 8)).astype(np.float32),
        instructions=tuple(INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(num_rows)),
    )


def take(batch, rows):
    return ObservationBatch(
        images={name: image[rows] for name, image in batch.images.items()},
        state=batch.state[rows],
        instructions=tuple(batch.instructions[row] for row in rows),
    )


def imitate(num_rows=6, seed=0, **keys):
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-0.9, 0.7, (num_rows, CHUNK_LENGTH, ACTION_DIM)).astype(np.float32)
    actions[..., -1] = rng.choice([-1, 1], actions.shape[:2])
    return SupervisedBatch(
        observations=observe(num_rows, seed),
        actions_SKA=actions,
        valid_SK=np.ones((num_rows, CHUNK_LENGTH), bool),
        **keys,
    )


def logits(policy, batch):
    with torch.no_grad():
        return policy.module(*policy._encode(batch)).logits


# --------------------------------------------------------------------------------------------
# Acting, and judging again
# --------------------------------------------------------------------------------------------
def test_act_returns_chunks_for_the_simulator(policy):
    chunks = policy.act(observe(40), Sample(), range(40))
    assert chunks.actions_BKA.shape == (40, CHUNK_LENGTH, ACTION_DIM)
    assert (chunks.actions_BKA.dtype, chunks.tokens_BKA.dtype) == (np.float64, np.int64)
    assert chunks.logprobs_BKA.dtype == np.float32
    assert chunks.values_BK is None
    assert chunks.tokens_BKA.min() >= 0
    assert chunks.tokens_BKA.max() < NUM_BINS
    arm = chunks.actions_BKA[..., :6]
    assert -0.9 - 1e-9 <= arm.min() < -0.88
    assert 0.68 < arm.max() <= 0.7 + 1e-9
    assert set(np.unique(chunks.actions_BKA[..., -1])) == {-1.0, 1.0}


@pytest.mark.parametrize("mode", [Sample(1.0), Sample(1.6), Greedy()])
@pytest.mark.parametrize("values", ["none", "chunk", "action"])
@pytest.mark.parametrize("config", [CONFIG, TWO], ids=["one camera", "two cameras"])
def test_evaluation_agrees_with_act(config, values, mode):
    policy = make_policy(config, replace(CONTEXT, values=values))
    batch = observe(3)
    chunks = policy.act(batch, mode, [5, 6, 7])
    temperature = mode.temperature if isinstance(mode, Sample) else 1.0
    tokens = torch.from_numpy(chunks.tokens_BKA)
    output = policy.evaluate_actions(
        TrainBatch(observations=batch, tokens_SKA=tokens, temperature=temperature)
    )
    logprobs = output.logprobs_SKA.detach().numpy()
    np.testing.assert_allclose(logprobs, chunks.logprobs_BKA, rtol=0, atol=1e-5)
    assert output.entropy_SKA.shape == chunks.tokens_BKA.shape
    if values == "none":
        assert output.values_SK is chunks.values_BK is None
        return
    assert chunks.values_BK.shape == (3, VALUE_OUTPUTS[values])
    assert chunks.values_BK.dtype == np.float32
    values_SK = output.values_SK.detach().numpy()
    np.testing.assert_allclose(values_SK, chunks.values_BK, rtol=0, atol=1e-5)


def test_drawn_tokens_have_the_probability_they_are_said_to_have(policy):
    batch = take(observe(1), [0] * 64)
    chunks = policy.act(batch, Sample(1.3), range(64))
    log_p = torch.log_softmax(logits(policy, batch) / 1.3, -1)
    tokens = torch.from_numpy(chunks.tokens_BKA).flatten(1)
    expected = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    np.testing.assert_allclose(
        chunks.logprobs_BKA.reshape(64, -1), expected.numpy(), rtol=0, atol=1e-5
    )


def test_a_row_depends_on_its_key_and_nobody_else(policy):
    batch, others = observe(4), observe(4, seed=9)
    chunks = policy.act(batch, Sample(), [1, 2, 3, 4])
    order = [2, 0, 3, 1]
    moved = policy.act(take(batch, order), Sample(), [3, 1, 4, 2])
    np.testing.assert_array_equal(moved.tokens_BKA, chunks.tokens_BKA[order])
    mixed = ObservationBatch(
        images={
            name: np.concatenate([others.images[name][:3], image[1:2]])
            for name, image in batch.images.items()
        },
        state=np.concatenate([others.state[:3], batch.state[1:2]]),
        instructions=(*others.instructions[:3], batch.instructions[1]),
    )
    among_others = policy.act(mixed, Sample(), [7, 8, 9, 2])
    np.testing.assert_array_equal(among_others.tokens_BKA[3], chunks.tokens_BKA[1])
    np.testing.assert_allclose(
        among_others.logprobs_BKA[3], chunks.logprobs_BKA[1], rtol=0, atol=1e-5
    )
    again = policy.act(take(batch, [0, 0]), Sample(), [1, 2])
    assert (again.tokens_BKA[0] != again.tokens_BKA[1]).any()


def test_reference_stays_what_the_policy_was():
    policy = make_policy(CONFIG, replace(CONTEXT, reference=True))
    tokens = torch.from_numpy(policy.act(observe(2), Sample(), [1, 2]).tokens_BKA)
    batch = TrainBatch(observations=observe(2), tokens_SKA=tokens, temperature=1.6)
    initial = policy.evaluate_actions(batch).logprobs_SKA
    initial.mean().backward()
    torch.optim.SGD([p for _, p in policy.trainable()], lr=1.0).step()
    assert (policy.evaluate_actions(batch).logprobs_SKA - initial).abs().max() > 1e-3
    assert torch.equal(policy.reference_logprobs(batch), initial)


def test_bfloat16_acts_as_float32_does_nearly():
    policies = [
        make_policy(CONFIG, replace(CONTEXT, dtype=dtype, values="chunk"))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert {p.dtype for p in policies[1].module.parameters()} == {torch.bfloat16}
    full, half = (logits(policy, observe(2)) for policy in policies)
    assert half.dtype == torch.float32
    assert (full - half).abs().max() < 0.1 * full.std()
    assert policies[1].act(observe(1), Sample(), [1]).values_BK.dtype == np.float32


def test_a_seed_alone_fixes_the_weights(policy):
    again, other = (make_policy(CONFIG, replace(KNOWS, seed=seed)) for seed in (3, 4))
    state, same, different = (p.module.state_dict() for p in (policy, again, other))
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())
    assert not torch.equal(different["head.weight"], state["head.weight"])


def test_it_can_be_sharded(policy):
    """Units share no parameter, and none is a scalar, which cannot be divided among ranks."""
    units = policy.shard_units()
    owned = [id(parameter) for unit in units for parameter in unit.parameters()]
    assert len(owned) == len(set(owned)) > 0
    assert all(parameter.ndim for _, parameter in policy.trainable())


# --------------------------------------------------------------------------------------------
# What is seen
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["picture", "instruction", "position", "rotation", "fingers"])
def test_everything_that_is_observed_matters(policy, part):
    batch, other = take(observe(1), [0, 0]), observe(1, seed=4)
    state = batch.state.copy()
    if part == "picture":
        batch.images["agentview"][1] = other.images["agentview"][0]
    elif part == "instruction":
        batch = replace(batch, instructions=INSTRUCTIONS[:2])
    else:
        rows = {"position": slice(0, 3), "rotation": slice(3, 6), "fingers": slice(6, 8)}[part]
        state[1, rows] = 0.1
        batch = replace(batch, state=state)
    first, second = logits(policy, batch)
    assert (first - second).abs().max() > 1e-3


def test_only_its_cameras_are_looked_at_each_in_its_place(policy):
    batch = observe(2)
    blind = replace(batch, images=batch.images | {"wrist": np.zeros_like(batch.images["wrist"])})
    torch.testing.assert_close(logits(policy, blind), logits(policy, batch))
    both = make_policy(TWO, CONTEXT)
    assert (logits(both, blind) - logits(both, batch)).abs().max() > 1e-3
    names = reversed(CAMERAS)
    swapped = replace(batch, images=dict(zip(names, batch.images.values(), strict=True)))
    assert (logits(both, swapped) - logits(both, batch)).abs().max() > 1e-3


def test_pictures_of_another_size_are_resized(policy):
    def shade(size, start, end):
        line = np.linspace(start, end, size).round().astype(np.uint8)
        picture = np.broadcast_to(line[:, None], (1, size, size, 3)).copy()
        return replace(observe(1), images={"agentview": picture})

    large, small, other = (
        logits(policy, shade(*each)) for each in ((64, 0, 255), (32, 0, 255), (32, 255, 0))
    )
    assert (small - large).abs().max() < 0.1 * (other - large).abs().max()


def test_rotations_are_continuous_through_half_a_turn(policy):
    """The same pose as two opposite vectors, where the gripper usually points."""
    axis = np.array([0.99, 0.1, -0.05])
    axis /= np.linalg.norm(axis)
    state = np.zeros((3, 8), np.float32)
    state[:, 3:6] = np.stack([(np.pi - 1e-3) * axis, -(np.pi - 1e-3) * axis, 0.9 * np.pi * axis])
    features = policy._features(state)
    assert features.shape == (3, NUM_FEATURES)
    assert features.dtype == np.float32
    assert np.abs(state[0] - state[1]).max() > 6
    assert np.abs(features[0] - features[1]).max() < 5e-3
    assert np.abs(features[0] - features[2]).max() > 0.1
    columns = features[:, 3:9].reshape(3, 3, 2)
    products = columns.transpose(0, 2, 1) @ columns
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(2), products.shape), atol=1e-6)


def test_no_rotation_is_the_identity_and_positions_are_in_range(policy):
    state = np.array([[-0.2, 0.0, 9.0, 0, 0, 0, 0.04, -0.04]], np.float32)
    features = policy._features(state)[0]
    np.testing.assert_allclose(features[:3], [-1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(features[3:9], np.eye(3)[:, :2].ravel(), atol=1e-6)
    np.testing.assert_allclose(features[9:], [1, -1], atol=1e-6)


def test_all_instructions_of_libero_are_told_apart():
    spec = tasks.make_spec(LiberoConfig(suite="libero_130"))
    told = {task.instruction for task in spec.tasks}
    assert len({words.encode(text).tobytes() for text in told}) == len(told) > 100
    alphabet = {word for text in told for word in text.split()}
    places = {words.encode(word)[0].tobytes() for word in alphabet}
    assert len(places) == len(alphabet), "so are all their words"


def test_words_are_read_in_order_and_whatever_their_case():
    ids = words.encode("Put the Bowl, on it")
    assert np.array_equal(ids, words.encode("put the bowl on it"))
    assert not np.array_equal(ids, words.encode("put the on bowl it"))
    assert (ids[:5] >= 0).all()
    assert (ids[:5] < words.NUM_BUCKETS).all()
    assert (ids[5:] == words.PADDING).all()


def test_ids_of_words_are_those_of_every_process():
    """Python's own hash of a text is not."""
    code = "from vlactl_tiny_vla import words; print(words.encode('open the drawer').tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == words.encode("open the drawer").tolist()


def test_long_instructions_are_refused():
    words.encode(" ".join("a" * words.MAX_WORDS))
    with pytest.raises(ConfigError, match="has 33 words, tiny-vla reads at most 32"):
        words.encode(" ".join("a" * (words.MAX_WORDS + 1)))


# --------------------------------------------------------------------------------------------
# Imitation
# --------------------------------------------------------------------------------------------
def test_actions_become_tokens_and_come_back(policy):
    actions = imitate(32).actions_SKA
    decoded = policy._decode(policy._tokens(actions))
    assert np.array_equal(decoded[..., -1], actions[..., -1])
    half_a_bin = 0.5 * 1.6 / (NUM_BINS - 1)
    assert np.abs(decoded[..., :6] - actions[..., :6]).max() < 1.001 * half_a_bin
    tokens = np.arange(NUM_BINS).repeat(ACTION_DIM).reshape(-1, CHUNK_LENGTH, ACTION_DIM)
    again = policy._tokens(policy._decode(tokens).astype(np.float32))
    assert np.array_equal(again[..., :6], tokens[..., :6])
    assert set(np.unique(again[..., 6])) == {0, NUM_BINS - 1}


def test_what_lies_outside_the_range_becomes_the_nearest_token(policy):
    actions = np.zeros((1, CHUNK_LENGTH, ACTION_DIM), np.float32)
    actions[0, 0, :6], actions[0, 1, :6] = -5, 5
    tokens = policy._tokens(actions)
    assert (tokens[0, 0, :6] == 0).all()
    assert (tokens[0, 1, :6] == NUM_BINS - 1).all()


def test_an_untrained_policy_knows_nothing(policy):
    loss = policy.supervised_loss(imitate())
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(np.log(NUM_BINS), abs=0.3)


def test_one_batch_is_learned_by_heart():
    policy, batch = make_policy(CONFIG, KNOWS), imitate(2)
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=5e-3)
    losses = []
    for _ in range(50):
        loss = policy.supervised_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    actions = policy.act(batch.observations, Greedy(), [0] * 2).actions_BKA
    assert np.abs(actions - batch.actions_SKA).max() < 0.01


def test_labels_may_be_spread(policy):
    sharp, spread = (
        float(policy.supervised_loss(imitate(label_width=width)).detach()) for width in (0.0, 2.0)
    )
    assert 0 < abs(spread - sharp) < 0.2


def test_actions_that_are_no_labels_do_not_count(policy):
    batch = imitate()
    valid = batch.valid_SK.copy()
    valid[:, 3:] = False
    changed = batch.actions_SKA.copy()
    changed[:, 3:] = 0.3
    masked, other, whole = (
        float(policy.supervised_loss(each).detach())
        for each in (
            replace(batch, valid_SK=valid),
            replace(batch, valid_SK=valid, actions_SKA=changed),
            batch,
        )
    )
    assert masked == other != whole


def test_everything_is_taught():
    policy = make_policy(CONFIG, KNOWS)
    policy.supervised_loss(imitate()).backward()
    untaught = {n for n, p in policy.trainable() if p.grad is None or not p.grad.any()}
    assert untaught <= {"eye.heatmaps.bias"}, "a heat map is normalised"


# --------------------------------------------------------------------------------------------
# Directories
# --------------------------------------------------------------------------------------------
def export(policy, directory):
    directory.mkdir()
    policy.export(directory, adapter_only=False)
    return CONFIG.model_copy(update={"path": str(directory), "cameras": policy._config.cameras})


@pytest.mark.parametrize("values", ["none", "chunk"])
@pytest.mark.parametrize("context", [CONTEXT, KNOWS], ids=["untrained", "imitates"])
def test_a_policy_comes_back_bit_by_bit(tmp_path, context, values):
    before = make_policy(CONFIG, replace(context, values=values))
    config = export(before, tmp_path / "one")
    after = make_policy(config, replace(CONTEXT, seed=8, values=values))
    state, same = before.module.state_dict(), after.module.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())
    mode, keys = Sample(1.6), [1, 2]
    one, two = (policy.act(observe(2), mode, keys) for policy in (before, after))
    np.testing.assert_array_equal(one.actions_BKA, two.actions_BKA)
    np.testing.assert_array_equal(one.logprobs_BKA, two.logprobs_BKA)
    export(after, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_value_head_may_be_missing_or_too_much(tmp_path):
    without = export(make_policy(CONFIG, CONTEXT), tmp_path / "without")
    fresh = make_policy(without, replace(CONTEXT, seed=5, values="chunk"))
    assert fresh.act(observe(1), Sample(), [1]).values_BK.shape == (1, 1)
    has = export(make_policy(CONFIG, replace(CONTEXT, values="chunk")), tmp_path / "has")
    assert make_policy(has, CONTEXT).act(observe(1), Sample(), [1]).values_BK is None
    with pytest.raises(IntegrityError, match="not of this network"):
        make_policy(has, replace(CONTEXT, values="action"))


def test_statistics_of_demonstrations_take_the_place_of_those_beside_the_weights(tmp_path):
    config = export(make_policy(CONFIG, KNOWS), tmp_path / "one")
    wide = {"other": {**STATISTICS["some_suite"], "action": {"q01": [-9.0] * 7, "q99": [9.0] * 7}}}
    kept, changed = (
        make_policy(config, replace(CONTEXT, statistics=stated)) for stated in (None, wide)
    )
    first, second = (policy.act(observe(9), Sample(), range(9)) for policy in (kept, changed))
    np.testing.assert_array_equal(first.tokens_BKA, second.tokens_BKA)
    assert np.abs(first.actions_BKA[..., :6]).max() <= 0.9 + 1e-9
    assert np.abs(second.actions_BKA[..., :6]).max() > 8
    export(changed, tmp_path / "two")
    assert json.loads((tmp_path / "two/dataset_statistics.json").read_text()) == wide


def test_files_can_be_read_by_others(tmp_path):
    export(make_policy(CONFIG, CONTEXT), tmp_path / "one")
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (tmp_path / "one").iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_size", 64), ("width", 96), ("depth", 3), ("num_heads", 4), ("num_keypoints", 9)],
)
def test_directories_of_other_sizes_are_refused(tmp_path, key, value):
    config = export(make_policy(CONFIG, CONTEXT), tmp_path / "one")
    with pytest.raises(ConfigError, match=f"with {key} = .*, model.{key} is {value}"):
        make_policy(config.model_copy(update={key: value}), CONTEXT)


def test_a_directory_of_other_cameras_is_refused(tmp_path):
    export(make_policy(CONFIG, CONTEXT), tmp_path / "one")
    with pytest.raises(ConfigError, match="with cameras"):
        make_policy(TWO.model_copy(update={"path": str(tmp_path / "one")}), CONTEXT)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"[]", "does not hold a JSON object"),
        ("model.safetensors", None, "is damaged"),
        ("model.safetensors", b"\x00" * 64, "is damaged"),
        ("dataset_statistics.json", None, "is missing"),
        ("dataset_statistics.json", b'{"a": {}}', "does not state action q01"),
        ("dataset_statistics.json", b'{"a": {"action": {"q01": [0], "q99": [1]}}}', "7 finite"),
    ],
)
def test_damaged_directories_are_refused(tmp_path, name, content, message):
    config = export(make_policy(CONFIG, CONTEXT), tmp_path / "one")
    (tmp_path / "one" / name).unlink()
    if content is not None:
        (tmp_path / "one" / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        make_policy(config, CONTEXT)


def test_weights_of_something_else_are_refused(tmp_path):
    config = export(make_policy(CONFIG, CONTEXT), tmp_path / "one")
    other = make_policy(CONFIG.model_copy(update={"depth": 3}), CONTEXT)
    export(other, tmp_path / "two")
    weights = (tmp_path / "two/model.safetensors").read_bytes()
    (tmp_path / "one/model.safetensors").write_bytes(weights)
    with pytest.raises(IntegrityError, match="not of this network"):
        make_policy(config, CONTEXT)


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "context", "message"),
    [
        ({}, {"lora": LoraContext(rank=4, alpha=8.0)}, "no adapters"),
        ({}, {"env": replace(ENV, action_dim=6)}, "acts in 7 dimensions"),
        ({}, {"env": replace(ENV, state_dim=1)}, "has 7 and 1"),
        ({"cameras": ("agentview", "top")}, {}, "model.cameras names top"),
    ],
)
def test_what_does_not_fit_is_refused(config, context, message):
    with pytest.raises(ConfigError, match=message):
        make_policy(CONFIG.model_copy(update=config), replace(CONTEXT, **context))


def test_statistics_of_several_data_sets_are_refused():
    several = dict.fromkeys(("one", "two"), STATISTICS["some_suite"])
    with pytest.raises(IntegrityError, match="of one data set"):
        make_policy(CONFIG, replace(CONTEXT, statistics=several))


def test_only_whole_policies_can_be_exported(policy, tmp_path):
    with pytest.raises(ConfigError, match="no adapters"):
        policy.export(tmp_path, adapter_only=True)


@pytest.mark.parametrize("keys", [{"num_heads": 5}, {"width": 100}, {"image_size": 100}])
def test_sizes_that_do_not_go_together_are_refused(keys):
    with pytest.raises(ValidationError):
        TinyVlaConfig(**keys)


@pytest.mark.parametrize("name", ["base", "rl"])
def test_weights_come_with_the_plugin(name, tmp_path):
    camera = {"agentview": (128, 128)}
    context = replace(CONTEXT, env=replace(ENV, cameras=camera))
    shipped = make_policy(TinyVlaConfig(shipped=name), context)
    state = shipped.module.state_dict()
    assert all(torch.equal(value, value.half().float()) for value in state.values())
    assert sum(file.stat().st_size for file in (WEIGHTS / name).iterdir()) < 6e6
    [(suite, _)] = shipped._statistics.items()
    assert suite == "libero_object"
    shipped.export(tmp_path, adapter_only=False)
    other = TinyVlaConfig(shipped="rl" if name == "base" else "base", path=str(tmp_path))
    again = make_policy(other, context).module.state_dict()  # a path comes first
    assert all(torch.equal(value, again[key]) for key, value in state.items())


def test_reinforcement_learning_has_moved_the_shipped_weights():
    base, rl = (load_file(WEIGHTS / name / "model.safetensors") for name in ("base", "rl"))
    assert base.keys() == rl.keys()
    assert all(base[key].dtype == torch.float16 for key in base)
    moved = sum(not torch.equal(base[key], rl[key]) for key in base)
    assert moved > 0.9 * len(base)


def test_a_path_that_is_not_there_blocks(tmp_path):
    assert TinyVlaConfig(path=str(tmp_path)).blockers() == TinyVlaConfig().blockers() == []
    [blocker] = TinyVlaConfig(path=str(tmp_path / "no")).blockers()
    assert "there is no directory" in blocker
    assert "--set model.path=DIR" in blocker


# --------------------------------------------------------------------------------------------
# Size
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("values", ["none", "chunk", "action"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"cameras": CAMERAS},
        {"width": 64, "num_heads": 4, "depth": 2, "image_size": 32},
        {"width": 256, "num_heads": 8, "depth": 8, "image_size": 256, "num_keypoints": 64},
    ],
)
def test_footprint_is_nearly_the_size(keys, values):
    config = TinyVlaConfig(**keys)
    with torch.device("meta"):
        module = TinyVla(config, state_dim=NUM_FEATURES, num_values=VALUE_OUTPUTS[values])
    size = footprint(config, FootprintContext(values=values))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert size.parameters == pytest.approx(parameters, rel=0.1)
    assert size.trainable == size.parameters
    if not keys and values == "none":
        assert round(parameters / 1e6, 1) == 2.5, "as its summary says"
