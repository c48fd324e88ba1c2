"""Checkpoints with a regression head: they predict numbers instead of action tokens.

The proprioceptive state enters as one more token behind the pictures, and an MLP turns the hidden
states that would predict the 56 action tokens into 8 actions. Such policies can be evaluated only:
there is no probability to reinforce, and their token head has never seen action chunks.

The head and the state's projector lie beside the weights in files of their own. Published ones are
pickles, of which torch's restricted reader takes tensors and runs nothing.

Shapes: B observations, K actions of a chunk, A dimensions of an action, P numbers of the state,
H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torch.nn import functional

from vlactl.api.contracts import (
    ActionChunks,
    Greedy,
    ModelContext,
    ObservationBatch,
    PolicyOutput,
    Sample,
    TrainBatch,
)
from vlactl.errors import ConfigError, IntegrityError
from vlactl_openvla_oft import codec, loading, self_test
from vlactl_openvla_oft.architecture import ACTION_DIM, CHUNK_LENGTH, STATE_DIM
from vlactl_openvla_oft.codec import Range
from vlactl_openvla_oft.init import random_tensor
from vlactl_openvla_oft.model import OpenVlaOft, ProprioProjector
from vlactl_openvla_oft.parts import (
    BUILT_IN_STATISTICS,
    make_blueprint,
    make_module,
    make_processor,
)
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.processor import Processor

NUM_BLOCKS = 2
EXTRAS = "l1_extras.safetensors"
"""Both parts in one file, names with the part in front."""
PARTS = ("action_head", "proprio_projector")
WRAPPER = "module."
"""What distributed training has put in front of the published names."""


# --------------------------------------------------------------------------------------------
# Network
# --------------------------------------------------------------------------------------------
class ResidualBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class ResidualMlp(nn.Module):
    """Hidden states of an action, side by side -> the action."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(ACTION_DIM * hidden_size)
        self.fc1 = nn.Linear(ACTION_DIM * hidden_size, hidden_size)
        self.mlp_resnet_blocks = nn.ModuleList(
            ResidualBlock(hidden_size) for _ in range(NUM_BLOCKS)
        )
        self.layer_norm2 = nn.LayerNorm(hidden_size)
        self.fc2 = nn.Linear(hidden_size, ACTION_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class RegressionHead(nn.Module):
    """Hidden states [B, 56, H] -> normalised actions [B, K, A]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.model = ResidualMlp(hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model(hidden.unflatten(1, (CHUNK_LENGTH, ACTION_DIM)).flatten(2))


class L1Network(nn.Module):
    """OpenVLA-OFT between a state projector and a regression head."""

    def __init__(self, vla: OpenVlaOft, hidden_size: int) -> None:
        super().__init__()
        self.vla = vla
        self.proprio_projector = ProprioProjector(STATE_DIM, hidden_size)
        self.action_head = RegressionHead(hidden_size)

    def forward(
        self,
        pixels: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """Normalised actions float32 [B, K, A]; `state` is normalised, [B, P]."""
        token = self.proprio_projector(state)
        hidden = self.vla.hidden_states(pixels, input_ids, attention_mask, extra_tokens=token)
        return self.action_head(hidden).float()


def surround(vla: OpenVlaOft, hidden_size: int) -> L1Network:
    """The network around `vla`; `add_extras` gives the rest of it storage."""
    with torch.device("meta"):
        return L1Network(vla, hidden_size)


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------
def read_extras(directory: Path) -> dict[str, torch.Tensor]:
    """Weights of the head and of the state's projector, `action_head.*`, `proprio_projector.*`."""
    if any(directory.glob("vision_backbone--*_checkpoint*")):
        raise IntegrityError(
            f"{directory} has vision towers that see the instruction (FiLM)",
            hint="vlactl runs checkpoints without FiLM: those that were fine-tuned for LIBERO",
        )
    if (directory / EXTRAS).is_file():
        return _read_tensors(directory / EXTRAS)
    return {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in _read_tensors(_file_of(directory, part)).items()
    }


def _file_of(directory: Path, part: str) -> Path:
    patterns = (f"*{part}*checkpoint.pt", f"*{part}*.safetensors")
    found = sorted(path for pattern in patterns for path in directory.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise IntegrityError(
            f"{directory} must hold one file {part}--<step>_checkpoint.pt, and has {names}",
            hint='model.head = "l1" is for checkpoints with a regression head; '
            'others need model.head = "tokens"',
        )
    return found[0]


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    state = loading.read_all(path) if path.suffix == ".safetensors" else _unpickle(path)
    return {name.removeprefix(WRAPPER): tensor for name, tensor in state.items()}


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise IntegrityError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()
    ):
        raise IntegrityError(f"{path} does not hold tensors by name")
    return state


def add_extras(
    network: L1Network,
    extras: Mapping[str, torch.Tensor],
    place: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Make `extras`, read from `place`, the parameters of the head and of the projector."""
    shapes = extra_shapes(network)
    loading.check_names(place, "a regression head with state projector", shapes, extras)
    loading.compare_sizes(place, {name: t.shape for name, t in extras.items()}, shapes)
    state = {name: tensor.to(device, dtype) for name, tensor in extras.items()}
    network.load_state_dict(state, assign=True, strict=False)


def random_extras(network: L1Network, seed: int) -> dict[str, torch.Tensor]:
    """Initial values."""
    return {name: random_tensor(name, shape, seed) for name, shape in extra_shapes(network).items()}


def extra_shapes(network: L1Network) -> dict[str, torch.Size]:
    """Parameters that OpenVLA-OFT with action tokens does not have."""
    return {
        name: parameter.shape
        for name, parameter in network.named_parameters()
        if name.startswith(PARTS)
    }


# --------------------------------------------------------------------------------------------
# Policy
# --------------------------------------------------------------------------------------------
class L1Policy:
    """Implements `vlactl.api.contracts.Policy` for evaluation.

    Args:
        module: the network, with its weights.
        processor: makes the network's inputs.
        actions: statistics of the actions that the policy was trained on.
    """

    def __init__(
        self,
        module: L1Network,
        processor: Processor,
        actions: Range,
    ) -> None:
        self.module = module.requires_grad_(False)
        self._processor = processor
        self._actions = actions

    @torch.no_grad()
    def act(
        self, batch: ObservationBatch, mode: Sample | Greedy, noise_keys: Sequence[int]
    ) -> ActionChunks:
        """Predict an action chunk per observation; there is nothing to draw."""
        weight = self.module.proprio_projector.fc1.weight
        inputs = self._processor.encode(batch, weight.device)
        normalized_BKA = self.module(*inputs)
        actions_BKA = self._actions.unnormalize(normalized_BKA.double().cpu().numpy())
        return ActionChunks(
            actions_BKA=codec.to_simulator(actions_BKA), tokens_BKA=None, logprobs_BKA=None
        )

    def evaluate_actions(self, batch: TrainBatch) -> PolicyOutput:
        """Refused."""
        _refuse()

    def reference_logprobs(self, batch: TrainBatch) -> torch.Tensor:
        """Refused."""
        _refuse()

    def export(self, directory: Path, *, adapter_only: bool) -> None:
        """Refused: nothing has changed since the checkpoint was read."""
        _refuse()

    def shard_units(self) -> Sequence[nn.Module]:
        """The towers, the projectors, each decoder layer, and the head."""
        vla = self.module.vla
        return [
            vla.vision_backbone.featurizer,
            vla.vision_backbone.fused_featurizer,
            vla.projector,
            *vla.language_model.model.layers,
            self.module.proprio_projector,
            self.module.action_head,
        ]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Nothing."""
        return iter(())


def make_l1_policy(config: OpenVlaOftConfig, context: ModelContext) -> L1Policy:
    """Build the policy on this rank: from a checkpoint directory, or `tiny` from its seed."""
    _check(config, context)
    blueprint = make_blueprint(config, context, value_outputs=0)
    directory = Path(config.path)
    # Before the large files, since these are those that a directory without such a head lacks.
    extras = read_extras(directory) if config.path else None
    vla = make_module(config, context, blueprint.architecture)
    if config.size == "full":
        self_test.check(vla, num_pictures=len(config.cameras))
    network = surround(vla, blueprint.architecture.language.hidden_size)
    extras = extras or random_extras(network, context.seed)
    add_extras(network, extras, directory, context.device, context.dtype)
    processor = make_processor(config, context, blueprint, _states(config))
    return L1Policy(network, processor, blueprint.actions)


def _check(config: OpenVlaOftConfig, context: ModelContext) -> None:
    if context.for_export or context.lora is not None:
        _refuse()
    if context.env.state_dim != STATE_DIM:
        raise ConfigError(
            f'model.head = "l1" needs a proprioceptive state of {STATE_DIM} numbers, '
            f"the environment has {context.env.state_dim}"
        )
    if not config.keep_stop_token or config.image_pipeline != "official":
        raise ConfigError(
            'model.head = "l1" goes with the official dialect, in which such checkpoints were '
            "trained",
            hint='set model.keep_stop_token = true and model.image_pipeline = "official"',
        )


def _states(config: OpenVlaOftConfig) -> Range:
    if config.size == "full":
        statistics = loading.read_statistics(Path(config.path))
        return loading.state_statistics(statistics, config.unnorm_key)
    return loading.state_statistics(BUILT_IN_STATISTICS, "")


def _refuse() -> NoReturn:
    raise ConfigError(
        'a policy with model.head = "l1" can be evaluated, but neither trained nor exported: it '
        "predicts actions without probabilities, and its token head was never trained on action "
        "chunks, so training that one would start from a success rate of 0",
        hint="start from a checkpoint with action tokens",
    )
