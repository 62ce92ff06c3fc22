"""From files to pixel values, against transformers' processor (its PIL path; from PIL pictures both give the same values): photographs as
JPEG and PNG of three sizes, and 16 frames of an H.264 video of ten seconds.

A question with four photographs of 12 megapixels waits for this longer than a GPU takes for the rest.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipImageProcessorPil
from transformers.video_utils import load_video

from bench.many_requests import photograph
from llava_fast.inputs.images import ImageProcessor, open_image
from llava_fast.inputs.video import frame_indices, load_frames
from llava_fast.kernels.patchify import normalise

SIDE, FRAMES, TAKEN = 384, 300, 16
OURS_PROCESSOR = ImageProcessor(SIDE)
THEIRS = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@functools.cache
def encoded(kind: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    photograph(0, size).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


def in_turns(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], paired: Any) -> None:
    torch.testing.assert_close(ours(), theirs(), rtol=0, atol=0)
    paired(ours, {"transformers": theirs}, rounds=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(640, 480), (1920, 1280), (4000, 3000)], ids=["640x480", "1920x1280", "4000x3000"])
def test_picture(kind: str, size: tuple[int, int], paired: Any) -> None:
    data = encoded(kind, size)

    def ours() -> Tensor:
        return normalise(OURS_PROCESSOR.views(open_image(data)))

    def theirs() -> Tensor:
        return THEIRS(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"]

    in_turns(ours, theirs, paired)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds of a window that moves over a photograph."""
    import av

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    whole = np.array(photograph(1, (1280, 960)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for i in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(whole[i : i + 480, 2 * i : 2 * i + 640]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_video(clip: Path, paired: Any) -> None:
    taken = frame_indices(FRAMES, 30.0, TAKEN)

    def ours() -> Tensor:
        return torch.cat([normalise(OURS_PROCESSOR.views(Image.fromarray(frame))) for frame in load_frames(clip, num_frames=TAKEN).frames])

    def theirs() -> Tensor:
        frames, _ = load_video(str(clip), backend="pyav", sample_indices_fn=lambda metadata, **_: np.array(taken))
        return THEIRS(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")["pixel_values"]

    in_turns(ours, theirs, paired)
