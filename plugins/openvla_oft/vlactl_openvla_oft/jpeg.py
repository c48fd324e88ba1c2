"""What JPEG does to a picture, level by level, without writing a file.

Encoding and decoding lose something when colours are halved, when coefficients are rounded and in
the integer arithmetic of both; what lies between is lossless and is left out here. The arithmetic
is that of libjpeg as TensorFlow calls it: quality 95, chroma at half the size, the accurate
transform forward and the fast one back. The fast one truncates, which darkens and tints a picture
by up to a level on average, and decoders that use the accurate one do not reproduce that.

Pictures stay on their device, all at once. Everything is int32.

Shapes: B pictures, H and W their sides; h and w sides of a channel in blocks of 8 x 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

BLOCK = 8
QUALITY_PERCENT = 10
"""What quality 95 makes of the standard tables."""
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
CENTRE = 128

COLOUR_BITS = 16
"""Fixed point of the colour matrices."""
FORWARD_BITS = 13
"""Fixed point of the accurate transform's constants."""
INVERSE_BITS = 8
"""Fixed point of the fast transform's constants."""
FIRST_PASS_BITS = 2
"""Bits that values gain in the first of two passes, and lose in the second."""
TABLE_BITS = 12
"""Fixed point of the fast transform's scaled table, which keeps 2 bits of it."""

Transform = Callable[..., tuple[torch.Tensor, ...]]


