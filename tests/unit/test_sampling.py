"""Drawing tokens: what a row depends on, and distributions that are cut to their best choices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlactl.api.contracts import Greedy, Sample
from vlactl.api.sampling import draw_tokens, spread_labels, token_logprobs

NUM_TOKENS, NUM_CHOICES = 3, 11
KEYS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6)
MODES = st.one_of(
    st.just(Greedy()),
    st.builds(Sample, st.floats(0.1, 3.0), st.integers(0, NUM_CHOICES)),
)


def logits_of(keys):
    """Each row's logits come from its key, too, and hold ties."""
    rows = [np.random.default_rng(key).integers(-8, 8, (NUM_TOKENS, NUM_CHOICES)) for key in keys]
    return torch.from_numpy(np.stack(rows)).float() / 2


@settings(deadline=None)
@given(keys=KEYS, mode=MODES, data=st.data())
def test_a_row_depends_on_its_key_alone(keys, mode, data):
    tokens, logprobs = draw_tokens(logits_of(keys), mode, keys)
    chosen = data.draw(st.lists(st.sampled_from(range(len(keys))), min_size=1, max_size=8))
    some = [keys[i] for i in chosen]
    tokens_of_some, logprobs_of_some = draw_tokens(logits_of(some), mode, some)
    assert torch.equal(tokens_of_some, tokens[chosen])
    torch.testing.assert_close(logprobs_of_some, logprobs[chosen])


@settings(deadline=None)
@given(keys=KEYS, mode=MODES)
def test_log_probabilities_are_those_of_the_distribution_drawn_from(keys, mode):
    logits = logits_of(keys)
    tokens, logprobs = draw_tokens(logits, mode, keys)
    sampled = mode if isinstance(mode, Sample) else Sample()
    again, entropy = token_logprobs(logits, tokens, sampled.temperature, sampled.top_k)
    assert torch.equal(logprobs, again)
    assert logprobs.isfinite().all()
    assert (entropy > -1e-6).all()


@settings(deadline=None)
@given(key=st.integers(0, 2**63 - 1), top_k=st.integers(1, NUM_CHOICES))
def test_the_best_choices_share_all_probability(key, top_k):
    logits = logits_of([key])
    every = torch.arange(NUM_CHOICES).expand(1, NUM_TOKENS, -1)
    log_p, _ = token_logprobs(
        logits.unsqueeze(2).expand(-1, -1, NUM_CHOICES, -1), every, 1.0, top_k
    )
    kept = log_p.isfinite()
    assert (kept.sum(-1) == top_k).all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, NUM_TOKENS))
    worst_kept = logits.masked_fill(~kept, torch.inf).amin(-1)
    assert (worst_kept >= logits.masked_fill(kept, -torch.inf).amax(-1)).all()


def test_of_equal_choices_the_first_counts():
    logits = torch.tensor([[[0.0, 2.0, 1.0, 1.0, 1.0]]])
    log_p = [float(token_logprobs(logits, torch.tensor([[i]]), 1.0, 3)[0]) for i in range(5)]
    assert np.isfinite(log_p).tolist() == [False, True, True, True, False]


def test_top_1_is_the_argmax():
    logits = logits_of(range(20))
    tokens, logprobs = draw_tokens(logits, Sample(1.6, top_k=1), range(20))
    assert torch.equal(tokens, logits.argmax(-1))
    assert not logprobs.any()


@pytest.mark.parametrize("top_k", [NUM_CHOICES, NUM_CHOICES + 1, 0])
def test_large_top_k_changes_nothing(top_k):
    logits = logits_of([5])
    plain = draw_tokens(logits, Sample(1.6), [5])
    assert all(map(torch.equal, plain, draw_tokens(logits, Sample(1.6, top_k), [5])))


@pytest.mark.parametrize("top_k", [0, 1, 4])
def test_gradients_are_finite(top_k):
    logits = logits_of([3]).requires_grad_()
    tokens, _ = draw_tokens(logits.detach(), Sample(1.6, top_k), [3])
    logprobs, entropy = token_logprobs(logits, tokens, 1.6, top_k)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any() == (top_k != 1)


def test_frequencies_are_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(4000, 1, 4)
    tokens, _ = draw_tokens(logits, Sample(2.0, top_k=2), range(4000))
    frequencies = tokens.flatten().bincount(minlength=4) / 4000
    expected = torch.softmax(torch.tensor([-torch.inf, 0.5, 1.0, -torch.inf]), 0)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.03)


def test_labels_without_width_are_the_tokens():
    tokens = torch.tensor([[3, 0], [1, 2]])
    assert torch.equal(spread_labels(tokens, NUM_CHOICES, 0.0), torch.tensor([3, 0, 1, 2]))


@pytest.mark.parametrize("width", [0.5, 1.5])
def test_labels_are_spread_as_a_gaussian(width):
    labels = spread_labels(torch.tensor([[5, 0]]), NUM_CHOICES, width)
    assert labels.shape == (2, NUM_CHOICES)
    torch.testing.assert_close(labels.sum(-1), torch.ones(2))
    assert labels.argmax(-1).tolist() == [5, 0]
    torch.testing.assert_close(labels[0], labels[0].flip(0))
    ratio = (labels[0, 6] / labels[0, 5]).item()
    assert ratio == pytest.approx(np.exp(-0.5 / width**2), rel=1e-5)
    assert labels[1, 0] > labels[0, 5], "at the edge nothing is lost"


def test_labels_of_little_width_are_the_tokens():
    labels = spread_labels(torch.arange(NUM_CHOICES), NUM_CHOICES, 1e-3)
    torch.testing.assert_close(labels, torch.eye(NUM_CHOICES))
