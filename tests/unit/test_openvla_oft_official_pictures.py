"""The official picture road: JPEG without files, resizes as matrices."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from vlactl_openvla_oft import jpeg
from vlactl_openvla_oft.official_pictures import OfficialResize, centre, lanczos
from vlactl_openvla_oft.processor import (
    PUBLISHED_MEANS,
    PUBLISHED_STDS,
    PictureConfig,
    make_picture_encoder,
)

CPU = torch.device("cpu")
SIDES = ((48, 48), (32, 64), (37, 50), (17, 33))


def smooth(height, width):
    """A picture whose neighbours are alike, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / 16
    return (127.5 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)).astype(np.uint8)


def recompress(picture):
    levels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    return jpeg.recompress(levels)[0].permute(1, 2, 0).numpy()


def pillow(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=2)
    with Image.open(file) as decoded:
        return np.asarray(decoded).astype(int)


@pytest.mark.parametrize("sides", SIDES)
def test_jpeg_is_that_of_libjpeg_up_to_the_transform_back(sides):
    """Pillow decodes with the accurate transform, so it is less dark."""
    for picture in (smooth(*sides), noise(sides)):
        difference = pillow(picture) - recompress(picture)
        assert np.abs(difference).max() <= 14
        assert 0 < difference.mean() < 1.5


def noise(sides):
    return np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)


@settings(deadline=None, max_examples=25)
@given(arrays(np.uint8, (3,)), st.sampled_from(SIDES))
def test_jpeg_keeps_a_plain_colour(colour, sides):
    picture = np.broadcast_to(colour, (*sides, 3)).copy()
    after = recompress(picture)
    assert (after == after[0, 0]).all()
    assert np.abs(after[0, 0] - colour.astype(int)).max() <= 4


def test_pictures_of_a_batch_do_not_meet():
    pair = torch.from_numpy(np.stack([smooth(40, 40), noise((40, 40))])).permute(0, 3, 1, 2)
    for alone, together in zip(pair, jpeg.recompress(pair), strict=True):
        assert torch.equal(jpeg.recompress(alone[None])[0], together)


@pytest.mark.parametrize("kernel", [lanczos, centre])
@pytest.mark.parametrize(("source", "target"), [(256, 224), (84, 224), (40, 40), (480, 112)])
def test_resizes_keep_plain_colours_and_mirrors(kernel, source, target):
    weights = kernel(source, target)
    assert weights.shape == (target, source)
    torch.testing.assert_close(weights.sum(1), torch.ones(target))
    torch.testing.assert_close(weights, weights.flip(0, 1), rtol=0, atol=1e-4)


def test_a_resize_to_the_same_size_is_none():
    torch.testing.assert_close(lanczos(56, 56), torch.eye(56), rtol=0, atol=1e-6)


def test_the_crop_covers_nine_tenths_of_the_area():
    ramp = torch.arange(224.0)
    seen = centre(224, 224) @ ramp
    assert float((seen[-1] - seen[0]) ** 2 / 223**2) == pytest.approx(0.9, rel=1e-5)
    assert float(seen[0] + seen[-1]) == pytest.approx(223, rel=1e-5)


@pytest.mark.parametrize("sides", [(256, 256), (128, 96), (20, 28)])
@pytest.mark.parametrize("size", [56, 224])
def test_any_camera_fits_any_network(sides, size):
    picture = np.stack([smooth(*sides), noise(sides)])
    levels = OfficialResize(size, CPU)(picture)
    assert levels.shape == (2, 3, size, size)
    assert torch.equal(levels, levels.round())
    assert levels.min() >= 0
    assert levels.max() <= 255


def test_two_cameras_are_prepared_on_their_own():
    config = PictureConfig(size=28, means=PUBLISHED_MEANS, stds=PUBLISHED_STDS)
    encoder = make_picture_encoder("official", config, CPU, torch.bfloat16)
    front, wrist = smooth(64, 64)[None], noise((32, 48))[None]
    both = encoder.encode([front, wrist])
    assert both.dtype == torch.bfloat16
    assert torch.equal(both, torch.cat([encoder.encode([front]), encoder.encode([wrist])], dim=1))


def test_the_roads_differ_by_a_crop():
    """A bright frame, as wide as what is cut off, is visible on one of them."""
    config = PictureConfig(size=224, means=PUBLISHED_MEANS, stds=PUBLISHED_STDS)
    picture = np.zeros((1, 256, 256, 3), np.uint8)
    picture[:, :2], picture[:, -2:], picture[:, :, :2], picture[:, :, -2:] = (255,) * 4
    rlinf, official = (
        make_picture_encoder(pipeline, config, CPU, torch.float32).encode([picture])
        for pipeline in ("rlinf", "official")
    )
    assert rlinf[0, 0].max() > 2
    assert official[0, 0].max() < 0