def recompress(levels: torch.Tensor) -> torch.Tensor:
    """Levels [B, 3, H, W] of red, green and blue after encoding and decoding, int32."""
    height, width = levels.shape[2:]
    luma, *chroma = _to_luma_and_chroma(_pad_right(levels.int(), 2 * BLOCK))
    luma = _through_blocks(luma, LUMINANCE)[..., :width]
    halved = _through_blocks(_halve(torch.cat(chroma)), CHROMINANCE)
    doubled = _double(halved[..., : (width + 1) // 2])[:, :height, :width]
    return _to_colours(luma, *(doubled - CENTRE).chunk(2))


# --------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------
def _to_luma_and_chroma(colours: torch.Tensor) -> tuple[torch.Tensor, ...]:
    red, green, blue = colours.unbind(1)
    half = 1 << (COLOUR_BITS - 1)
    offset = (CENTRE << COLOUR_BITS) + half - 1
    luma = 19595 * red + 38470 * green + 7471 * blue + half
    to_blue = -11059 * red - 21709 * green + 32768 * blue + offset
    to_red = 32768 * red - 27439 * green - 5329 * blue + offset
    return luma >> COLOUR_BITS, to_blue >> COLOUR_BITS, to_red >> COLOUR_BITS


def _to_colours(luma: torch.Tensor, blue: torch.Tensor, red: torch.Tensor) -> torch.Tensor:
    half = 1 << (COLOUR_BITS - 1)
    changes = (91881 * red, -22554 * blue - 46802 * red, 116130 * blue)
    colours = [luma + ((change + half) >> COLOUR_BITS) for change in changes]
    return torch.stack(colours, dim=1).clamp(0, 255)


def _halve(chroma: torch.Tensor) -> torch.Tensor:
    """Means of 2 x 2; a half is rounded down and up in turn, from column to column."""
    chroma = _pad_below(chroma, 2)
    sums = chroma.unflatten(-2, (-1, 2)).sum(-2).unflatten(-1, (-1, 2)).sum(-1)
    bias = 1 + torch.arange(sums.shape[-1], device=sums.device) % 2
    return (sums.int() + bias.int()) >> 2


def _double(chroma: torch.Tensor) -> torch.Tensor:
    """Each value next to the middle of four counts by its distance: 9, 3, 3 and 1 sixteenths."""
    rows = torch.stack(_thirds(chroma, -2), dim=-2).flatten(-3, -2)
    left, right = _thirds(rows, -1)
    return torch.stack([(left + 8) >> 4, (right + 7) >> 4], dim=-1).flatten(-2)


def _thirds(values: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three times each value plus that before it, and plus that after it; edges are repeated."""
    length = values.shape[axis]
    before = torch.cat([values.narrow(axis, 0, 1), values.narrow(axis, 0, length - 1)], axis)
    after = torch.cat([values.narrow(axis, 1, length - 1), values.narrow(axis, -1, 1)], axis)
    return 3 * values + before, 3 * values + after


# --------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------
def _through_blocks(channel: torch.Tensor, table: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Transform a channel [B, H, W], round its coefficients and transform them back."""
    height = channel.shape[-2]
    channel = _pad_below(channel, BLOCK)
    grid = channel.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    blocks = grid.permute(2, 4, 0, 1, 3).contiguous()  # [8, 8, B, h, w]: passes are long loops
    steps = _steps(table).to(channel.device)
    coefficients = _round_to(_forward(blocks - CENTRE), steps * BLOCK)
    scales = _rounded(steps * _fast_scales().to(channel.device), TABLE_BITS)
    levels = (_inverse(coefficients * scales) + CENTRE).clamp(0, 255)
    return levels.permute(2, 3, 0, 4, 1).flatten(-2).flatten(-3, -2)[..., :height, :]


def _steps(table: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """What coefficients are rounded to multiples of, [8, 8, 1, 1, 1]."""
    steps = (torch.tensor(table, dtype=torch.int32) * QUALITY_PERCENT + 50) // 100
    return steps.clamp(min=1)[..., None, None, None]


def _fast_scales() -> torch.Tensor:
    """The part of the fast transform that its table takes over, [8, 8, 1, 1, 1]; 14 bits."""
    angles = torch.arange(BLOCK, dtype=torch.float64) * torch.pi / 16
    scales = angles.cos() * 2**0.5
    scales[0] = 1.0
    return (torch.outer(scales, scales) * 2**14).round().int()[..., None, None, None]


def _round_to(values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    nearest = torch.div(values.abs() + (steps >> 1), steps, rounding_mode="floor")
    return nearest * values.sign()


def _forward(blocks: torch.Tensor) -> torch.Tensor:
    first = _rounded(_along(_accurate, blocks, 1), FORWARD_BITS - FIRST_PASS_BITS)
    return _rounded(_along(_accurate, first, 0), FORWARD_BITS + FIRST_PASS_BITS)


def _inverse(coefficients: torch.Tensor) -> torch.Tensor:
    columns = _along(_fast, coefficients, 0)
    return _along(_fast, columns, 1) >> (FIRST_PASS_BITS + 3)


def _along(transform: Transform, blocks: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.stack(transform(*blocks.unbind(axis)), dim=axis)


def _rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    return (values + (1 << (bits - 1))) >> bits


def _accurate(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Eight values -> their cosine transform, times sqrt(8), in `FORWARD_BITS` fixed point.

    The factorisation of Loeffler, Ligtenberg and Moschytz: which constants are rounded decides
    over the last bit.
    """
    s0, s1, s2, s3 = (x[i] + x[7 - i] for i in range(4))
    d0, d1, d2, d3 = (x[i] - x[7 - i] for i in range(4))
    inner, outer = s1 - s2, s0 - s3
    turned = 4433 * (inner + outer)
    mixed = 9633 * (d3 + d1 + d2 + d0)
    p = -7373 * (d3 + d0)
    q = -20995 * (d2 + d1)
    r = -16069 * (d3 + d1) + mixed
    s = -3196 * (d2 + d0) + mixed
    return (
        (s0 + s3 + s1 + s2) << FORWARD_BITS,
        12299 * d0 + p + s,
        turned + 6270 * outer,
        25172 * d1 + q + r,
        (s0 + s3 - s1 - s2) << FORWARD_BITS,
        16819 * d2 + q + s,
        turned - 15137 * inner,
        2446 * d3 + p + r,
    )


def _fast(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Eight scaled coefficients -> values, with one truncation per product.

    The factorisation of Arai, Agui and Nakajima.
    """
    cross = ((362 * (x[2] - x[6])) >> INVERSE_BITS) - (x[2] + x[6])
    e0, e3 = x[0] + x[4] + (x[2] + x[6]), x[0] + x[4] - (x[2] + x[6])
    e1, e2 = x[0] - x[4] + cross, x[0] - x[4] - cross
    sum_35, difference_53 = x[5] + x[3], x[5] - x[3]
    sum_17, difference_17 = x[1] + x[7], x[1] - x[7]
    turned = (473 * (difference_53 + difference_17)) >> INVERSE_BITS
    o0 = sum_17 + sum_35
    o1 = ((-669 * difference_53) >> INVERSE_BITS) + turned - o0
    o2 = ((362 * (sum_17 - sum_35)) >> INVERSE_BITS) - o1
    o3 = ((277 * difference_17) >> INVERSE_BITS) - turned + o2
    return e0 + o0, e1 + o1, e2 + o2, e3 - o3, e3 + o3, e2 - o2, e1 - o1, e0 - o0


# --------------------------------------------------------------------------------------------
# Edges
# --------------------------------------------------------------------------------------------
def _pad_right(values: torch.Tensor, multiple: int) -> torch.Tensor:
    return values[..., _repeating_last(values.shape[-1], multiple)]


def _pad_below(values: torch.Tensor, multiple: int) -> torch.Tensor:
    return values[..., _repeating_last(values.shape[-2], multiple), :]


def _repeating_last(length: int, multiple: int) -> torch.Tensor | slice:
    """Indices up to a multiple."""
    if length % multiple == 0:
        return slice(None)
    return torch.arange(length + -length % multiple).clamp(max=length - 1)
