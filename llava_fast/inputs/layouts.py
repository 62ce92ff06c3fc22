"""From sizes alone to rows: how views, frames and anyres tiles become the visual tokens of a sequence.

A layout is a `Visual` (see batch.py): an index map into the rows of the views it feeds to the tower, into resampled maps, and
to the learned newline row. What is kept is the merge of LLaVA-NeXT's `llava_arch.py`; where transformers differs (it rounds
the unpadded size to seven digits and reads pinpoints as height x width) the original is followed.

Names: grid g, patches along one side of a view (27 for SigLIP-so400m-384); P = g * g; tile, pixels along one side of a view.
Sizes and pinpoints are (width, height) throughout, as in PIL.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from llava_fast.batch import NEWLINE, PoolMode, Resample, Visual
from llava_fast.checks import shown

NewlinePosition = Literal["one_token", "frame", "grid"]
Size = tuple[int, int]
Pinpoints = str | Sequence[Sequence[int]]

# The five shapes of LLaVA-1.6, in tiles: LLaVA-NeXT's configs list them in this order.
DEFAULT_SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
POOLED = ("average", "bilinear", "max")


def view_layout(grid: int, newline: bool = False, extra: int = 0) -> Visual:
    """One view: its g * g rows in order, and one newline row after them where asked (the merge 'spatial_unpad' adds it).

    extra: rows a view has besides its grid, before them: 1 where CLIP's class row is kept.
    """
    patches = _patches(grid) + extra
    source = np.arange(patches)
    return Visual(1, patches, np.append(source, NEWLINE) if newline else source)


def pooled_grid(grid: int, pool: PoolMode, stride: int = 2) -> int:
    """Rows along one side after pooling: floor(g / stride) for average and max, ceil for bilinear. ValueError if none is left."""
    if pool not in POOLED:
        raise ValueError(f"pool must be average, bilinear or max, got {shown(pool)}")
    if stride < 1 or (pool != "bilinear" and stride > grid):
        raise ValueError(f"a pooling stride must be between 1 and the grid of {grid}, got {stride}")
    return math.ceil(grid / stride) if pool == "bilinear" else grid // stride


def frames_layout(frames: int, grid: int, pool: PoolMode | None = None, stride: int = 2, newline: NewlinePosition | None = None) -> Visual:
    """The frames of a video, one view each, optionally pooled.

    newline: None; 'one_token' after the last frame; 'frame' after every frame; 'grid' after every row of every frame.
    Tokens, with q the pooled side: F*q*q, F*q*q + 1, F*(q*q + 1), F*q*(q + 1). ValueError for a value out of range.
    """
    patches = _patches(grid)
    if frames < 1:
        raise ValueError(f"a video must have at least one frame, got {frames}")
    if newline not in (None, "one_token", "frame", "grid"):
        raise ValueError(f"newline must be None, one_token, frame or grid, got {shown(newline)}")
    rows = np.arange(frames * patches).reshape(frames, grid, grid)
    resamples: tuple[Resample, ...] = ()
    if pool is not None:
        side = pooled_grid(grid, pool, stride)
        # Rows and columns that floor() leaves out are cut off here, so that the ratio of the sizes is the stride exactly.
        covered = rows if pool == "bilinear" else rows[:, : side * stride, : side * stride]
        resamples = (Resample(pool, np.ascontiguousarray(covered), (side, side)),)
        rows = frames * patches + np.arange(frames * side * side).reshape(frames, side, side)
    if newline == "grid":
        source = _with_newlines(rows).reshape(-1)
    elif newline == "frame":
        source = _with_newlines(rows.reshape(frames, -1)).reshape(-1)
    else:
        source = np.append(rows.reshape(-1), NEWLINE) if newline == "one_token" else rows.reshape(-1)
    return Visual(frames, patches, source, resamples)


def parse_pinpoints(pinpoints: Pinpoints, tile: int) -> list[Size]:
    """Candidate (width, height) resolutions from a list, a literal string, or a range "(1x1),...,(6x6)" in tiles.

    Raises ValueError for anything else, and for a resolution that is not a whole number of tiles.
    """
    if isinstance(pinpoints, str) and "x" in pinpoints:
        ends = [(int(w), int(h)) for w, h in re.findall(r"\((\d+)\s*x\s*(\d+)\)", pinpoints)]
        if not ends:
            raise ValueError(f"image_grid_pinpoints must look like '(1x1),...,(6x6)', got {shown(pinpoints)}")
        (w0, h0), (w1, h1) = ends[0], ends[-1]
        sizes = [(w * tile, h * tile) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
    else:
        try:
            listed = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
            sizes = [(int(w), int(h)) for w, h in listed]
        except (TypeError, ValueError, SyntaxError):
            raise ValueError(f"image_grid_pinpoints must be a list of (width, height), got {shown(pinpoints)}") from None
    for w, h in sizes:
        if w < tile or h < tile or w % tile or h % tile:
            raise ValueError(f"image_grid_pinpoints must be multiples of the tile of {tile} pixels, got {w}x{h}")
    if not sizes:
        raise ValueError(f"image_grid_pinpoints must name at least one resolution, got {shown(pinpoints)}")
    return sizes


def default_pinpoints(tile: int) -> list[Size]:
    return [(w * tile, h * tile) for w, h in DEFAULT_SHAPES]


def best_resolution(size_wh: Size, candidates: Sequence[Size]) -> Size:
    """The candidate that shows most of the picture's pixels; on a tie the least waste, then the first (LLaVA's rule)."""
    w, h = _size(size_wh)
    best, most, least_waste = candidates[0], -1, math.inf
    for width, height in candidates:
        scale = min(width / w, height / h)
        shown = min(int(w * scale) * int(h * scale), w * h)
        waste = width * height - shown
        if shown > most or (shown == most and waste < least_waste):
            best, most, least_waste = (width, height), shown, waste
    return best


def anyres_grid(size_wh: Size, tile: int, pinpoints: Pinpoints) -> tuple[Size, Size]:
    """((tiles across, tiles down), (width, height) in pixels) that a picture of this size is cut into."""
    width, height = best_resolution(size_wh, parse_pinpoints(pinpoints, tile))
    return (width // tile, height // tile), (width, height)


def unpadded(map_hw: tuple[int, int], size_wh: Size) -> tuple[slice, slice]:
    """The rows and columns of a tile map that hold picture and not padding.

    new = int(h * (map_w / w)) rows are real where the picture is wider than the map; (map_h - new) // 2 are cut from both
    sides, so that floor may leave one row more than `new`. Columns likewise where it is not wider.
    """
    (map_h, map_w), (w, h) = map_hw, _size(size_wh)
    if w / h > map_w / map_h:
        pad = (map_h - int(h * (map_w / w))) // 2
        return slice(pad, map_h - pad), slice(0, map_w)
    pad = (map_w - int(w * (map_h / h))) // 2
    return slice(0, map_h), slice(pad, map_w - pad)


def anyres_layout(
    size_wh: Size, grid: int, tile: int, pinpoints: Pinpoints, merge: str = "spatial_unpad", max_tiles: int | None = None
) -> Visual:
    """A picture as a base view and tiles; the base view's rows come first (view 0), then the tiles by `merge`.

    'flat': tile after tile.  'spatial': the tiles as one map, row by row.  'spatial_unpad': that map without its padding, a
    newline after every row; with max_tiles N (anyres_max_N) a map with t = sqrt(h * w / (N * P)) > 1.1 is first resized
    bilinearly to (int(h // t), int(w // t)).  'spatial_maxpool2x2': the map max-pooled by 2, no newline.
    Raises ValueError for another merge, a size below 1x1, or pinpoints that are not whole tiles.
    """
    patches = _patches(grid)
    (across, down), _ = anyres_grid(size_wh, tile, pinpoints)
    views = 1 + across * down
    table = views * patches
    base = np.arange(patches)
    if merge == "flat":
        return Visual(views, patches, np.arange(table))
    tiles = np.arange(patches, table).reshape(down, across, grid, grid)
    map_hw = tiles.transpose(0, 2, 1, 3).reshape(down * grid, across * grid)
    if merge == "spatial":
        return Visual(views, patches, np.concatenate([base, map_hw.reshape(-1)]))
    if merge == "spatial_maxpool2x2":
        h, w = map_hw.shape[0] // 2, map_hw.shape[1] // 2
        pooled = Resample("max", np.ascontiguousarray(map_hw[None, : h * 2, : w * 2]), (h, w))
        return Visual(views, patches, np.concatenate([base, table + np.arange(h * w)]), (pooled,))
    if merge != "spatial_unpad":
        raise ValueError(f"mm_patch_merge_type must be flat, spatial, spatial_unpad or spatial_maxpool2x2, got {shown(merge)}")
    map_hw = map_hw[unpadded((map_hw.shape[0], map_hw.shape[1]), size_wh)]
    resamples: tuple[Resample, ...] = ()
    if max_tiles is not None:
        if max_tiles < 1:
            raise ValueError(f"anyres_max_N needs N >= 1, got {max_tiles}")
        h, w = map_hw.shape
        t = math.sqrt(h * w / (max_tiles * patches))
        if t > 1.1:
            size = (int(h // t), int(w // t))
            if min(size) < 1:
                raise ValueError(
                    f"a picture of {size_wh[0]}x{size_wh[1]} leaves no row of its {h}x{w} map after resizing it to {max_tiles} tiles"
                )
            resamples = (Resample("bilinear", np.ascontiguousarray(map_hw[None]), size),)
            map_hw = table + np.arange(size[0] * size[1]).reshape(size)
    return Visual(views, patches, np.concatenate([base, _with_newlines(map_hw).reshape(-1)]), resamples)


def _with_newlines(rows: np.ndarray) -> np.ndarray:
    """[..., W] -> [..., W + 1]: a newline at the end of every row."""
    return np.concatenate([rows, np.full((*rows.shape[:-1], 1), NEWLINE)], axis=-1)


def _patches(grid: int) -> int:
    if grid < 1:
        raise ValueError(f"a view must have at least one patch a side, got {grid}")
    return grid * grid


def _size(size_wh: Size) -> Size:
    w, h = size_wh
    if w < 1 or h < 1:
        raise ValueError(f"a picture must be at least 1x1, got {w}x{h}")
    return w, h
