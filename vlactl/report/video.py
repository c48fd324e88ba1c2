"""Films of episodes: MP4 files that every browser plays, and grids of several episodes.

Demonstrations are films, too, of a higher quality; those are joined and read again. A frame is
uint8 [H, W, 3] RGB. Frames are piped to and from the ffmpeg that `imageio-ffmpeg` carries, or that
IMAGEIO_FFMPEG_EXE names; a film appears under its final name only if ffmpeg reports success.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from vlactl.errors import EnvironmentNotReadyError, IntegrityError, UserError
from vlactl.report.atomic import atomic_path

Frame = np.ndarray

SUCCESS_COLOUR = (40, 180, 60)
FAILURE_COLOUR = (210, 50, 40)
BORDER = 3
MAX_NAME_LENGTH = 120

FILM = ("-crf", "20")
"""Encoder settings for people."""
RECORDING = ("-crf", "14", "-g", "10", "-bf", "0", "-threads", "1")
"""For networks: hardly any loss, cheap seeking, nothing that hinders joining; one core."""


# --------------------------------------------------------------------------------------------
# Encoding
# --------------------------------------------------------------------------------------------
def write_video(
    path: Path, frames: Iterable[Frame], fps: float, encoding: Sequence[str] = FILM
) -> None:
    """Write frames of one size as H.264 in an MP4 container.

    Odd sizes get a black row or column: the pixel format that browsers play needs even ones.
    `encoding` is `FILM` or `RECORDING`.

    Raises:
        EnvironmentNotReadyError: there is no working encoder; no file is left behind.
        ValueError: there are no frames, or their sizes differ.
    """
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise ValueError("a film needs at least one frame")
    with atomic_path(path) as temporary:
        command = _encode_command(temporary, first.shape, fps, encoding)
        with _ffmpeg(command, stdin=subprocess.PIPE, result=temporary) as process:
            assert process.stdin is not None
            _feed(process.stdin, first.shape, itertools.chain([first], remaining))


def join_videos(path: Path, parts: Sequence[Path], lengths: Sequence[int], fps: float) -> None:
    """Put recordings of `lengths` frames one after the other, without encoding them again.

    Frame i of the whole is shown at i / fps seconds. No file is left behind by an error.

    Raises:
        EnvironmentNotReadyError: there is no working encoder.
        IntegrityError: a recording is missing, damaged or of another length.
    """
    for part, length in zip(parts, lengths, strict=True):
        _check_length(part, length)
    with atomic_path(path) as temporary, tempfile.NamedTemporaryFile("w", suffix=".txt") as listing:
        lines = (
            f"file {_quoted(part.absolute())}\nduration {length / fps!r}\n"
            for part, length in zip(parts, lengths, strict=True)
        )
        listing.write("ffconcat version 1.0\n" + "".join(lines))
        listing.flush()
        command = [
            *("-y", "-f", "concat", "-safe", "0", "-i", listing.name),
            *("-c", "copy", "-movflags", "+faststart", str(temporary.absolute())),
        ]
        with _ffmpeg(command, result=temporary):
            pass


def _check_length(recording: Path, length: int) -> None:
    """Check that all frames of a recording are there; none is decoded."""
    command = ["-i", str(recording.absolute()), "-c", "copy", "-f", "framecrc", "-"]
    with _ffmpeg(command, stdout=subprocess.PIPE, failure=_unreadable(recording)) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    found = sum(not line.startswith(b"#") for line in lines)
    if found != length:
        raise IntegrityError(f"{recording} is damaged: it has {found} frames, not {length}")


def read_video(
    path: Path, shape: tuple[int, int], fps: float, first: int, count: int
) -> Iterator[Frame]:
    """Decode frames of a recording.

    Args:
        path: what `write_video` or `join_videos` wrote.
        shape: height and width of the frames that are wanted; areas are averaged.
        fps: of the recording.
        first: index of the first frame.
        count: of frames.

    Raises:
        EnvironmentNotReadyError: there is no working decoder.
        IntegrityError: there are not as many frames, or they are damaged where that shows.
    """
    height, width = shape
    # Without these flags colours come out more than a level too dark.
    scale = f"scale={width}:{height}:flags=area+accurate_rnd+full_chroma_int"
    # Half a frame early: a time is rounded, and frames before it are dropped.
    start = max(0.0, (first - 0.5) / fps)
    command = [
        *("-err_detect", "explode", "-ss", f"{start:.6f}", "-i", str(path.absolute())),
        *("-frames:v", str(count), "-vf", scale),
        *("-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
    ]
    with _ffmpeg(command, stdout=subprocess.PIPE, failure=_unreadable(path)) as process:
        assert process.stdout is not None
        for index in range(count):
            content = process.stdout.read(height * width * 3)
            if len(content) < height * width * 3:
                raise IntegrityError(f"{path} ends at frame {first + index}, or cannot be read")
            yield np.frombuffer(content, np.uint8).reshape(height, width, 3)
        process.stdout.read()


@contextmanager
def _ffmpeg(
    arguments: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    result: Path | None = None,
    failure: Callable[[str], UserError] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ffmpeg while the block deals with it; wait for its success and the file it makes.

    `failure` makes the error of the last line of its log; None = the encoder is to blame.
    """
    with tempfile.TemporaryFile() as log:
        with _start(arguments, stdin, stdout, log) as process:
            yield process
        if process.returncode != 0 or not (result is None or result.exists()):
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
            raise (failure or _encoder_error)(said[-1])


