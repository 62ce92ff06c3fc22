"""Layouts against transformers' packing functions and a direct rendering of LLaVA-NeXT's merge on feature tensors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from llava_fast.batch import Visual, pack, splice
from llava_fast.inputs.layouts import (
    anyres_grid,
    anyres_layout,
    best_resolution,
    default_pinpoints,
    frames_layout,
    parse_pinpoints,
    pooled_grid,
    unpadded,
    view_layout,
)

WIDTH = 3
SIZES = [(336, 336), (640, 480), (1000, 1000), (1920, 1080), (300, 1200), (2304, 2304), (200, 100)]
ONEVISION = "(1x1),...,(6x6)"


def apply(visual: Visual, features_VPD: Tensor, newline_D: Tensor) -> Tensor:
    """The rows a layout names, gathered from features: the meaning of a `Visual`."""
    table = [features_VPD.reshape(-1, features_VPD.shape[-1])]
    for resample in visual.resamples:
        maps = table[0][torch.from_numpy(resample.source)].permute(0, 3, 1, 2)
        if resample.mode == "bilinear":
            out = F.interpolate(maps, size=resample.size, mode="bilinear")
        else:
            stride = maps.shape[2] // resample.size[0]
            assert maps.shape[2:] == (resample.size[0] * stride, resample.size[1] * stride)
            out = (F.avg_pool2d if resample.mode == "average" else F.max_pool2d)(maps, stride)
        assert tuple(out.shape[2:]) == resample.size
        table.append(out.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]))
    table.append(newline_D[None])
    return torch.cat(table)[torch.from_numpy(visual.source)]


def features(views: int, grid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(views * 100 + grid)
    return torch.randn(views, grid * grid, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)


def original_merge(x: Tensor, newline: Tensor, size: tuple[int, int], shape: tuple[int, int], merge: str, max_tiles: int | None) -> Tensor:
    """LLaVA-NeXT's merge of one anyres entry on tensors: base first, then the tiles."""
    if merge == "flat":
        return x.flatten(0, 1)
    (across, down), g = shape, math.isqrt(x.shape[1])
    base, tiles = x[0], x[1:].view(down, across, g, g, -1)
    if merge == "spatial":
        return torch.cat([base, tiles.permute(0, 2, 1, 3, 4).flatten(0, 3)])
    image = tiles.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    if merge == "spatial_maxpool2x2":
        return torch.cat([base, F.max_pool2d(image, 2).flatten(1, 2).T])
    (w, h), (map_h, map_w) = size, image.shape[1:]
    if w / h > map_w / map_h:
        pad = (map_h - int(h * (map_w / w))) // 2
        image = image[:, pad : map_h - pad]
    else:
        pad = (map_w - int(w * (map_h / h))) // 2
        image = image[:, :, pad : map_w - pad]
    if max_tiles is not None:
        _, map_h, map_w = image.shape
        times = math.sqrt(map_h * map_w / (max_tiles * g**2))
        if times > 1.1:
            image = F.interpolate(image[None], [int(map_h // times), int(map_w // times)], mode="bilinear")[0]
    image = torch.cat([image, newline[:, None, None].expand(*image.shape[:-1], 1)], dim=-1)
    return torch.cat([base, image.flatten(1, 2).T])


@pytest.mark.parametrize(
    ("grid", "tile", "pinpoints", "max_tiles", "expected"),
    [
        (24, 336, default_pinpoints(336), None, (1176, 2340, 2928, 1948, 1944, 2928, 876)),
        (27, 384, default_pinpoints(384), None, (1513, 2929, 3699, 2379, 2511, 3699, 1121)),
        (27, 384, ONEVISION, 9, (1485, 2929, 7371, 7269, 3753, 7371, 1093)),
    ],
    ids=["clip", "siglip", "siglip_max_9"],
)
def test_anyres_token_counts_are_those_of_the_original(grid, tile, pinpoints, max_tiles, expected):
    counts = tuple(anyres_layout(size, grid, tile, pinpoints, "spatial_unpad", max_tiles).tokens for size in SIZES)
    assert counts == expected


def test_unpad_keeps_one_row_more_than_is_real_when_the_padding_is_odd():
    rows, columns = unpadded((54, 54), (200, 100))
    assert (rows, columns) == (slice(13, 41), slice(0, 54))
    assert rows.stop - rows.start == 28 and int(100 * (54 / 200)) == 27


def test_unpadded_size_is_not_rounded_as_transformers_rounds_it():
    # 54 / 110 rounds down, so int(55 * (54 / 110)) may be 26 where exact arithmetic says 27: the original's arithmetic is kept.
    sizes = [(w, h) for w in range(2, 400) for h in range(1, w) if int(h * (54 / w)) != int(round(h * (54 / w), 7))]
    assert sizes, "no size where the two differ: the test would prove nothing"
    for w, h in sizes[:50]:
        rows, _ = unpadded((54, 54), (w, h))
        assert rows.start == (54 - int(h * (54 / w))) // 2


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad", "spatial_maxpool2x2"])
@pytest.mark.parametrize("max_tiles", [None, 1, 2, 9])
@pytest.mark.parametrize("size", [*SIZES, (1, 1), (20000, 3), (3, 20000), (383, 385)])
def test_anyres_matches_the_original_merge_on_tensors(merge, max_tiles, size):
    grid, tile, pinpoints = 5, 10, "(1x1),...,(4x4)"
    shape, _ = anyres_grid(size, tile, pinpoints)
    x, newline = features(1 + shape[0] * shape[1], grid)
    visual = anyres_layout(size, grid, tile, pinpoints, merge, max_tiles)
    want = original_merge(x, newline, size, shape, merge, max_tiles)
    assert visual.views == x.shape[0] and visual.patches == grid * grid and visual.tokens == len(want)
    assert torch.equal(apply(visual, x, newline), want)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 6), st.sampled_from([None, 1, 3, 9]))
def test_anyres_matches_the_original_merge_on_any_size(w, h, grid, max_tiles):
    shape, _ = anyres_grid((w, h), 16, "(1x1),...,(3x3)")
    x, newline = features(1 + shape[0] * shape[1], grid)
    try:
        visual = anyres_layout((w, h), grid, 16, "(1x1),...,(3x3)", "spatial_unpad", max_tiles)
    except ValueError as error:  # a sliver on a tiny grid: the original's interpolate refuses it too
        assert "leaves no row" in str(error)
        with pytest.raises(RuntimeError, match="greater than 0"):
            original_merge(x, newline, (w, h), shape, "spatial_unpad", max_tiles)
        return
    want = original_merge(x, newline, (w, h), shape, "spatial_unpad", max_tiles)
    assert torch.equal(apply(visual, x, newline), want)


# Sizes that tie between a wide and a tall candidate, and those where rounding to seven digits matters, differ in transformers.
@pytest.mark.parametrize("size", [(640, 480), (1920, 1080), (300, 1200), (200, 100), (1000, 1000), (2304, 2304), (500, 333)])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_anyres_matches_transformers(size, family):
    grid, tile = 27, 384
    swapped = [[h, w] for w, h in default_pinpoints(tile)]  # transformers reads (height, width)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=tile, patch_size=14), image_grid_pinpoints=swapped)
    (across, down), _ = anyres_grid(size, tile, default_pinpoints(tile))
    size_hw = (size[1], size[0])
    x, newline = features(1 + across * down, grid)
    assert image_size_to_num_patches(size_hw, swapped, tile) == x.shape[0]
    holder = SimpleNamespace(config=config)
    if family == "llava_next":
        (want,), _ = LlavaNextModel.pack_image_features(holder, [x], [size_hw], "full", newline)
        visual = anyres_layout(size, grid, tile, default_pinpoints(tile))
    else:
        (want,), _ = LlavaOnevisionModel.pack_image_features(holder, [x], [size_hw], newline, "anyres_max_1")
        visual = anyres_layout(size, grid, tile, default_pinpoints(tile), max_tiles=1)
        assert visual.resamples or size == (200, 100)
    assert torch.equal(apply(visual, x, newline), want)


def test_one_view_and_its_newline():
    x, newline = features(1, 27)
    assert torch.equal(apply(view_layout(27), x, newline), x[0])
    assert torch.equal(apply(view_layout(27, newline=True), x, newline), torch.cat([x[0], newline[None]]))
    assert view_layout(27).tokens == 729 and view_layout(27, newline=True).tokens == 730


@pytest.mark.parametrize(
    ("pool", "newline", "expected"),
    [
        ("bilinear", "grid", (3360, 6720, 13440)),
        ("bilinear", "one_token", (3137, 6273, 12545)),
        ("bilinear", None, (3136, 6272, 12544)),
        ("bilinear", "frame", (3152, 6304, 12608)),
        ("average", None, (2704, 5408, 10816)),
        ("max", None, (2704, 5408, 10816)),
        (None, None, (11664, 23328, 46656)),
    ],
)
def test_video_token_counts_are_those_of_the_original(pool, newline, expected):
    assert tuple(frames_layout(frames, 27, pool, newline=newline).tokens for frames in (16, 32, 64)) == expected


def original_frames(x: Tensor, newline: Tensor, pool: str | None, stride: int, position: str | None) -> Tensor:
    frames, patches, width = x.shape
    g = math.isqrt(patches)
    maps = x.view(frames, g, g, width).permute(0, 3, 1, 2)
    if pool == "average":
        maps = F.avg_pool2d(maps, stride)
    elif pool == "max":
        maps = F.max_pool2d(maps, stride)
    elif pool == "bilinear":
        maps = F.interpolate(maps, size=[math.ceil(g / stride)] * 2, mode="bilinear")
    x = maps.permute(0, 2, 3, 1)
    if position == "grid":
        return torch.cat([x, newline.expand(*x.shape[:2], 1, width)], dim=2).reshape(-1, width)
    x = x.flatten(1, 2)
    if position == "frame":
        return torch.cat([x, newline.expand(frames, 1, width)], dim=1).flatten(0, 1)
    return torch.cat([x.flatten(0, 1), newline[None]]) if position == "one_token" else x.flatten(0, 1)


@pytest.mark.parametrize("grid", [1, 3, 4, 9, 24, 27])
@pytest.mark.parametrize("pool", [None, "average", "bilinear", "max"])
@pytest.mark.parametrize("position", [None, "one_token", "frame", "grid"])
@pytest.mark.parametrize("stride", [2, 3])
def test_frames_match_the_original_pooling(grid, pool, position, stride):
    if pool in ("average", "max") and stride > grid:
        with pytest.raises(ValueError, match="stride must be between 1 and the grid of"):
            frames_layout(3, grid, pool, stride, position)
        return
    x, newline = features(3, grid)
    visual = frames_layout(3, grid, pool, stride, position)
    want = original_frames(x, newline, pool, stride, position)
    assert visual.tokens == len(want) and torch.equal(apply(visual, x, newline), want)


def test_bilinear_frames_match_transformers():
    x, newline = features(4, 27)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=384, patch_size=14))
    want = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), x)
    want = torch.cat([want.flatten(0, 1), newline[None]])
    assert torch.equal(apply(frames_layout(4, 27, "bilinear", newline="one_token"), x, newline), want)


