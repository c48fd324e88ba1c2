"""Films: decoded back after encoding, and encoders that do not work."""

import os
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from vlactl.errors import EnvironmentNotReadyError, IntegrityError
from vlactl.report.video import (
    BORDER,
    FAILURE_COLOUR,
    RECORDING,
    SUCCESS_COLOUR,
    film_name,
    grid,
    join_videos,
    read_video,
    upscale,
    write_video,
)


def plain(value: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def ffmpeg(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *arguments]
    return subprocess.run(command, capture_output=True, check=False)


def decoded(path: Path, height: int, width: int) -> np.ndarray:
    """All frames, uint8 [T, H, W, 3]."""
    pixels = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-").stdout
    return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)


def described(path: Path) -> str:
    return ffmpeg("-i", path).stderr.decode()


# --------------------------------------------------------------------------------------------
# Encoding
# --------------------------------------------------------------------------------------------
def test_film_holds_all_frames(tmp_path):
    path = tmp_path / "films" / "a.mp4"
    write_video(path, (plain(value) for value in range(0, 200, 20)), fps=20)
    frames = decoded(path, 32, 48)
    assert len(frames) == 10
    for frame, value in zip(frames, range(0, 200, 20), strict=True):
        assert abs(frame.mean() - value) < 6
    assert list(path.parent.iterdir()) == [path]


def test_film_plays_in_browsers(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, [plain(0), plain(255)], fps=12.5)
    facts = described(path)
    assert all(fact in facts for fact in ("h264", "yuv420p", "48x32", "12.5", "fps"))
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index comes first"


def test_odd_sizes_are_padded(tmp_path):
    write_video(tmp_path / "a.mp4", [plain(200, 33, 47)] * 3, fps=10)
    assert "48x34" in described(tmp_path / "a.mp4")
    frames = decoded(tmp_path / "a.mp4", 34, 48)
    assert len(frames) == 3
    assert frames[0, 10:20, 10:20].mean() > 190


@pytest.mark.parametrize(
    "script",
    [
        None,
        "#!/bin/sh\necho 'Unknown encoder libx264' >&2\nexit 1\n",
        '#!/bin/sh\nfor last; do true; done\necho half > "$last"\ncat > /dev/null\nexit 1\n',
        "#!/bin/sh\ncat > /dev/null\n",
    ],
    ids=["missing", "dies at once", "dies at the end", "writes nothing"],
)
def test_broken_encoder(tmp_path, monkeypatch, script):
    encoder = tmp_path / "ffmpeg"
    if script is not None:
        encoder.write_text(script)
        encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", os.fspath(encoder))
    films = tmp_path / "films"
    with pytest.raises(EnvironmentNotReadyError, match="cannot write films") as caught:
        write_video(films / "a.mp4", [plain(0, 256, 256)] * 20, fps=10)
    assert "imageio-ffmpeg" in caught.value.hint
    assert list(films.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, BrokenPipeError])
def test_failing_frames_leave_no_film(tmp_path, error):
    def frames():
        yield plain(0)
        raise error("the simulator died")

    with pytest.raises(error, match="the simulator died"):
        write_video(tmp_path / "a.mp4", frames(), fps=10)
    assert list(tmp_path.iterdir()) == []