def _feed(pipe: IO[bytes], shape: tuple[int, ...], frames: Iterable[Frame]) -> None:
    """Write all frames, or as many as the encoder takes: why it gave up is in its log."""
    for frame in frames:
        if frame.shape != shape:
            raise ValueError(f"a frame of shape {frame.shape} in a film of {shape}")
        try:
            pipe.write(frame.astype(np.uint8, copy=False).tobytes())
        except BrokenPipeError:
            break
    with suppress(BrokenPipeError):
        pipe.close()


def _start(
    arguments: Sequence[str], stdin: int, stdout: int, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]

        program = imageio_ffmpeg.get_ffmpeg_exe()
        command = [program, "-loglevel", "error", "-xerror", "-nostats", *arguments]
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=log)
    except (ImportError, OSError, RuntimeError) as error:
        raise _encoder_error(str(error)) from error


def _encode_command(
    path: Path, shape: tuple[int, ...], fps: float, encoding: Sequence[str]
) -> list[str]:
    size = f"{shape[1]}x{shape[0]}"
    return [
        *("-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", f"{fps:g}", "-i", "-"),
        *("-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"),
        *("-c:v", "libx264", *encoding, "-pix_fmt", "yuv420p", "-movflags", "+faststart"),
        str(path.absolute()),
    ]


def _quoted(path: Path) -> str:
    """A path as ffmpeg's lists of files have it."""
    return "'" + str(path).replace("'", "'\\''") + "'"


def _unreadable(path: Path) -> Callable[[str], IntegrityError]:
    return lambda reason: IntegrityError(f"{path} cannot be read: {reason}")


def _encoder_error(reason: str) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"cannot write films: the video encoder failed: {reason}",
        hint="fix: pip install --force-reinstall imageio-ffmpeg, and unset IMAGEIO_FFMPEG_EXE "
        "or let it name an ffmpeg with libx264",
    )


# --------------------------------------------------------------------------------------------
# Frames
# --------------------------------------------------------------------------------------------
def upscale(frame: Frame, minimum: int = 256) -> Frame:
    """Enlarge by a whole factor, without blurring, until both sides have `minimum` pixels."""
    factor = math.ceil(minimum / min(frame.shape[:2]))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def grid(clips: Sequence[Sequence[Frame]], outcomes: Sequence[bool]) -> Iterator[Frame]:
    """Show clips side by side, framed in green (success) or red, until the longest has ended.

    Args:
        clips: frames of one size, at least one per clip; a clip that is over keeps its last frame.
        outcomes: whether the episode of each clip succeeded.
    """
    columns = math.ceil(math.sqrt(len(clips)))
    for step in range(max(map(len, clips), default=0)):
        tiles = [
            _bordered(clip[min(step, len(clip) - 1)], success)
            for clip, success in zip(clips, outcomes, strict=True)
        ]
        yield _tiled(tiles, columns)


def _bordered(frame: Frame, success: bool) -> Frame:
    height, width, _ = frame.shape
    tile = np.empty((height + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    tile[:] = SUCCESS_COLOUR if success else FAILURE_COLOUR
    tile[BORDER:-BORDER, BORDER:-BORDER] = frame
    return tile


def _tiled(tiles: Sequence[Frame], columns: int) -> Frame:
    height, width, _ = tiles[0].shape
    rows = math.ceil(len(tiles) / columns)
    canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height, left : left + width] = tile
    return canvas


def film_name(task: int, name: str, trial: int, success: bool) -> str:
    """A file name that says what the film shows, in characters that every system allows."""
    outcome = "success" if success else "failure"
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = f"task-{task:02d}_trial-{trial:02d}_{outcome}_{words}"
    return stem[: MAX_NAME_LENGTH - len(".mp4")].rstrip("-_") + ".mp4"
