"""From a request to what the model takes: a `Sample` of rows and the uint8 views it refers to, all on the CPU."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from llava_fast.batch import PoolMode, Sample, Visual, splice
from llava_fast.checks import shown
from llava_fast.inputs.chat import Media, read_prompt, tokenise
from llava_fast.inputs.images import ImageProcessor, open_image
from llava_fast.inputs.layouts import NewlinePosition, Size, anyres_layout, default_pinpoints, frames_layout, parse_pinpoints, view_layout
from llava_fast.inputs.video import Sampling, load_frames
from llava_fast.requests import InputOptions, Request


@dataclass(frozen=True)
class InputSpec:
    """What inputs need to know of a checkpoint.

    grid, tile: patches and pixels along one side of a view.  max_positions: the context.  has_newline: the model has a learned
    newline row.  extra_rows: feature rows a view has besides its grid (1 where CLIP's class row is kept).
    anyres: single pictures are cut into tiles by default, merged by `merge`, with max_tiles for anyres_max_N.
    pool, pool_stride: of videos; newline: of pooled ones.
    All default to what transformers' Llava does: one view a picture or frame, no more.
    """

    tokenizer: Any
    image_processor: ImageProcessor
    image_token_id: int
    grid: int
    tile: int
    max_positions: int
    chat_template: str | None = None
    has_newline: bool = False
    extra_rows: int = 0
    anyres: bool = False
    merge: str = "flat"
    pinpoints: tuple[Size, ...] = ()
    max_tiles: int | None = None
    pool: PoolMode | None = None
    pool_stride: int = 2
    newline: NewlinePosition | None = None

    @staticmethod
    def from_dir(
        directory: str | Path,
        image_token_id: int,
        grid: int,
        tile: int,
        max_positions: int,
        options: Mapping[str, Any] | None = None,
        has_newline: bool = False,
        extra_rows: int = 0,
    ) -> InputSpec:
        """Tokenizer, image processor and chat template of a checkpoint directory; options: see `with_options`."""
        tokenizer = AutoTokenizer.from_pretrained(directory)
        processor = ImageProcessor.from_pretrained(directory)
        if processor.size != tile:
            raise ValueError(f"the image processor of {directory} gives views of {processor.size} pixels, the tower takes {tile}")
        template = read_chat_template(directory, tokenizer)
        spec = InputSpec(tokenizer, processor, image_token_id, grid, tile, max_positions, template, has_newline, extra_rows)
        return spec.with_options(options or {})

    def with_options(self, options: Mapping[str, Any]) -> InputSpec:
        """With LLaVA-NeXT's own settings: image_aspect_ratio, mm_patch_merge_type, image_grid_pinpoints, mm_spatial_pool_mode,
        mm_spatial_pool_stride, mm_newline_position; other keys are left to others. Raises ValueError for a value not known.

        image_aspect_ratio turns tiles on where it is anyres or anyres_max_N; 'pad' changes nothing (transformers squashes), it is
        asked for by InputOptions. A newline needs a merge that starts with 'spatial', and 'one_token' one that says 'unpad'.
        """
        aspect, merge = str(options.get("image_aspect_ratio") or ""), str(options.get("mm_patch_merge_type") or "flat")
        limit = re.fullmatch(r"anyres_max_(\d+)", aspect)
        if aspect.startswith("anyres") and aspect != "anyres" and not limit:
            raise ValueError(f"image_aspect_ratio must be anyres or anyres_max_N where it starts with anyres, got {shown(aspect)}")
        if merge not in ("flat", "spatial", "spatial_unpad", "spatial_maxpool2x2"):
            raise ValueError(f"mm_patch_merge_type must be flat, spatial, spatial_unpad or spatial_maxpool2x2, got {shown(merge)}")
        pool = options.get("mm_spatial_pool_mode")
        if pool not in (None, "average", "bilinear", "max"):
            raise ValueError(f"mm_spatial_pool_mode must be average, bilinear or max, got {shown(pool)}")
        position = options.get("mm_newline_position") or "one_token"
        if position not in ("one_token", "frame", "grid", "no_token"):
            raise ValueError(f"mm_newline_position must be one_token, frame, grid or no_token, got {shown(position)}")
        wanted = merge.startswith("spatial") and position != "no_token" and ("unpad" in merge or position != "one_token")
        if wanted and not self.has_newline:
            raise ValueError(
                f"mm_patch_merge_type {shown(merge)} with mm_newline_position {shown(position)} needs a newline row, which the model lacks"
            )
        pinpoints = options.get("image_grid_pinpoints")
        return replace(
            self,
            anyres=aspect.startswith("anyres"),
            merge=merge,
            pinpoints=tuple(parse_pinpoints(pinpoints, self.tile)) if pinpoints else (),
            max_tiles=int(limit[1]) if limit else None,
            pool=pool,
            pool_stride=int(options.get("mm_spatial_pool_stride") or 2),
            newline=cast(NewlinePosition, position) if wanted else None,
        )


def read_chat_template(directory: str | Path, tokenizer: Any = None) -> str | None:
    """The template transformers' processor would use: chat_template.jinja, chat_template.json, processor_config.json; else the
    tokenizer's own. Of several, the one named default."""
    folder = Path(directory)
    found: Any = None
    if (folder / "chat_template.jinja").is_file():
        found = (folder / "chat_template.jinja").read_text()
    for name in ("chat_template.json", "processor_config.json"):
        if found is None and (folder / name).is_file():
            found = json.loads((folder / name).read_text()).get("chat_template")
    if found is None:
        found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, list):  # as tokenizer_config.json lists several
        found = {entry["name"]: entry["template"] for entry in found}
    return found.get("default") if isinstance(found, dict) else found


