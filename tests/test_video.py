"""Videos made from real photographs with PyAV: frames equal whichever decoder reads them, indices as LLaVA-NeXT chooses them."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import skimage
import sklearn.datasets
from PIL import Image

from llava_fast.inputs import video
from llava_fast.inputs.video import Video, count_frames, frame_indices, load_frames

PHOTOGRAPHS = [
    Path(sklearn.datasets.__file__).parent / "images" / "china.jpg",
    Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg",
    Path(skimage.__file__).parent / "data" / "astronaut.png",
    Path(skimage.__file__).parent / "data" / "chelsea.png",
]
SIZE = (160, 120)


def make_video(
    target, frames: int = 50, fps: int = 25, codec: str = "libx264", container: str | None = None, gop: int = 12, **options
) -> None:
    """Windows that slide over photographs, a cut every 15 frames, with B-frames and several key frames."""
    pictures = [Image.open(path).convert("RGB").resize((240, 180)) for path in PHOTOGRAPHS]
    with av.open(target, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.options = {"threads": "1", **options}
        for number in range(frames):
            left = number % 80
            window = pictures[number // 15 % 4].crop((left, left // 2, left + SIZE[0], left // 2 + SIZE[1]))
            for packet in stream.encode(av.VideoFrame.from_image(window)):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)


def decode_all(source) -> list[np.ndarray]:
    with av.open(source) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    make_video(str(path))
    return path


@pytest.fixture(params=["decord", "pyav", "bytes"])
def source(request, clip, monkeypatch):
    """The clip as decord reads it, as PyAV reads the file where decord is not installed, and as bytes."""
    if request.param == "bytes":
        return clip.read_bytes()
    if request.param == "pyav":
        monkeypatch.setattr(video, "decord", None)
    else:
        pytest.importorskip("decord")
        monkeypatch.setattr(video, "_decode_by_seeking", None)
    return clip


# --- which frames ---


@pytest.mark.parametrize("total", [1, 2, 7, 50, 301, 1000])
@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_uniform_sampling(total, n):
    step = (total - 1) / (n - 1) if n > 1 else 0
    want = [int(i * step) for i in range(n)]
    if n > 1:
        want[-1] = total - 1
    got = frame_indices(total, 25.0, num_frames=n)
    assert got == want == np.linspace(0, total - 1, n, dtype=int).tolist()


@pytest.mark.parametrize("total", [1, 30, 301, 900])
@pytest.mark.parametrize("avg_fps", [0.4, 10.0, 23.976, 25.0, 29.97, 60.0])
@pytest.mark.parametrize("fps", [0.5, 1, 2, 24])
@pytest.mark.parametrize("upbound", [0, 8, 32])
@pytest.mark.parametrize("force", [False, True])
def test_sampling_by_rate(total, avg_fps, fps, upbound, force):
    step = max(round(avg_fps / fps), 1)  # upstream divides by zero frames where this would be 0
    want = list(range(0, total, step))
    if upbound > 0 and (len(want) > upbound or force):
        want = np.linspace(0, total - 1, upbound, dtype=int).tolist()
    assert frame_indices(total, avg_fps, fps=fps, upbound=upbound, force=force) == want


def test_sampling_examples():
    assert frame_indices(100, 25.0, fps=1) == [0, 25, 50, 75]
    assert frame_indices(100, 29.97, fps=1) == [0, 30, 60, 90]
    assert frame_indices(100, 25.0, fps=2) == list(range(0, 100, 12))  # round(12.5) is 12
    assert frame_indices(100, 25.0, fps=1, upbound=3) == [0, 49, 99]
    assert frame_indices(100, 25.0, fps=1, upbound=6) == [0, 25, 50, 75]
    assert frame_indices(100, 25.0, fps=1, upbound=6, force=True) == [0, 19, 39, 59, 79, 99]
    assert frame_indices(3, 25.0, num_frames=5) == [0, 0, 1, 1, 2]
    assert frame_indices(101, 25.0) == [int(i * 100 / 15) for i in range(16)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0, "avg_fps": 25.0}, "at least one frame, got 0"),
        ({"total": 5, "avg_fps": 25.0, "num_frames": 0}, "num_frames must be >= 1, got 0"),
        ({"total": 5, "avg_fps": 25.0, "num_frames": 2, "fps": 1}, "not both"),
        ({"total": 5, "avg_fps": 25.0, "fps": 0}, "fps must be > 0"),
        ({"total": 5, "avg_fps": 0.0, "fps": 1}, "of 0.0 frames per second"),
    ],
)
def test_bad_sampling(arguments, message):
    with pytest.raises(ValueError, match=message):
        frame_indices(**arguments)


# --- which pixels ---


def check(got: Video, want: list[np.ndarray], indices: list[int], fps: float) -> None:
    assert got.indices == indices and got.frames.dtype == np.uint8
    assert got.times == pytest.approx([index / fps for index in indices])
    assert np.array_equal(got.frames, np.stack([want[index] for index in indices]))


@pytest.mark.parametrize(
    "sampling", [{"num_frames": 1}, {"num_frames": 7}, {"num_frames": 50}, {"fps": 3}, {"fps": 25}, {"fps": 5, "upbound": 4}, {}]
)
def test_frames_are_those_of_a_full_decode(source, clip, sampling):
    want = decode_all(str(clip))
    assert len(want) == 50
    arguments = {"num_frames": None, "fps": None, **sampling}
    check(load_frames(source, **sampling), want, frame_indices(50, 25.0, **arguments), 25.0)


def test_frames_wanted_twice(source, clip):
    want = decode_all(str(clip))
    check(load_frames(source, num_frames=120), want, frame_indices(50, 25.0, num_frames=120), 25.0)


OPEN = {"x264-params": "open-gop=1:bframes=3"}


@pytest.mark.parametrize("indices", [[0, 7, 15, 23, 31, 39], [39], [5, 30], [20, 21, 22], [11, 12, 13], [12, 24, 36]])
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize(
    ("codec", "container", "options", "trusted"),
    [
        ("libx264", "mp4", {}, True), ("libx264", "mov", {}, True), ("libx264", "matroska", {}, True), ("libvpx-vp9", "webm", {}, True),
        ("libx265", "mp4", {"x265-params": "open-gop=0:log-level=none"}, True), ("libvpx", "webm", {}, True),
        ("libx264", "mp4", OPEN, False), ("libx264", "matroska", OPEN, False), ("libx264", "mpegts", {}, False),
        ("mpeg4", "avi", {}, False), ("mpeg4", "mp4", {}, False),
    ],
)  # fmt: skip
def test_other_containers_and_codecs(codec, container, options, trusted, decoder, indices, clips, monkeypatch):
    """Any frames of any file, whether decord is there or not; only files it reads right are left to it."""
    path = clips(codec, container, **options)
    want = decode_all(str(path))
    used = []
    if decoder == "pyav":
        monkeypatch.setattr(video, "decord", None)
    elif video.decord is not None:
        real = video._decode_decord
        monkeypatch.setattr(video, "_decode_decord", lambda *arguments: used.append(True) or real(*arguments))
    monkeypatch.setattr(video, "frame_indices", lambda *_: indices)
    check(load_frames(path), want, indices, 25.0)
    assert bool(used) == (trusted and decoder == "decord" and video.decord is not None)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    made: dict[tuple, Path] = {}

    def clip_of(codec: str, container: str, **options) -> Path:
        key = (codec, container, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("clips") / f"clip.{container}"
            make_video(str(made[key]), 40, codec=codec, container=container, **options)
        return made[key]

    return clip_of


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
@pytest.mark.parametrize("decoder", ["decord", "pyav", "bytes"])
def test_a_telephones_video_is_turned_upright(matrix, turns, decoder, clip, tmp_path, monkeypatch):
    if decoder == "pyav":
        monkeypatch.setattr(video, "decord", None)
    data = bytearray(clip.read_bytes())
    at = data.index(b"tkhd") + 44  # the display matrix of the track header: a b 0 / c d 0 / 0 0 1
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    want = [np.rot90(frame, turns) for frame in decode_all(str(clip))]
    check(load_frames(bytes(data) if decoder == "bytes" else path, num_frames=3), want, [0, 24, 49], 25.0)


def test_pyav_does_not_decode_from_the_start(clip):
    """Of 50 frames with a key frame at least every 12, the first and last cost one frame and one group."""
    count = 0

    class Counting:
        def __init__(self, container):
            self.seek, self.decode_all = container.seek, container.decode

        def decode(self, stream):
            nonlocal count
            for frame in self.decode_all(stream):
                count += 1
                yield frame

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        index = video._scan(container, stream)
        assert index.total == 50 and index.closed and len(index.keys) > 4
        got = video._decode_by_seeking(Counting(container), stream, [0, 49], index)
    assert 2 <= count <= 1 + 12
    assert np.array_equal(got[49], decode_all(str(clip))[49])


# --- folders, lists, arrays ---


def test_a_folder_of_frames(tmp_path, clip):
    frames = decode_all(str(clip))[:9]
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number:03d}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    check(load_frames(tmp_path, num_frames=4), frames, [0, 2, 5, 8], 2.0)
    check(load_frames(str(tmp_path), fps=1), frames, [0, 2, 4, 6, 8], 2.0)
    check(load_frames(tmp_path), frames, frame_indices(9, 2.0), 2.0)


def test_lists_and_arrays_of_frames(clip):
    frames = decode_all(str(clip))[:5]
    check(load_frames([Image.fromarray(frame) for frame in frames]), frames, [0, 1, 2, 3, 4], 2.0)
    check(load_frames([Image.fromarray(frame) for frame in frames], num_frames=2), frames, [0, 4], 2.0)
    check(load_frames(np.stack(frames)), frames, [0, 1, 2, 3, 4], 2.0)
    check(load_frames(np.stack(frames), num_frames=3), frames, [0, 2, 4], 2.0)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"num_frames": 7}, {"fps": 3}, {"fps": 30}, {"upbound": 2}, {"upbound": 9}, {"fps": 5, "upbound": 4}]
    + [{"fps": 5, "upbound": 12, "force": True}, {"num_frames": 70, "upbound": 3}],
)
def test_frames_are_counted_without_decoding(sampling, clip, tmp_path, monkeypatch):
    for number, frame in enumerate(decode_all(str(clip))[:9]):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    expected = [len(load_frames(source, **sampling).indices) for source in (clip, tmp_path)]
    monkeypatch.setattr(video, "_decode_decord", None)
    monkeypatch.setattr(video, "_decode_by_seeking", None)
    monkeypatch.setattr(video, "open_image", None)
    assert [count_frames(str(source), **sampling) for source in (clip, tmp_path)] == expected


def test_counting_refuses_what_loading_refuses(clip, tmp_path, monkeypatch):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(video, "MAX_FRAMES", 10)
    for source in (tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "folder", tmp_path / "absent.mp4", clip):
        with pytest.raises(ValueError) as counted:
            count_frames(source, fps=25)
        with pytest.raises(ValueError) as loaded:
            load_frames(source, fps=25)
        assert str(counted.value) == str(loaded.value)


# --- what is refused ---


def refused(source, capfd, **sampling) -> str:
    with pytest.raises(ValueError) as caught:
        load_frames(source, **sampling)
    message = str(caught.value)
    assert " at 0x" not in message and len(message) < 500
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == "", printed.err
    return message


def test_bad_files(tmp_path, clip, capfd):
    empty, text, missing = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "missing.mp4"
    empty.write_bytes(b"")
    text.write_text("this is not a video at all\n" * 50)
    assert refused(empty, capfd) == f"{str(empty)!r} is empty (0 bytes), expected a video"
    assert f"{str(text)!r} is not a video" in refused(text, capfd)
    assert "No such file" in refused(missing, capfd)
    assert "folder without pictures" in refused(tmp_path, capfd)
    assert "a video of 0 bytes is empty" in refused(b"", capfd)
    assert "a video of 9 bytes is not a video" in refused(b"not video", capfd)
    assert "a video must be a path" in refused(5, capfd)
    assert "is empty, expected at least one frame" in refused([], capfd)
    assert "uint8 [F, H, W, 3], got float64 [2, 3]" in refused(np.zeros((2, 3)), capfd)
    cut = clip.read_bytes()[:2000]  # the index of this file is at its end
    assert "not a video" in refused(cut, capfd)


def test_a_file_of_sound_alone(tmp_path, capfd):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    assert "has no video stream" in refused(path, capfd)


def test_frames_of_several_sizes(capfd):
    frames = [Image.new("RGB", (8, 6)), Image.new("RGB", (6, 8))]
    assert "frames of 8x6 and 6x8" in refused(frames, capfd)


def test_caps(clip, capfd, monkeypatch):
    assert "2000 frames, more than the cap of 1024" in refused(clip, capfd, num_frames=2000)
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 5 * SIZE[0] * SIZE[1])
    assert load_frames(clip, num_frames=5).frames.shape == (5, SIZE[1], SIZE[0], 3)
    assert "6 frames of 160x120, more than the cap" in refused(clip, capfd, num_frames=6)
    monkeypatch.setattr(video, "MAX_SECONDS", 1)
    assert "2 s long, more than the cap of 1 s" in refused(clip, capfd, num_frames=2)
    monkeypatch.setattr(video, "MAX_VIDEO_BYTES", 1000)
    assert "more than the cap of 1000" in refused(clip.read_bytes(), capfd, num_frames=2)


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_damage_inside_is_a_value_error_or_frames(clip, decoder, tmp_path, monkeypatch):
    if decoder == "pyav":
        monkeypatch.setattr(video, "decord", None)
    good = clip.read_bytes()
    rng = np.random.default_rng(1)
    for trial in range(12):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 40):
            bad[int(at)] = int(rng.integers(256))
        path = tmp_path / f"{trial}.mp4"
        path.write_bytes(bad)
        for source in (path, bytes(bad)):
            try:
                assert load_frames(source, num_frames=4).frames.shape[0] == 4
            except ValueError as error:
                assert " at 0x" not in str(error)
