"""The tiny VLA as a vlactl policy.

An action dimension is divided into 256 equal bins between its 1 % and 99 % quantiles in the
demonstrations; the gripper's lies in [-1, 1], and what the simulator gets is its sign.

Shapes: B (or S) observations, K actions of a chunk, A dimensions of an action, P of the state.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from vlactl.api.contracts import (
    ActionChunks,
    Greedy,
    ModelContext,
    ObservationBatch,
    PolicyOutput,
    Sample,
    SupervisedBatch,
    TrainBatch,
)
from vlactl.api.sampling import draw_tokens, spread_labels, token_logprobs
from vlactl.errors import ConfigError, IntegrityError
from vlactl_tiny_vla import words
from vlactl_tiny_vla.network import Inputs, Prediction, TinyVla
from vlactl_tiny_vla.plugin import (
    ACTION_DIM,
    CHUNK_LENGTH,
    NUM_BINS,
    SHAPES,
    VALUE_OUTPUTS,
    TinyVlaConfig,
)

STATE_DIM = 8
"""Position and axis-angle of the end effector, and two finger joints."""
NUM_FEATURES = 3 + 6 + 2
FINGER_RANGE = 0.04
WEIGHTS, CONFIG, STATISTICS = "model.safetensors", "config.json", "dataset_statistics.json"
UNIT_STATISTICS: Mapping[str, Any] = {
    "built-in": {
        kind: {"q01": [-1.0] * size, "q99": [1.0] * size}
        for kind, size in (("action", ACTION_DIM), ("proprio", STATE_DIM))
    }
}
"""Of a policy that has seen no demonstration."""
VALUE_HEAD = "value_head."
GRIPPER = -1


def make_policy(config: TinyVlaConfig, context: ModelContext) -> TinyVlaPolicy:
    """The policy from a directory, or with weights drawn from the context's seed.

    Raises:
        ConfigError: it does not fit the environment or the directory.
        IntegrityError: the directory does not hold such a policy.
    """
    _check(config, context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        num_values = VALUE_OUTPUTS[context.values]
        module = TinyVla(config, state_dim=NUM_FEATURES, num_values=num_values)
    statistics = context.statistics or UNIT_STATISTICS
    if (directory := config.directory) is not None:
        _load(module, config, directory)
        statistics = context.statistics or _read_json(directory / STATISTICS)
    return TinyVlaPolicy(module.to(context.device, context.dtype), config, context, statistics)


class TinyVlaPolicy:
    """See `vlactl.api.contracts.Policy`."""

    def __init__(
        self,
        module: TinyVla,
        config: TinyVlaConfig,
        context: ModelContext,
        statistics: Mapping[str, Any],
    ) -> None:
        self.module = module
        self._reference = copy.deepcopy(module) if context.reference else None
        self._config, self._statistics = config, statistics
        self._device, self._dtype = context.device, context.dtype
        self._actions = Range.of(statistics, "action", ACTION_DIM)
        self._states = Range.of(statistics, "proprio", STATE_DIM)

    @torch.no_grad()
    def act(
        self, batch: ObservationBatch, mode: Sample | Greedy, noise_keys: Sequence[int]
    ) -> ActionChunks:
        """Choose an action chunk per observation."""
        prediction = self.module(*self._encode(batch))
        tokens, logprobs = draw_tokens(prediction.logits, mode, noise_keys)
        tokens_BKA = _by_action(tokens).cpu().numpy()
        values = prediction.values
        return ActionChunks(
            actions_BKA=self._decode(tokens_BKA),
            tokens_BKA=tokens_BKA,
            logprobs_BKA=_by_action(logprobs).cpu().numpy(),
            values_BK=None if values is None else values.cpu().numpy(),
        )

    def evaluate_actions(self, batch: TrainBatch) -> PolicyOutput:
        """Log-probabilities, entropy and values of given tokens, with gradient."""
        prediction = self.module(*self._encode(batch.observations))
        logprobs, entropy = _judge(prediction, batch)
        return PolicyOutput(
            logprobs_SKA=_by_action(logprobs),
            entropy_SKA=_by_action(entropy),
            values_SK=prediction.values,
        )

    @torch.no_grad()
    def reference_logprobs(self, batch: TrainBatch) -> torch.Tensor:
        """Log-probabilities of given tokens under the initial policy."""
        assert self._reference is not None, "built without ModelContext.reference"
        prediction = self._reference(*self._encode(batch.observations))
        return _by_action(_judge(prediction, batch)[0])

    def supervised_loss(self, batch: SupervisedBatch) -> torch.Tensor:
        """Cross-entropy of the demonstrated tokens."""
        logits = self.module(*self._encode(batch.observations)).logits
        tokens = torch.from_numpy(self._tokens(batch.actions_SKA)).to(self._device).flatten(1)
        labels = spread_labels(tokens, NUM_BINS, batch.label_width)
        losses = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        valid = torch.from_numpy(batch.valid_SK).to(self._device).repeat_interleave(ACTION_DIM, 1)
        return (losses * valid.flatten()).sum() / valid.sum()

    def shard_units(self) -> Sequence[nn.Module]:
        """The layers of the transformer."""
        return list(self.module.layers)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything."""
        return self.module.named_parameters()

    def export(self, directory: Path, *, adapter_only: bool) -> None:
        """Write weights, sizes and statistics; a value head is part of the weights."""
        if adapter_only:
            raise ConfigError("tiny-vla has no adapters", hint="leave out --adapter-only")
        state = {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / WEIGHTS).chmod(0o644)  # the library lets nobody but the owner read it
        sizes = {key: self._config.model_dump(mode="json")[key] for key in SHAPES}
        _write_json(directory / CONFIG, {"model_type": "vlactl-tiny-vla"} | sizes)
        _write_json(directory / STATISTICS, self._statistics)

    def _encode(self, batch: ObservationBatch) -> Inputs:
        pictures = np.stack([batch.images[camera] for camera in self._config.cameras], axis=1)
        ids = np.stack([words.encode(instruction) for instruction in batch.instructions])
        return Inputs(
            self._pixels(torch.from_numpy(pictures).to(self._device)),
            torch.from_numpy(self._features(batch.state)).to(self._device, self._dtype),
            torch.from_numpy(ids).to(self._device),
        )

    def _pixels(self, pictures_BNHWC: torch.Tensor) -> torch.Tensor:
        pixels = pictures_BNHWC.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
        size = self._config.image_size
        if pixels.shape[-1] != size:
            resized = functional.interpolate(
                pixels.flatten(0, 1), [size, size], mode="bilinear", antialias=True
            )
            pixels = resized.unflatten(0, pixels.shape[:2])
        return pixels.to(self._dtype)

    def _features(self, state_BP: np.ndarray) -> np.ndarray:
        """float32 [B, 11]: position, two columns of the rotation matrix, fingers.

        An axis-angle of half a turn, where the gripper usually points, jumps between two opposite
        vectors; the matrix does not (Zhou et al. 2019, arXiv:1812.07035).
        """
        position = self._states.normalize(state_BP)[:, :3]
        columns = _rotation_matrices(state_BP[:, 3:6])[:, :, :2].reshape(-1, 6)
        fingers = state_BP[:, 6:] / FINGER_RANGE
        return np.concatenate([position, columns, fingers], axis=1).astype(np.float32)

    def _decode(self, tokens_BKA: np.ndarray) -> np.ndarray:
        normalized = 2.0 * tokens_BKA / (NUM_BINS - 1) - 1.0
        actions = self._actions.unnormalize(normalized)
        actions[..., GRIPPER] = np.where(normalized[..., GRIPPER] > 0, 1.0, -1.0)
        return actions

    def _tokens(self, actions_SKA: np.ndarray) -> np.ndarray:
        normalized = self._actions.normalize(actions_SKA)
        normalized[..., GRIPPER] = np.sign(actions_SKA[..., GRIPPER])
        return np.rint((normalized + 1.0) / 2.0 * (NUM_BINS - 1)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Numbers between two quantiles become numbers in [-1, 1]."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, statistics: Mapping[str, Any], kind: str, size: int) -> Range:
        """From the only data set in `statistics`.

        Raises:
            IntegrityError: they are of several data sets, or not of `size` numbers.
        """
        try:
            (of_dataset,) = statistics.values()
            stated = of_dataset[kind]
            low, high = (np.array(stated[key], np.float64) for key in ("q01", "q99"))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise IntegrityError(
                f"{STATISTICS} does not state {kind} q01 and q99 of one data set"
            ) from None
        if low.shape != (size,) or high.shape != (size,) or not np.isfinite(low + high).all():
            raise IntegrityError(f"{STATISTICS}: {kind} is not of {size} finite numbers")
        return cls(low, high)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """To [-1, 1]; what lies outside the range is cut off."""
        scaled = 2.0 * (values - self.low) / (self.high - self.low + 1e-8) - 1.0
        return np.clip(scaled, -1.0, 1.0)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Back from [-1, 1]."""
        return 0.5 * (values + 1.0) * (self.high - self.low) + self.low


def _rotation_matrices(axis_angle_B3: np.ndarray) -> np.ndarray:
    """Rodrigues' formula, float64 [B, 3, 3]."""
    vectors = axis_angle_B3.astype(np.float64)
    angles = np.linalg.norm(vectors, axis=1)[:, None, None]
    x, y, z = (vectors / np.maximum(angles[:, 0], 1e-12)).T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
    return np.eye(3) + np.sin(angles) * cross + (1.0 - np.cos(angles)) * cross @ cross


def _by_action(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(1, (CHUNK_LENGTH, ACTION_DIM))


def _judge(prediction: Prediction, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return token_logprobs(prediction.logits, batch.tokens_SKA.flatten(1), batch.temperature)


def _check(config: TinyVlaConfig, context: ModelContext) -> None:
    if context.lora is not None:
        raise ConfigError("tiny-vla has no adapters", hint="set lora.rank = 0")
    env = context.env
    if env.action_dim != ACTION_DIM or env.state_dim != STATE_DIM:
        raise ConfigError(
            f"tiny-vla acts in {ACTION_DIM} dimensions on a state of {STATE_DIM} numbers, "
            f"the environment has {env.action_dim} and {env.state_dim}"
        )
    unknown = sorted(set(config.cameras) - set(env.cameras))
    if unknown:
        raise ConfigError(
            f"model.cameras names {', '.join(unknown)}, which the environment does not have",
            hint=f"cameras: {', '.join(env.cameras)}",
        )


def _load(module: TinyVla, config: TinyVlaConfig, directory: Path) -> None:
    """Fill a module from a directory; a value head that is not there keeps its random weights."""
    stated, wanted = _read_json(directory / CONFIG), config.model_dump(mode="json")
    for key in SHAPES:
        if stated.get(key) != wanted[key]:
            raise ConfigError(
                f"{directory} holds a tiny-vla with {key} = {stated.get(key)}, "
                f"model.{key} is {wanted[key]}",
                hint=f"set model.{key} to what the directory has",
            )
    try:
        state = load_file(directory / WEIGHTS)
    except Exception as error:  # the library raises nothing narrower
        raise IntegrityError(f"{directory / WEIGHTS} is damaged: {error}") from None
    own = module.state_dict()
    state = {n: v for n, v in state.items() if n in own or not n.startswith(VALUE_HEAD)}
    head = {n: v for n, v in own.items() if n.startswith(VALUE_HEAD) and n not in state}
    try:
        module.load_state_dict(state | head)
    except RuntimeError as error:
        raise IntegrityError(f"{directory / WEIGHTS} is not of this network: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(
            f"{path} is missing", hint=f"{path.parent} is not a directory that vlactl wrote"
        ) from None
    except ValueError as error:
        raise IntegrityError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} does not hold a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
