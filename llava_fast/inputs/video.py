"""Frames of a video, decoding only what is needed: decord for local files, PyAV where decord is not installed and for all bytes.

Sampling is LLaVA-NeXT's (`process_video_with_decord` in llava/utils.py). A file's packets are read with PyAV first: decord prints
to stderr on a broken file and gives wrong frames of some sound ones, which then go to PyAV (tests/test_video.py compares both with a
full decode).
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from llava_fast.inputs.fetch import fetch, is_url
from llava_fast.inputs.images import file_size, image_size, open_image, source_name
from llava_fast.requests import InputOptions

try:
    import decord
except ImportError:  # no wheel for this platform
    decord = None

DEFAULT_FRAMES = 16  # of the interleave demo
FOLDER_FPS = 2.0  # LLaVA-NeXT's assumption for folders of frames taken beforehand
MAX_FRAMES = 1024
MAX_VIDEO_BYTES = 512 << 20  # of bytes held in memory; a local file is not read whole
MAX_VIDEO_PIXELS = 1 << 29  # of all frames taken from one video: 1.6 GB of RGB, 64 frames in 4K
MAX_SECONDS = 12 * 3600
FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Where decord was seen to give the frames of a full decode. Elsewhere it gives others, without a word: in MPEG-TS, where a group
# of pictures is open (frames shown before the key frame they are decoded after), and for MPEG-4 part 2 (off by one level).
DECORD_CODECS = {"h264", "hevc", "vp8", "vp9"}
DECORD_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}


Sampling = tuple[int | None, float | None, int, bool]  # num_frames, fps, upbound, force


@dataclass(frozen=True)
class Video:
    """frames uint8 [F, H, W, 3], RGB; times, seconds from the start, index / average rate; indices in the video."""

    frames: np.ndarray
    times: list[float]
    indices: list[int]


def frame_indices(
    total: int, avg_fps: float, num_frames: int | None = None, fps: float | None = None, upbound: int = 0, force: bool = False
) -> list[int]:
    """Which frames of `total` are taken.

    num_frames n: linspace(0, total - 1, n), truncated; a video shorter than n gives some frames twice.
    fps: every round(avg_fps / fps)-th frame (at least every one); with an upbound > 0 that this passes, or with force,
    linspace(0, total - 1, upbound) instead. Neither: n = 16, or with an upbound fps = 1 (upstream's video_fps).
    Raises ValueError for both, and for values out of range.
    """
    num_frames, fps, upbound, force = _by_default(num_frames, fps, upbound, force)
    if total < 1:
        raise ValueError(f"a video must have at least one frame, got {total}")
    if num_frames is not None and fps is not None:
        raise ValueError(f"give num_frames or fps, not both (got {num_frames} and {fps})")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be >= 1, got {num_frames}")
    if fps is None:
        assert num_frames is not None
        return np.linspace(0, total - 1, num_frames, dtype=int).tolist()
    if not fps > 0 or not avg_fps > 0:
        raise ValueError(f"fps must be > 0, got fps {fps} for a video of {avg_fps} frames per second")
    indices = list(range(0, total, max(1, round(avg_fps / fps))))
    if upbound > 0 and (len(indices) > upbound or force):
        return np.linspace(0, total - 1, upbound, dtype=int).tolist()
    return indices


def _by_default(num_frames: int | None, fps: float | None, upbound: int, force: bool) -> Sampling:
    if num_frames is None and fps is None:
        return (None, 1.0, upbound, force) if upbound > 0 else (DEFAULT_FRAMES, None, 0, False)
    return num_frames, fps, upbound, force


def load_frames(
    source: Any,
    num_frames: int | None = None,
    fps: float | None = None,
    upbound: int = 0,
    force: bool = False,
    options: InputOptions | None = None,
) -> Video:
    """The sampled frames of a video: a path, bytes, an http(s) address of an allowed host, a folder of pictures in the order of
    their names (taken to be 2 a second), or a list of pictures or uint8 [F, H, W, 3] (all of them, unless num_frames or fps says
    else, or there are more than upbound). For num_frames, fps, upbound and force see `frame_indices`.

    Raises ValueError naming the source: missing, empty, not a video, damaged, or past a cap on frames, pixels, bytes or seconds.
    """
    sampling = (num_frames, fps, upbound, force)
    if isinstance(source, np.ndarray):
        return _from_array(source, sampling)
    if isinstance(source, (list, tuple)):
        return _from_pictures(source, sampling, "a list of frames", options)
    if is_url(source):
        source = fetch(source, options.allowed_media_hosts if options else (), MAX_VIDEO_BYTES)
    name = _name(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_container(_held(bytes(source), name), name, sampling)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"a video must be a path, bytes, folder, list of frames or http(s) address, got {name}")
    path, pictures = _look(source, name)
    if pictures is not None:
        return _from_pictures(pictures, _by_default(*sampling), name, options)
    return _from_container(path, name, sampling)


def count_frames(
    source: str | os.PathLike[str] | bytes, num_frames: int | None = None, fps: float | None = None, upbound: int = 0, force: bool = False
) -> int:
    """How many frames `load_frames` gives of a file, its bytes, or a folder, from the file's packets; nothing is read where the count is
    given. Raises ValueError as that does for what packets and names can show."""
    sampling = _by_default(num_frames, fps, upbound, force)
    if sampling[0] is not None and fps is None:
        return sampling[0]
    return len(_chosen(source, sampling)[0])


def check_video(
    source: str | os.PathLike[str] | bytes, num_frames: int | None = None, fps: float | None = None, upbound: int = 0, force: bool = False
) -> None:
    """Raises ValueError as `load_frames` does for what packets, or of a folder the headers of the frames that are taken, can show."""
    indices, pictures = _chosen(source, _by_default(num_frames, fps, upbound, force))
    sizes = {index: image_size(pictures[index]) for index in dict.fromkeys(indices)} if pictures is not None else {}
    for index in sizes:
        _check_size(sizes[index], sizes[indices[0]], len(indices), _name(source))


def _chosen(source: str | os.PathLike[str] | bytes, sampling: Sampling) -> tuple[list[int], list[Path] | None]:
    """The frames that are taken of a file, its bytes or a folder, and a folder's pictures."""
    name = _name(source)
    path, pictures = (_held(source, name), None) if isinstance(source, bytes) else _look(source, name)
    if pictures is not None:
        return _choose(len(pictures), FOLDER_FPS, sampling, (1, 1), name), pictures
    with _opened(path, name, sampling) as (_, _, _, indices):
        return indices, None


def _name(source: Any) -> str:
    return source_name(source).replace("a picture of", "a video of")


def _held(data: bytes, name: str) -> io.BytesIO:
    if not data:
        raise ValueError(f"{name} is empty (0 bytes), expected a video")
    if len(data) > MAX_VIDEO_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes, more than the cap of {MAX_VIDEO_BYTES}")
    return io.BytesIO(data)


def _look(source: str | os.PathLike[str], name: str) -> tuple[str, list[Path] | None]:
    """The path of a video file, or of a folder, with its pictures in order."""
    path = os.fspath(source)
    if "\0" in path or not os.path.isdir(path):
        if file_size(path, name) == 0:
            raise ValueError(f"{name} is empty (0 bytes), expected a video")
        return path, None
    pictures = [Path(path, file) for file in sorted(os.listdir(path)) if Path(file).suffix.lower() in FRAME_SUFFIXES]
    if not pictures:
        raise ValueError(f"{name} is a folder without pictures, expected the frames of a video")
    return path, pictures


def _choose(total: int, avg_fps: float, sampling: Sampling, size: tuple[int, int], name: str) -> list[int]:
    indices = frame_indices(total, avg_fps, *sampling)
    (w, h), count = size, len(indices)
    if count > MAX_FRAMES:
        raise ValueError(f"{name} would give {count} frames, more than the cap of {MAX_FRAMES}: ask for fewer with num_frames or fps")
    if count * w * h > MAX_VIDEO_PIXELS:
        raise ValueError(f"{name} would give {count} frames of {w}x{h}, more than the cap of {MAX_VIDEO_PIXELS} pixels")
    return indices


def _video(frames: np.ndarray, indices: list[int], avg_fps: float) -> Video:
    return Video(frames, [index / avg_fps for index in indices], indices)


def _from_array(frames: np.ndarray, sampling: Sampling) -> Video:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"an array of frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    sampled = sampling if sampling[:2] != (None, None) else (None, FOLDER_FPS, *sampling[2:])
    indices = _choose(len(frames), FOLDER_FPS, sampled, (frames.shape[2], frames.shape[1]), "an array of frames")
    return _video(frames[indices], indices, FOLDER_FPS)


def _from_pictures(pictures: Sequence[Any], sampling: Sampling, name: str, options: InputOptions | None) -> Video:
    if not pictures:
        raise ValueError(f"{name} is empty, expected at least one frame")
    sampled = sampling if sampling[:2] != (None, None) else (None, FOLDER_FPS, *sampling[2:])
    indices = _choose(len(pictures), FOLDER_FPS, sampled, (1, 1), name)
    opened: dict[int, Image.Image] = {}
    for index in indices:
        frame = opened.setdefault(index, open_image(pictures[index], options) if index not in opened else opened[index])
        _check_size(frame.size, opened[indices[0]].size, len(indices), name)
    return _video(np.stack([np.asarray(opened[index]) for index in indices]), indices, FOLDER_FPS)


def _check_size(size: tuple[int, int], first: tuple[int, int], count: int, name: str) -> None:
    (w, h), (first_w, first_h) = size, first
    if size != first:
        raise ValueError(f"{name} has frames of {first_w}x{first_h} and {w}x{h}: give pictures of several sizes as images")
    if count * w * h > MAX_VIDEO_PIXELS:
        raise ValueError(f"{name} would give {count} frames of {w}x{h}, more than {MAX_VIDEO_PIXELS} pixels")


@dataclass(frozen=True)
class Index:
    """A scan of a video's packets: total frames; times, of all frames in order, and keys, of the key frames (None where packets
    carry no times); closed, whether no frame is shown before a key frame that it is decoded after."""

    total: int
    times: list[int] | None
    keys: np.ndarray
    closed: bool


def _scan(container: Any, stream: Any) -> Index:
    packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if any(pts is None for pts, _ in packets):
        return Index(len(packets), None, np.empty(0), False)
    last_key, closed = -np.inf, True
    for pts, is_key in packets:
        closed = closed and pts >= last_key
        last_key = pts if is_key else last_key
    return Index(len(packets), sorted(pts for pts, _ in packets), np.array(sorted(pts for pts, key in packets if key)), closed)


@contextlib.contextmanager
def _opened(file: str | io.BytesIO, name: str, sampling: Sampling) -> Iterator[tuple[Any, Any, Index, list[int]]]:
    """A container, its first video stream, a scan of it and the frames to take, all within the caps. What FFmpeg finds wrong, here or
    while it is open, is a ValueError."""
    try:
        with av.open(file, mode="r") as container:
            if not container.streams.video:
                raise ValueError(f"{name} has no video stream")
            stream = container.streams.video[0]
            codec = stream.codec_context
            if not stream.average_rate or codec is None or codec.width < 1 or codec.height < 1:
                raise ValueError(f"{name} is not a video that can be read: no frame rate or size")
            seconds = (container.duration or 0) / av.time_base
            if seconds > MAX_SECONDS:
                raise ValueError(f"{name} is {seconds:.0f} s long, more than the cap of {MAX_SECONDS} s")
            index = _scan(container, stream)
            if index.total == 0:
                raise ValueError(f"{name} has no frames")
            yield container, stream, index, _choose(index.total, float(stream.average_rate), sampling, (codec.width, codec.height), name)
    except av.error.FFmpegError as error:
        raise ValueError(f"{name} is not a video that can be read: {error.strerror}") from None


def _from_container(file: str | io.BytesIO, name: str, sampling: Sampling) -> Video:
    with _opened(file, name, sampling) as (container, stream, index, indices):
        trusted = index.closed and stream.codec_context.name in DECORD_CODECS and container.format.name in DECORD_FORMATS
        if decord is not None and isinstance(file, str) and trusted:
            frames = _decode_decord(file, name, indices, index.total)
        else:
            decoded = _decode_by_seeking(container, stream, indices, index) or _decode_in_order(file, indices)
            if len(decoded) < len(set(indices)):
                raise ValueError(f"{name} is damaged or cut short: frame {max(indices)} of {index.total} cannot be decoded")
            frames = np.stack([decoded[i] for i in indices])
        return _video(frames, indices, float(stream.average_rate))


def _decode_decord(path: str, name: str, indices: list[int], total: int) -> np.ndarray:
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0))
        if len(reader) != total:
            raise ValueError(f"{name} is damaged: it has {total} frames by one count and {len(reader)} by another")
        return reader.get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise ValueError(f"{name} is damaged or cut short ({type(error).__name__} of decord)") from None


