"""Does a loaded network behave like OpenVLA-OFT?

Two faults leave a policy that runs and is quietly bad: attention that became causal, as some
transformers versions make it, and weights or code because of which pictures do not arrive. A few
rows go through the network at once, which differ in one thing each, one of them per picture; a row
that differs in nothing tells how far rounding alone moves the logits, so the same test holds in
every dtype.

Shapes: B = 3 + N rows, N pictures, S side of a picture, L prompt slots, H hidden, V = 256 bins.
"""

from __future__ import annotations

import torch

from vlactl.api import noise
from vlactl.errors import IntegrityError
from vlactl_openvla_oft.architecture import BOS_ID, CHANNELS_PER_IMAGE, NUM_ACTION_TOKENS
from vlactl_openvla_oft.model import OpenVlaOft
from vlactl_openvla_oft.processor import Inputs

PROMPT = (BOS_ID, 5, 6, 7, 8, 9, 10, 11)
"""Any ids that every vocabulary has."""
PLAIN, SAME, OTHER_PLACEHOLDERS, OTHER_PICTURE = range(4)
"""Rows; as many rows as there are pictures start at the last."""
CHANGED_FROM = NUM_ACTION_TOKENS // 2
"""Placeholders from here on are other ones in one row; logits before are looked at."""
SMALLEST_EFFECT = 1e-3
"""Of the logits' own spread."""
ABOVE_ROUNDING = 4.0


@torch.no_grad()
def check(module: OpenVlaOft, *, num_pictures: int) -> None:
    """Refuse a network that ignores its pictures or cannot look ahead.

    Args:
        module: with its weights, on their device.
        num_pictures: of an observation.

    Raises:
        IntegrityError: it does not behave as the policy did in training.
    """
    hidden = module.hidden_states(
        *_inputs(module, num_pictures), placeholders=_placeholders(module, num_pictures)
    )
    logits_BTV = module.language_model.lm_head(hidden).double()
    rounding = _effect(logits_BTV, SAME)
    threshold = max(SMALLEST_EFFECT, ABOVE_ROUNDING * rounding)
    if not logits_BTV.isfinite().all():
        raise IntegrityError(
            "self-test of the model: its logits are not finite numbers",
            hint="the checkpoint is damaged, or was stored in a dtype that cannot hold it",
        )
    for picture in range(num_pictures):
        if _effect(logits_BTV, OTHER_PICTURE + picture) <= threshold:
            raise IntegrityError(
                f"self-test of the model: another picture {picture + 1} of {num_pictures} gives "
                "the same action logits, so it does not see",
                hint="the weights of the vision towers or of the projector are damaged: "
                "download the checkpoint again",
            )
    if _effect(logits_BTV, OTHER_PLACEHOLDERS) <= threshold:
        raise IntegrityError(
            "self-test of the model: later action tokens do not influence earlier ones, "
            "so attention is causal; OpenVLA-OFT was trained with attention in both directions",
            hint="this version of transformers handles attention masks in another way: "
            "install one that vlactl was tested with",
        )


def _effect(logits_BTV: torch.Tensor, row: int) -> float:
    """How far the logits of `row` are from the plain ones, in units of their spread."""
    plain, other = (logits_BTV[i, :CHANGED_FROM] for i in (PLAIN, row))
    spread = plain.std(dim=-1).mean().clamp(min=torch.finfo(plain.dtype).tiny)
    return float((other - plain).square().mean().sqrt() / spread)


def _inputs(module: OpenVlaOft, num_pictures: int) -> Inputs:
    embeddings = module.language_model.model.embed_tokens.weight
    height, width = module.vision_backbone.featurizer.patch_embed.img_size
    num_rows, channels = OTHER_PICTURE + num_pictures, CHANNELS_PER_IMAGE * num_pictures
    pictures = _normal("pictures", channels, height, width).repeat(num_rows, 1, 1, 1)
    for picture in range(num_pictures):
        start = CHANNELS_PER_IMAGE * picture
        changed = pictures[OTHER_PICTURE + picture, start : start + CHANNELS_PER_IMAGE]
        changed[:] = torch.linspace(-2.0, 2.0, width)
    ids = torch.tensor(PROMPT, device=embeddings.device).expand(num_rows, -1)
    pixels = pictures.to(embeddings.device, embeddings.dtype)
    return Inputs(pixels, ids, torch.ones_like(ids, dtype=torch.bool))


def _placeholders(module: OpenVlaOft, num_pictures: int) -> torch.Tensor:
    hidden_size = module.language_model.model.config.hidden_size
    placeholders = torch.zeros(OTHER_PICTURE + num_pictures, NUM_ACTION_TOKENS, hidden_size)
    later = _normal("placeholders", NUM_ACTION_TOKENS - CHANGED_FROM, hidden_size)
    placeholders[OTHER_PLACEHOLDERS, CHANGED_FROM:] = later
    return placeholders.to(module.language_model.model.embed_tokens.weight.device)


def _normal(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(noise.generator("self-test", name).standard_normal(shape)).float()