@dataclass(frozen=True)
class Prepared:
    """sample: rows and layouts.  views: uint8 [N, 3, S, S] or None.  prompt_ids: with one placeholder a visual.
    timings: seconds spent on 'media' (opening, decoding, resizing), 'text', and in all ('total')."""

    sample: Sample
    views: Tensor | None
    prompt_ids: list[int]
    timings: dict[str, float]


def prepare(request: Request, options: InputOptions, spec: InputSpec) -> Prepared:
    """Open, resize, tokenise and lay out one request. Where the request has inputs of its own, they are used instead of `options`.

    A picture is one view, or a base view and tiles where anyres is on and it is the request's only medium. A video is its frames:
    each a picture of its own, or one block where they are pooled.
    Raises ValueError naming what is wrong, before any model work; also for a prompt that is longer than the context.
    """
    start = time.perf_counter()
    options = request.inputs or options
    conversation = read_prompt(request.prompt, request.images, request.videos)
    anyres = spec.anyres if options.anyres is None else options.anyres
    anyres = anyres and [medium.kind for medium in conversation.media] == ["image"]
    views: list[Tensor] = []
    blocks: list[list[Visual]] = []
    for number, medium in enumerate(conversation.media, 1):
        try:
            block_views, visuals = (_video if medium.kind == "video" else _picture)(medium, options, spec, anyres)
        except ValueError as error:
            raise ValueError(f"{medium.kind} {number} of {len(conversation.media)}: {error}") from error.__cause__
        views.append(block_views)
        blocks.append(visuals)
    media_done = time.perf_counter()
    counts = [len(visuals) for visuals in blocks]
    ids = tokenise(conversation, counts, spec.tokenizer, spec.image_token_id, options.tokenisation, spec.chat_template, options.keep_order)
    sample = splice(ids, [visual for visuals in blocks for visual in visuals], spec.image_token_id)
    if len(sample) > spec.max_positions:
        raise ValueError(
            f"the prompt takes {len(sample)} tokens ({sample.visual_tokens} of them of pictures), "
            f"more than the context's {spec.max_positions}"
        )
    done = time.perf_counter()
    timings = {"media": media_done - start, "text": done - media_done, "total": done - start}
    return Prepared(sample, torch.cat(views) if views else None, ids, timings)


def picture_layout(size_wh: Size, spec: InputSpec, anyres: bool) -> Visual:
    """The layout of one picture of this size: a view (with a newline where the merge says unpad), or anyres tiles."""
    if not anyres:
        return view_layout(spec.grid, newline="unpad" in spec.merge and spec.has_newline, extra=spec.extra_rows)
    if spec.extra_rows:
        raise ValueError("anyres needs views that are a square of patches; this checkpoint keeps a class row besides")
    if "unpad" in spec.merge and not spec.has_newline:
        raise ValueError(f"mm_patch_merge_type {shown(spec.merge)} needs a newline row, which the model lacks")
    return anyres_layout(size_wh, spec.grid, spec.tile, spec.pinpoints or default_pinpoints(spec.tile), spec.merge, spec.max_tiles)


def video_layout(frames: int, spec: InputSpec, pool: PoolMode | None = None) -> list[Visual]:
    """The layouts of a video: one a frame, as of as many pictures; or a single block where frames are pooled."""
    pool = pool or spec.pool
    if pool is None:
        return [picture_layout((1, 1), spec, anyres=False)] * frames
    if spec.extra_rows:
        raise ValueError("pooling needs views that are a square of patches; this checkpoint keeps a class row besides")
    return [frames_layout(frames, spec.grid, pool, spec.pool_stride, spec.newline)]


def video_sampling(options: InputOptions, num_frames: int | None = None, fps: float | None = None) -> Sampling:
    """num_frames, fps, upbound and force as `video.load_frames` takes them; a video's own num_frames or fps goes before the options'."""
    if num_frames is None and fps is None:
        num_frames, fps = options.num_frames, options.fps
    return num_frames, fps, options.frames_upbound or 0, options.force_sample


def _picture(medium: Media, options: InputOptions, spec: InputSpec, anyres: bool) -> tuple[Tensor, list[Visual]]:
    image = open_image(medium.source, options)
    layout = picture_layout(image.size, spec, anyres)
    if anyres:
        return spec.image_processor.tiles(image, spec.pinpoints or default_pinpoints(spec.tile)), [layout]
    return spec.image_processor.views(image, options.image_aspect), [layout]


def _video(medium: Media, options: InputOptions, spec: InputSpec, anyres: bool) -> tuple[Tensor, list[Visual]]:
    video = load_frames(medium.source, *video_sampling(options, medium.num_frames, medium.fps), options=options)
    views = {}
    for index, frame in zip(video.indices, video.frames, strict=True):
        if index not in views:
            views[index] = spec.image_processor.views(Image.fromarray(np.ascontiguousarray(frame)), options.image_aspect)
    return torch.cat([views[index] for index in video.indices]), video_layout(len(video.indices), spec, options.pool)
