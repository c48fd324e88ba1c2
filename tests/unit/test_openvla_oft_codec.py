"""Action tokens and ranges: what holds for every number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vlactl_openvla_oft import codec
from vlactl_openvla_oft.architecture import NUM_BINS

END = 32000
HALF_BIN = 1 / (NUM_BINS - 1)
UNIT = st.floats(-1.0, 1.0)
ANY = st.floats(-1e6, 1e6)


@given(arrays(np.float64, 8, elements=UNIT))
def test_decoding_gives_an_action_back_to_half_a_bin(actions):
    tokens = codec.encode(actions, END)
    assert ((tokens >= END - NUM_BINS) & (tokens < END)).all()
    np.testing.assert_allclose(codec.decode(tokens, END), actions, rtol=0, atol=HALF_BIN + 1e-12)


@given(arrays(np.float64, 8, elements=UNIT))
def test_what_is_decoded_is_encoded_to_the_same_action(actions):
    decoded = codec.decode(codec.encode(actions, END), END)
    again = codec.decode(codec.encode(decoded, END), END)
    np.testing.assert_array_equal(decoded, again)


@given(ANY, ANY)
def test_a_larger_action_never_has_a_larger_token(one, other):
    low, high = sorted((one, other))
    tokens = codec.encode(np.array([low, high]), END)
    assert tokens[0] >= tokens[1]
    decoded = codec.decode(tokens, END)
    assert decoded[0] <= decoded[1]


@given(st.integers(0, 2**31))
def test_every_id_decodes_to_a_bin(token):
    assert codec.decode(np.array([token]), END)[0] in codec.CENTERS


@st.composite
def ranges(draw):
    q01, widths = (draw(arrays(np.float64, 3, elements=st.floats(0.01, 5.0))) for _ in range(2))
    mask = draw(arrays(np.bool_, 3))
    return {"q01": q01 - 2.0, "q99": q01 - 2.0 + widths, "mask": mask}


@given(ranges(), arrays(np.float64, 3, elements=UNIT))
def test_states_are_normalised_as_actions_are_unnormalised(limits, normalized):
    raw = codec.Range(**limits).unnormalize(normalized)
    back = codec.Range(**limits).normalize(raw)
    np.testing.assert_allclose(back, normalized, rtol=0, atol=1e-6)


@given(ranges(), arrays(np.float64, 3, elements=ANY))
def test_states_stay_in_their_range(limits, state):
    assert (np.abs(codec.Range(**limits).normalize(state)) <= 1.0).all()


@pytest.mark.parametrize(("opening", "command"), [(0.996, -1.0), (0.0, 1.0), (1.2, -1.0)])
def test_an_open_gripper_is_minus_one(opening, command):
    actions = np.array([[0.5, opening]])
    np.testing.assert_array_equal(codec.to_simulator(actions), [[0.5, command]])
    assert actions[0, 1] == opening