def test_pooled_side():
    assert [pooled_grid(27, pool) for pool in ("average", "max", "bilinear")] == [13, 13, 14]
    assert pooled_grid(24, "average") == 12


def test_pinpoints_come_as_a_list_a_literal_or_a_range():
    listed = [(336, 672), (672, 336)]
    assert (
        parse_pinpoints(listed, 336) == parse_pinpoints("[(336, 672), (672, 336)]", 336) == parse_pinpoints([[336, 672], [672, 336]], 336)
    )
    ranged = parse_pinpoints(ONEVISION, 384)
    assert len(ranged) == 36 and ranged[:2] == [(384, 384), (384, 768)] and ranged[-1] == (2304, 2304)
    assert parse_pinpoints("(1x2),...,(2x3)", 10) == [(10, 20), (10, 30), (20, 20), (20, 30)]


def test_a_tie_goes_to_the_first_candidate():
    assert best_resolution((336, 336), [(336, 672), (672, 336)]) == (336, 672)
    assert best_resolution((336, 336), [(672, 336), (336, 672)]) == (672, 336)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_pinpoints([(300, 384)], 384), "multiples of the tile of 384 pixels, got 300x384"),
        (lambda: parse_pinpoints("nonsense", 384), "list of .width, height., got 'nonsense'"),
        (lambda: parse_pinpoints("axb", 384), "got 'axb'"),
        (lambda: parse_pinpoints([], 384), "at least one resolution"),
        (lambda: anyres_layout((10, 10), 4, 8, "(1x1),...,(2x2)", "unires"), "mm_patch_merge_type .* got 'unires'"),
        (lambda: anyres_layout((0, 10), 4, 8, "(1x1),...,(2x2)"), "at least 1x1, got 0x10"),
        (lambda: anyres_layout((8, 8), 4, 8, "(1x1),...,(2x2)", max_tiles=0), "N >= 1, got 0"),
        (lambda: frames_layout(0, 4), "at least one frame, got 0"),
        (lambda: frames_layout(1, 4, newline="row"), "got 'row'"),
        (lambda: frames_layout(1, 4, "median"), "got 'median'"),
        (lambda: view_layout(0), "at least one patch a side, got 0"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_layouts_are_int64():
    for visual in (view_layout(3, True), frames_layout(2, 3, "max"), anyres_layout((9, 9), 3, 4, "(1x1),...,(2x2)", max_tiles=1)):
        assert visual.source.dtype == np.int64 and all(r.source.dtype == np.int64 for r in visual.resamples)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["text", "view", "newlines", "frames", "tiles"]), min_size=1, max_size=6), min_size=1, max_size=4))
def test_rows_of_a_batch_are_named_once_and_in_order(prompts: list[list[str]]) -> None:
    """What kernels/projector.py asks for: a row that two visual tokens shared would be written by two threads."""
    made = {
        "view": view_layout(4),
        "newlines": view_layout(4, newline=True),
        "frames": frames_layout(3, 4, "average"),
        "tiles": anyres_layout((40, 20), 4, 8, [(16, 8), (8, 16)]),
    }
    samples = [
        splice([5 if part == "text" else -1 for part in prompt], [made[part] for part in prompt if part in made], -1) for prompt in prompts
    ]
    views = sum(sample.views for sample in samples)
    batch = pack(samples, torch.empty(views, 3, 8, 8))
    if batch.layout is not None:
        rows, text_rows = batch.layout.rows, batch.layout.text_rows
        assert (rows.diff() > 0).all() and (text_rows.diff() > 0).all()
        assert torch.equal(torch.cat([rows, text_rows]).sort().values, torch.arange(len(batch.token_ids)))
