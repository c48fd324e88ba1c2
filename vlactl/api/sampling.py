"""Drawing action tokens and judging them again: the float32 maths that every token policy shares.

The one module of `vlactl.api` that imports torch; policies import it, descriptors must not.

Shapes: B observations, T tokens, V choices of one token; `...` any leading axes.
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
    the row's key alone.

    Returns:
        Tokens int64 [B, T] and their log-probabilities float32 [B, T], under the distribution they
        were drawn from (greedy: at temperature 1).
    """
    if isinstance(mode, Greedy):
        tokens_BT = logits_BTV.argmax(-1)
        return tokens_BT, token_logprobs(logits_BTV, tokens_BT, 1.0)[0]
    _, num_tokens, num_choices = logits_BTV.shape
    noise = torch.from_numpy(uniform(noise_keys, num_tokens)).to(logits_BTV.device)
    scaled, _ = _restricted(logits_BTV.float() / mode.temperature, mode.top_k)
    cumulative = torch.softmax(scaled, -1).double().cumsum(-1)
    threshold = (noise * cumulative[..., -1]).unsqueeze(-1)
    tokens_BT = (cumulative <= threshold).sum(-1).clamp(max=num_choices - 1)
    return tokens_BT, token_logprobs(logits_BTV, tokens_BT, mode.temperature, mode.top_k)[0]


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, top_k: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of given tokens, float32 [...], differentiable.

    Args:
        logits: [..., V], any floating dtype; the softmax is taken in float32.
        tokens: int64 [...].
        temperature: of the distribution.
        top_k: leave so many choices, as `Sample.top_k`; others have log-probability -inf.
    """
    scaled, removed = _restricted(logits.float() / temperature, top_k)
    log_p = torch.log_softmax(scaled, -1)
    chosen = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    # 0 * -inf would be NaN, in the sum as in its gradient.
    finite = log_p if removed is None else log_p.masked_fill(removed, 0.0)
    return chosen, -(log_p.exp() * finite).sum(-1)


def _restricted(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits with -inf outside the `top_k` best, and where that is; of equals the first counts."""
    if not 0 < top_k < logits.shape[-1]:
        return logits, None
    best = logits.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    removed = torch.ones_like(logits, dtype=torch.bool).scatter(-1, best, value=False)
    return logits.masked_fill(removed, -torch.inf), removed


def spread_labels(tokens: torch.Tensor, num_choices: int, width: float) -> torch.Tensor:
    """Labels for a cross-entropy over ordered bins: a Gaussian around each token, or the token.

    Args:
        tokens: int64 [...].
        num_choices: V.
        width: standard deviation in bins; 0 = all on one bin.

    Returns:
        float32 [n, V] where spread, else int64 [n]; n = all tokens.
    """
    flat = tokens.flatten()
    if width == 0:
        return flat
    bins = torch.arange(num_choices, device=tokens.device)
    distance = (bins - flat.unsqueeze(1)).float() / width
    return torch.softmax(-0.5 * distance.square(), dim=-1)