def test_films_need_frames_of_one_size(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", [], fps=10)
    with pytest.raises(ValueError, match="in a film of"):
        write_video(tmp_path / "a.mp4", [plain(0), plain(0, 64, 64)], fps=10)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------
# Recordings
# --------------------------------------------------------------------------------------------
LENGTHS = (7, 23, 1, 12)


def shaded(number: int, size: int = 32) -> np.ndarray:
    """A picture without sharp edges that tells its number by its brightness."""
    ramp = np.linspace(0, 40, size)
    grey = np.add.outer(ramp, ramp) + 4 * number
    return np.stack([grey, grey + 5, 0.5 * grey], axis=-1).astype(np.uint8)


@pytest.fixture
def recording(tmp_path) -> Path:
    """Frame i of the whole is `shaded(i)`."""
    parts = [tmp_path / "it's part" / f"{index}.mp4" for index in range(len(LENGTHS))]
    begins = np.cumsum([0, *LENGTHS])
    for part, begin, length in zip(parts, begins, LENGTHS, strict=False):
        write_video(part, map(shaded, range(begin, begin + length)), 20, RECORDING)
    join_videos(tmp_path / "whole.mp4", parts, LENGTHS, 20)
    return tmp_path / "whole.mp4"


def test_joined_recordings_show_every_frame_at_its_time(recording):
    facts = ffmpeg("-i", recording, "-vf", "showinfo", "-f", "null", "-").stderr.decode()
    times = [float(time) for time in re.findall(r"pts_time:(\S+)", facts)]
    assert times == pytest.approx([index / 20 for index in range(sum(LENGTHS))], abs=1e-5)


@pytest.mark.parametrize(("first", "count"), [(0, 43), (7, 23), (6, 2), (29, 3), (42, 1)])
def test_any_part_of_a_recording_can_be_read(recording, first, count):
    frames = list(read_video(recording, (32, 32), 20, first, count))
    assert len(frames) == count
    for frame, number in zip(frames, range(first, first + count), strict=True):
        assert np.abs(frame.astype(int) - shaded(number)).mean() < 1.5, "a neighbour is 4 away"


def test_recordings_can_be_read_smaller(recording):
    (frame,) = read_video(recording, (16, 16), 20, 20, 1)
    means = shaded(20).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(frame - means).mean() < 1.5


def test_recordings_that_end_too_early_are_told(recording):
    with pytest.raises(IntegrityError, match="ends at frame 43"):
        list(read_video(recording, (32, 32), 20, 40, 5))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "shorter"])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_recordings_are_joined_whole_or_not_at_all(recording, tmp_path, damage, index):
    parts = [tmp_path / "it's part" / f"{number}.mp4" for number in range(len(LENGTHS))]
    if damage == "missing":
        parts[index].unlink()
    elif damage == "shorter":
        write_video(parts[index], [shaded(0)] * (LENGTHS[index] - 1), 20, RECORDING)
    else:
        content = parts[index].read_bytes()
        parts[index].write_bytes(content[: 0 if damage == "empty" else len(content) * 3 // 4])
    with pytest.raises(IntegrityError, match=rf"{index}\.mp4"):
        join_videos(tmp_path / "again.mp4", parts, LENGTHS, 20)
    assert not (tmp_path / "again.mp4").exists()


def test_rotten_pictures_are_not_read(tmp_path):
    """What the decoder would conceal: bytes of a picture that mean nothing."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8)
    write_video(tmp_path / "film.mp4", noise, 20, RECORDING)
    content = bytearray((tmp_path / "film.mp4").read_bytes())
    for place in range(len(content) // 2, len(content) - 100, 2000):
        content[place : place + 16] = np.random.default_rng(place).bytes(16)
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"film\.mp4"):
        list(read_video(tmp_path / "film.mp4", (64, 64), 20, 0, 20))


def test_reading_can_stop_early(recording):
    frames = read_video(recording, (32, 32), 20, 0, 43)
    next(frames)
    frames.close()


# --------------------------------------------------------------------------------------------
# Frames
# --------------------------------------------------------------------------------------------
def test_grid_holds_the_last_frame_of_short_clips():
    clips = [[plain(10)], [plain(20), plain(30), plain(40)], [plain(50)] * 2]
    frames = list(grid(clips, [True, False, True]))
    assert len(frames) == 3
    height, width = 32 + 2 * BORDER, 48 + 2 * BORDER
    assert all(frame.shape == (2 * height, 2 * width, 3) for frame in frames)
    assert [frame[height // 2, width // 2, 0] for frame in frames] == [10, 10, 10]
    assert [frame[height // 2, width + width // 2, 0] for frame in frames] == [20, 30, 40]
    assert not frames[0][height:, width:].any(), "the empty place is black"


def test_grid_is_framed_by_outcome():
    (frame,) = grid([[plain(0)], [plain(0)]], [True, False])
    width = 48 + 2 * BORDER
    assert frame.shape == (32 + 2 * BORDER, 2 * width, 3)
    for left, colour in ((0, SUCCESS_COLOUR), (width, FAILURE_COLOUR)):
        tile = frame[:, left : left + width]
        edges = tile[:BORDER], tile[-BORDER:], tile[:, :BORDER], tile[:, -BORDER:]
        assert all((edge == colour).all() for edge in edges)
        assert not tile[BORDER:-BORDER, BORDER:-BORDER].any()


def test_grid_of_nothing_is_empty():
    assert list(grid([], [])) == []


def test_upscale_repeats_pixels():
    frame = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    large = upscale(frame, minimum=5)
    assert large.shape == (6, 9, 3)
    assert np.array_equal(large[::3, ::3], frame)
    assert np.array_equal(large[2::3, 2::3], frame)
    assert np.array_equal(upscale(plain(1, 300, 400)), plain(1, 300, 400))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((3, "Pick up the bowl", 7, True), "task-03_trial-07_success_pick-up-the-bowl.mp4"),
        ((103, "../../x\n:y", 0, False), "task-103_trial-00_failure_x-y.mp4"),
        ((0, "\u676f", 0, False), "task-00_trial-00_failure.mp4"),
    ],
)
def test_film_names(arguments, name):
    assert film_name(*arguments) == name


def test_film_names_are_short():
    name = film_name(0, "a very long instruction " * 20, 0, True)
    assert len(name) <= 120
    assert name.endswith(".mp4")
