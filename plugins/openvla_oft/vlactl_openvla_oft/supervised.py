"""The losses that OpenVLA-OFT's supervised training minimises: the published one, and a plainer.

A sequence is the prompt, 56 action tokens and `</s>`. What goes in are placeholders, so nothing of
the answer but its length is seen; what is asked for are the tokens, among the whole vocabulary.

Shapes: B observations, T = 56 or 57 labelled tokens, V the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vlactl.api.sampling import spread_labels
from vlactl.errors import ConfigError
from vlactl_openvla_oft.architecture import NUM_BINS, STOP_ID
from vlactl_openvla_oft.model import OpenVlaOft
from vlactl_openvla_oft.processor import Inputs


def supervised_loss(
    module: OpenVlaOft,
    inputs: Inputs,
    tokens_B56: torch.Tensor,
    *,
    predict_stop_token: bool = True,
) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, their mean, float32 with gradient.

    Args:
        module: the network, which must keep the stop token.
        inputs: pictures and prompts.
        tokens_B56: int64, ids of the vocabulary.
        predict_stop_token: count the prediction of `</s>`, too.

    Raises:
        ConfigError: the network drops the stop token.
    """
    if not module.keep_stop_token:
        raise ConfigError(
            "the supervised loss needs a network that keeps </s> behind the action tokens",
            hint="set model.keep_stop_token = true",
        )
    labels_BT = tokens_B56
    if predict_stop_token:
        stop = tokens_B56.new_full((len(tokens_B56), 1), STOP_ID)
        labels_BT = torch.cat([tokens_B56, stop], dim=1)
    logits_BTV = module(*inputs, whole_answer=True).logits[:, : labels_BT.shape[1]]
    return functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def action_loss(
    module: OpenVlaOft,
    inputs: Inputs,
    bins_BT: torch.Tensor,
    valid_BT: torch.Tensor,
    label_width: float,
) -> torch.Tensor:
    """Cross-entropy among the 256 action tokens alone, mean over the valid ones, with gradient.

    It trains what acts, and nothing else: the other 31 808 rows of the vocabulary do not move.

    Args:
        module: the network.
        inputs: pictures and prompts.
        bins_BT: int64, action tokens counted from the first one.
        valid_BT: bool.
        label_width: see `vlactl.api.contracts.SupervisedBatch`.
    """
    logits_BTV = module(*inputs).logits
    labels = spread_labels(bins_BT, NUM_BINS, label_width)
    losses = functional.cross_entropy(logits_BTV.flatten(0, 1), labels, reduction="none")
    return (losses * valid_BT.flatten()).sum() / valid_BT.sum()
