"""Drawing action tokens and judging them again: the float32 maths that every token policy shares.

The one module of `vlactl.api` that imports torch; policies import it, descriptors must not.

Shapes: `...` any leading axes, V vocabulary of one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlactl.api.contracts import Greedy, Sample
from vlactl.api.noise import uniform


def draw_tokens(
    logits_BTV: torch.Tensor, mode: Sample | Greedy, noise_keys: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token per position.

    Sampling inverts the cumulative distribution at one uniform number per token, which depends on
    the
    row's key alone.

    Returns:
        Tokens int64 [B, T] and their log-probabilities float32 [B, T], under the distribution they
        were drawn from (greedy: at temperature 1).
    """
    if isinstance(mode, Greedy):
        tokens_BT = logits_BTV.argmax(-1)
        return tokens_BT, token_logprobs(logits_BTV, tokens_BT, 1.0)[0]
    _, num_tokens, num_choices = logits_BTV.shape
    noise = torch.from_numpy(uniform(noise_keys, num_tokens)).to(logits_BTV.device)
    probabilities = torch.softmax(logits_BTV.float() / mode.temperature, -1)
    cumulative = probabilities.double().cumsum(-1)
    threshold = (noise * cumulative[..., -1]).unsqueeze(-1)
    tokens_BT = (cumulative <= threshold).sum(-1).clamp(max=num_choices - 1)
    return tokens_BT, token_logprobs(logits_BTV, tokens_BT, mode.temperature)[0]


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of given tokens, float32 [...], differentiable.

    Args:
        logits: [..., V], any floating dtype; the softmax is taken in float32.
        tokens: int64 [...].
        temperature: of the distribution.
    """
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    chosen = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)
