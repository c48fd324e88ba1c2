"""Prompts, words and pictures."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from vlactl_libero.tasks import suite_tasks
from vlactl_openvla_oft.architecture import BOS_ID, STOP_ID, TINY
from vlactl_openvla_oft.processor import (
    PUBLISHED_MEANS,
    PUBLISHED_STDS,
    PictureConfig,
    PromptEncoder,
    make_picture_encoder,
    pad_prompt,
    prompt_text,
)
from vlactl_openvla_oft.tokenizer import UNKNOWN_ID, WORD_BLANK_ID, WordTokenizer, word_ids

INSTRUCTIONS = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "pick up the bbq sauce and place it in the basket",
    "turn on the stove and put the moka pot on it",
    "put both the alphabet soup and the cream cheese box in the basket",
    "pick up the book on the left and place it on top of the shelf",
    "put the yellow and white mug to the front of the white mug",
)


def test_prompt_is_lower_case_and_ends_with_a_blank():
    assert prompt_text("Open the Drawer") == (
        "In: What action should the robot take to open the drawer?\nOut: "
    )


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_words_cover_the_instructions(instruction):
    ids = WordTokenizer().encode(prompt_text(instruction))
    assert UNKNOWN_ID not in ids
    assert (ids[0], ids[-1]) == (BOS_ID, WORD_BLANK_ID)
    words = list(word_ids())
    assert " ".join(instruction.split()) in " ".join(words[i] for i in ids)


@pytest.mark.skipif(find_spec("libero") is None, reason="LIBERO is not installed")
def test_words_cover_all_of_libero():
    for task in suite_tasks("libero_130"):
        assert UNKNOWN_ID not in WordTokenizer().encode(prompt_text(task.instruction))


def test_instructions_become_different_prompts():
    assert len({tuple(WordTokenizer().encode(prompt_text(i))) for i in INSTRUCTIONS}) == 6


def test_unknown_words_are_kept_apart_from_known_ones():
    ids = WordTokenizer().encode(prompt_text("juggle the bowl"))
    assert ids.count(UNKNOWN_ID) == 1


def test_words_fit_below_the_action_tokens():
    ids = word_ids()
    assert len(ids) == len(set(ids.values())) < TINY.action_start
    assert (ids["<unk>"], ids["<s>"], ids["</s>"]) == (UNKNOWN_ID, BOS_ID, STOP_ID)
    assert ids["<blank>"] == WORD_BLANK_ID


def test_padding_goes_behind_the_first_token():
    ids, mask = pad_prompt([1, 7, 8], 5, 99)
    assert ids.tolist() == [1, 99, 99, 7, 8]
    assert mask.tolist() == [True, False, False, True, True]


def test_prompts_are_stacked():
    encoder = PromptEncoder(WordTokenizer(), 32, TINY.language.pad_token_id)
    ids, mask = encoder.encode(INSTRUCTIONS[:3])
    assert ids.shape == mask.shape == (3, 32)
    assert (ids[~mask] == TINY.language.pad_token_id).all()
    assert (ids[:, -1] == WORD_BLANK_ID).all()


@pytest.mark.parametrize("pipeline", ["rlinf", "official"])
@pytest.mark.parametrize("size", [32, 20, 48])
def test_pictures_are_normalised_for_each_tower(size, pipeline):
    config = PictureConfig(size=size, means=PUBLISHED_MEANS, stds=PUBLISHED_STDS)
    encoder = make_picture_encoder(pipeline, config, torch.device("cpu"), torch.float32)
    picture = np.full((2, 32, 32, 3), 51, np.uint8)
    pixels = encoder.encode([picture, picture])
    assert pixels.shape == (2, 12, size, size)
    expected = (0.2 - np.ravel(PUBLISHED_MEANS)) / np.ravel(PUBLISHED_STDS)
    np.testing.assert_allclose(pixels[0, :6, 0, 0], expected, rtol=1e-5)
    assert torch.equal(pixels[:, :6], pixels[:, 6:])
