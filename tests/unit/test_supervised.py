"""The supervised stage's arithmetic: batches, changed pictures, shares, the learning rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from vlactl_toy.environment import make_spec
from vlactl_toy.plugin import ToyEnvConfig, ToyModelConfig
from vlactl_toy.policy import make_policy

from vlactl.api.contracts import Greedy, ModelContext, ObservationBatch
from vlactl.config.compose import compose
from vlactl.config.run import SupervisedConfig
from vlactl.demonstrations.samples import Samples
from vlactl.distributed.roles import Ranks, World
from vlactl.launch.plan import environment_spec
from vlactl.launch.status import Heartbeat
from vlactl.parts import build_policy
from vlactl.train.meters import Averages
from vlactl.train.optim import make_optimizer
from vlactl.train.saving import Checkpoints
from vlactl.train.state import Actor
from vlactl.train.supervised import FINAL_LR, Changes, Imitator, learning_rate, make_batch, split
from vlactl.worker import write_model

CPU = torch.device("cpu")
CONFIG = SupervisedConfig(steps=100, warmup_steps=10, batch_size=16, lr=1e-2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small networks are fastest on one; on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------
# Learning rate
# --------------------------------------------------------------------------------------------
def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(CONFIG, step) for step in range(CONFIG.steps)]
    assert rates[0] == pytest.approx(CONFIG.lr / 10)
    assert np.diff(rates[:10]) == pytest.approx(CONFIG.lr / 10)
    assert max(rates) == rates[9] == rates[10] == CONFIG.lr
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[55] == pytest.approx(CONFIG.lr * (1 + FINAL_LR) / 2), "half way down"
    assert CONFIG.lr * FINAL_LR < rates[-1] < CONFIG.lr * FINAL_LR * 1.1


@pytest.mark.parametrize("warmup", [0, 100, 1000])
def test_a_warmup_may_be_missing_or_longer_than_the_run(warmup):
    config = CONFIG.model_copy(update={"warmup_steps": warmup})
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert all(0 < rate <= config.lr for rate in rates)
    assert rates[0] == config.lr / max(1, warmup)


# --------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------
def changes(shift=(0, 0), gain=1.0, offset=0.0):
    return Changes(
        shifts_B2=np.array([shift]),
        gains_BC=np.full((1, 3), gain, np.float32),
        offsets_BC=np.full((1, 3), offset, np.float32),
    )


def pictures(size=8, number=1):
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("down", "right"), [(2, 0), (0, 3), (-2, 1), (1, -3)])
def test_a_shift_repeats_the_edge(down, right):
    before = pictures()
    after = changes(shift=(down, right)).apply(before, CPU)
    padded = np.pad(before, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    assert np.array_equal(after, padded[:, 4 - down : 12 - down, 4 - right : 12 - right])


def test_colours_become_brighter_within_the_levels():
    before = np.full((1, 4, 4, 3), 100, np.uint8)
    assert (changes(gain=1.5, offset=-20).apply(before, CPU) == 130).all()
    assert (changes(gain=3).apply(before, CPU) == 255).all()
    assert (changes(offset=-200).apply(before, CPU) == 0).all()


def test_no_change_is_no_change():
    still = CONFIG.model_copy(update={"shift": 0, "recolour": 0.0})
    before = pictures(number=16)
    after = Changes.draw(np.random.default_rng(1), still).apply(before, CPU)
    assert np.array_equal(after, before)
    assert after.dtype == np.uint8


def test_changes_are_as_large_as_is_said():
    many = CONFIG.model_copy(update={"shift": 3, "recolour": 0.1, "batch_size": 4000})
    drawn = Changes.draw(np.random.default_rng(0), many)
    assert set(np.unique(drawn.shifts_B2)) == set(range(-3, 4))
    assert np.log(drawn.gains_BC).std() == pytest.approx(0.1 * 1.09**0.5, rel=0.05)
    common = np.log(drawn.gains_BC).mean(axis=1).std()
    assert common == pytest.approx(0.1 * 1.03**0.5, rel=0.05), "mostly all colours together"


# --------------------------------------------------------------------------------------------
# Batches, on any number of ranks
# --------------------------------------------------------------------------------------------
def make_samples(number=50):
    rng = np.random.default_rng(0)
    valid_NK = np.arange(4) < rng.integers(1, 5, number)[:, None]
    return Samples(
        pictures={"front": rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)},
        states_NP=rng.normal(size=(number, 1)).astype(np.float32),
        actions_NKA=rng.uniform(-1, 1, (number, 4, 1)).astype(np.float32),
        valid_NK=valid_NK,
        instructions=("reach goal 0", "reach goal 1"),
        instruction_N=rng.integers(0, 2, number),
        task_N=rng.integers(0, 2, number),
        episode_N=np.arange(number) // 5,
    )


SAMPLES = make_samples()


@pytest.fixture
def imitator(tmp_path):
    """An imitator of the toy on one of some actor ranks, which do not hear of each other."""

    def make(rank=0, size=1, start_step=0, micro_batch_size=16, **keys) -> Imitator:
        sets = [
            f"sft.{key}={value}" for key, value in {"batch_size": 16, "steps": 9, **keys}.items()
        ]
        sets += [f"optim.micro_batch_size={micro_batch_size}", "optim.clip_grad=1e9"]
        config = compose("toy_grpo", sets).config
        env = make_spec(ToyEnvConfig())
        context = ModelContext(env=env, device=CPU, dtype=torch.float32, seed=0)
        policy = make_policy(ToyModelConfig(), context)
        optimizer = torch.optim.SGD(policy.module.parameters())
        alone = World.alone(CPU)
        actors = Ranks(ranks=tuple(range(size)), rank=rank, group=None)
        return Imitator(
            config=config,
            run_dir=tmp_path,
            world=replace(alone, actors=actors),
            samples=SAMPLES,
            actor=Actor(policy=policy, optimizer=optimizer, is_sharded=False),
            weights=None,
            checkpoints=None,
            evaluator=None,
            log=None,
            heartbeat=Heartbeat(tmp_path, rank),
            stop=None,
            start_step=start_step,
        )

    return make


def seen(share):
    """What the policy is shown, row by row."""
    batch = share.batch
    columns = (
        batch.observations.images["front"],
        batch.observations.state,
        batch.actions_SKA,
        batch.valid_SK,
    )
    return [
        (*(column[row].tobytes() for column in columns), batch.observations.instructions[row])
        for row in range(len(batch.observations))
    ]


def test_a_batch_is_made_of_samples():
    rows = np.array([3, 3, 41])
    batch = make_batch(SAMPLES, rows, CONFIG)
    assert np.array_equal(batch.observations.images["front"], SAMPLES.pictures["front"][rows])
    assert np.array_equal(batch.observations.state, SAMPLES.states_NP[rows])
    words = [SAMPLES.instructions[SAMPLES.instruction_N[row]] for row in rows]
    assert batch.observations.instructions == tuple(words)
    assert np.array_equal(batch.actions_SKA, SAMPLES.actions_NKA[rows])
    assert np.array_equal(batch.valid_SK, SAMPLES.valid_NK[rows])
    whole = make_batch(SAMPLES, rows, CONFIG.model_copy(update={"whole_chunks": True}))
    assert whole.valid_SK.all()


def test_ranks_share_the_batch_of_one(imitator):
    alone = imitator()
    for step in range(3):
        one = alone._share(step)
        shares = [imitator(rank, 4)._share(step) for rank in range(4)]
        together = [None] * 16
        for rank, share in enumerate(shares):
            together[rank::4] = seen(share)
            assert share.num_labels == one.num_labels == one.batch.valid_SK.sum()
        assert together == seen(one)


def test_batches_depend_on_the_step_alone(imitator):
    steps = dict(imitator()._shares())
    assert sorted(steps) == list(range(9))
    assert len({seen(share)[0] + seen(share)[1] for share in steps.values()}) == 9
    resumed = dict(imitator(start_step=5)._shares())
    assert sorted(resumed) == [5, 6, 7, 8]
    assert all(seen(resumed[step]) == seen(steps[step]) for step in resumed)


def test_pictures_change_from_step_to_step_and_on_all_ranks_alike(imitator):
    alone, batch = imitator(), imitator()._share(0).batch

    def changed(step, rank=0, size=1):
        other = imitator(rank, size)
        images = other._changed(step, other._share(0).batch).observations.images["front"]
        assert images.dtype == np.uint8
        return images

    once, again = (alone._changed(3, batch).observations.images["front"] for _ in range(2))
    assert np.array_equal(once, again)
    assert (changed(4) != once).any()
    assert (once != batch.observations.images["front"]).any()
    for rank in range(2):
        assert np.array_equal(changed(3, rank, 2), once[rank::2])


def gradient(imitators):
    """Of the first step, added up over ranks."""
    total: dict[str, torch.Tensor] = {}
    losses = 0.0
    for each in imitators:
        averages = Averages()
        before = {name: value.detach().clone() for name, value in each.actor.policy.trainable()}
        each._train_step(0, each._share(0), averages)
        losses += averages.reduced(each.world.everyone)["loss"]
        lr = each.actor.optimizer.param_groups[0]["lr"]
        for name, value in each.actor.policy.trainable():
            step = (before[name] - value.detach()) / lr
            total[name] = total.get(name, 0.0) + step
    return losses, total


@pytest.mark.parametrize("whole_chunks", [False, True])
def test_micro_batches_and_ranks_do_not_change_the_gradient(imitator, whole_chunks):
    """Samples have different numbers of labels: a mean of means would be another one."""
    keys = {"whole_chunks": whole_chunks, "lr": 1.0, "warmup_steps": 0}
    loss, whole = gradient([imitator(**keys)])
    assert all(value.abs().max() > 1e-5 for value in whole.values())
    for others in (
        [imitator(micro_batch_size=3, **keys)],
        [imitator(rank, 2, micro_batch_size=5, **keys) for rank in range(2)],
    ):
        other_loss, other = gradient(others)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_labels(imitator):
    """Of one sample alone it is that of its labels, and of all the mean over their labels."""
    each = imitator(recolour=0, shift=0)
    batch, policy = each._share(0).batch, each.actor.policy
    with torch.no_grad():
        sums = [
            float(policy.supervised_loss(part)) * part.valid_SK.sum() for part in split(batch, 1)
        ]
        loss = float(policy.supervised_loss(batch))
    assert loss == pytest.approx(sum(sums) / batch.valid_SK.sum(), rel=1e-5)


def test_a_batch_is_split_into_all_its_samples(imitator):
    batch = imitator()._share(0).batch
    parts = list(split(batch, 5))
    assert [len(part.observations) for part in parts] == [5, 5, 5, 1]
    assert np.array_equal(np.concatenate([part.actions_SKA for part in parts]), batch.actions_SKA)
    words = [word for part in parts for word in part.observations.instructions]
    assert tuple(words) == batch.observations.instructions


# --------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_adapters_are_merged_into_what_is_written(tmp_path):
    """With the ranges of the demonstrations, and without the value head that PPO will want."""
    sets = ["algorithm.name=ppo", "lora.rank=4", "train.dtype=float32"]
    config = compose("libero_spatial_tiny_ppo", sets).config
    spec = environment_spec(config)
    ranges = {"action": {"q01": [-0.5] * 7, "q99": [0.5] * 7}}
    statistics = {"libero_spatial": ranges}
    policy = build_policy(config, spec, CPU, for_training=True, statistics=statistics)
    names = [name for name, _ in policy.trainable()]
    assert all("lora" in name for name in names), "no value head"
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0)))
    optimizer = make_optimizer(policy.trainable(), config.optim)
    checkpoints = Checkpoints(
        tmp_path,
        policy.module,
        optimizer,
        World.alone(CPU),
        config.checkpoint,
        trained_only=True,
    )
    checkpoints.save(7, now=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("of before the run was told to go further")
    write_model(config, spec, tmp_path, statistics)
    assert not (tmp_path / "model.tmp").exists()
    assert not (tmp_path / "model" / "old").exists()

    sets += ["lora.rank=0", f"model.path={tmp_path / 'model'}"]
    merged = build_policy(
        compose("libero_spatial_tiny_ppo", sets).config, spec, CPU, for_training=True
    )
    seen = ObservationBatch(
        images={"agentview": np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)},
        state=np.zeros((2, 8), np.float32),
        instructions=("open the drawer", "push the plate"),
    )
    first, second = (each.act(seen, Greedy(), [0, 0]) for each in (policy, merged))
    np.testing.assert_allclose(first.logprobs_BKA, second.logprobs_BKA, rtol=0, atol=1e-3)
    assert (first.tokens_BKA == second.tokens_BKA).mean() > 0.95
    assert np.abs(second.actions_BKA[..., :6]).max() <= 0.5
    assert first.values_BK is None
    assert second.values_BK is not None