def _decode_by_seeking(container: Any, stream: Any, indices: list[int], index: Index) -> dict[int, np.ndarray]:
    """Each wanted frame from the last key frame before it, going on from the frame before where no key frame lies between.

    Empty where a frame is not found by its time: packets without times, or a container whose seeking is not exact (MPEG-TS).
    """
    decoded: dict[int, np.ndarray] = {}
    if index.times is None:
        return decoded
    frames: Any = None
    reached: float = -np.inf
    for wanted in sorted(set(indices)):
        target = index.times[wanted]
        before = index.keys[index.keys <= target]
        if not len(before):
            return {}
        if frames is None or before[-1] > reached:
            container.seek(int(before[-1]), stream=stream)
            frames = container.decode(stream)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= target), None)
        if frame is None or frame.pts != target:
            return {}
        reached = target
        decoded[wanted] = _upright(frame)
    return decoded


def _upright(frame: Any) -> np.ndarray:
    """RGB pixels, turned as the file says: decord does so by itself, PyAV only tells the degrees, counter-clockwise."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


def _decode_in_order(file: str | io.BytesIO, indices: list[int]) -> dict[int, np.ndarray]:
    wanted, last = set(indices), max(indices)
    decoded: dict[int, np.ndarray] = {}
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with av.open(file, mode="r") as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                decoded[number] = _upright(frame)
            if number == last:
                break
    return decoded
