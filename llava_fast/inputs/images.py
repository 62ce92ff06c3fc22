"""Pictures from anywhere to uint8 views.

Shape letters: N views, S pixels along one side of a view.

Opening follows transformers' `load_image` and LLaVA: the EXIF rotation is applied, then `convert("RGB")`, which drops an alpha
channel (transformers 5.23's processors blend it onto white when handed the RGBA picture itself; 5.17's drop it). 16-bit
greyscale is divided by 257 with rounding, so that 65535 is white (`convert` would clip at 255). 16-bit colour PNG is read by
Pillow as its high bytes. Of an animation the first frame is taken.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from llava_fast.inputs.fetch import fetch, is_url, url_name
from llava_fast.inputs.layouts import Pinpoints, anyres_grid
from llava_fast.requests import InputOptions

MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 89_478_485  # 256 MiB of RGB; Pillow's own warning threshold
MAX_RESIZED_PIXELS = 1 << 28  # of a picture while it is padded to a square, or resized before a crop
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# What Pillow's decoders raise on damaged files, from its own list in Image.open and seen when files are cut or overwritten.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, struct.error, zlib.error)
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# EPS and WMF are not pictures but programs: Pillow hands them to Ghostscript or to the system.
REFUSED_FORMATS = {"EPS", "WMF"}


def source_name(source: Any) -> str:
    """A source in words, for messages: a path as it is, anything else by its kind and size."""
    if is_url(source):
        return url_name(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"a data URL of {len(source)} characters"
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return repr(path) if len(path) <= 300 else f"a string of {len(path)} characters"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a picture of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"a PIL image of {source.width}x{source.height}, mode {source.mode}"
    return f"a {type(source).__name__}"


def open_image(source: Any, options: InputOptions | None = None) -> Image.Image:
    """An RGB picture from a PIL image, path, bytes, data URL, or http(s) address of an allowed host.

    Raises ValueError naming the source: missing, not a picture, damaged, or past MAX_IMAGE_BYTES or MAX_IMAGE_PIXELS.
    """
    name = source_name(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name)
    if is_url(source):
        data: bytes = fetch(source, options.allowed_media_hosts if options else (), MAX_IMAGE_BYTES)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = decode_data_url(source)
    elif isinstance(source, (str, os.PathLike)):
        with open_file(source, name, MAX_IMAGE_BYTES) as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        raise ValueError(f"a picture must be a PIL image, path, bytes, data URL or http(s) address, got {name}")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes, more than the cap of {MAX_IMAGE_BYTES}")
    with _read_header(io.BytesIO(data), name) as opened:
        return _to_rgb(opened, name)


def image_size(source: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """(width, height) of a file, or of its bytes, as `open_image` will give it (EXIF rotation applied), from the header alone. Raises
    ValueError as that does for what a header can show."""
    name = source_name(source)
    if isinstance(source, bytes) and len(source) > MAX_IMAGE_BYTES:
        raise ValueError(f"{name} has {len(source)} bytes, more than the cap of {MAX_IMAGE_BYTES}")
    opened = io.BytesIO(source) if isinstance(source, bytes) else open_file(source, name, MAX_IMAGE_BYTES)
    with opened as file, _read_header(file, name) as image:
        width, height = image.size
        try:
            sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except DECODE_ERRORS as error:
            raise ValueError(f"{name} is damaged or cut short: {type(error).__name__}") from None
    return (height, width) if sideways else (width, height)


def _read_header(file: BinaryIO, name: str) -> Image.Image:
    """A picture whose header is read and checked, and whose pixels are not."""
    Image.init()
    try:
        image = Image.open(file, formats=[kind for kind in Image.OPEN if kind not in REFUSED_FORMATS])
    except BOMBS:
        raise ValueError(f"{name} has more than the cap of {MAX_IMAGE_PIXELS} pixels") from None
    except DECODE_ERRORS:
        file.seek(0)
        if not (head := file.read(8)):
            raise ValueError(f"{name} is empty (0 bytes), expected a picture") from None
        raise ValueError(f"{name} is not a picture that can be read (the first bytes are {head.hex(' ')})") from None
    _check_pixels(image, name)
    return image


def open_file(path: str | os.PathLike[str], name: str, max_bytes: int) -> BinaryIO:
    """A regular file to read. ValueError: missing, not a regular file (a pipe would block), or larger than max_bytes."""
    size = file_size(path, name)
    if size > max_bytes:
        raise ValueError(f"{name} has {size} bytes, more than the cap of {max_bytes}")
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{name} could not be read: {error.strerror}") from None


def file_size(path: str | os.PathLike[str], name: str) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the path is malformed"
        raise ValueError(f"{name} could not be opened: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name} is not a regular file")
    return status.st_size


def decode_data_url(url: str) -> bytes:
    """The bytes of data:[type];base64,... . ValueError for another encoding or broken base64; the data itself is not shown."""
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError(f"{source_name(url)} must have the form data:<type>;base64,<data>, got the head {head[:40]!r}")
    if len(payload) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise ValueError(f"{source_name(url)} holds more than the cap of {MAX_IMAGE_BYTES} bytes")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{source_name(url)} holds broken base64") from None


def _check_pixels(image: Image.Image, name: str) -> None:
    w, h = image.size
    if w < 1 or h < 1:
        raise ValueError(f"{name} has no pixels ({w}x{h})")
    if w * h > MAX_IMAGE_PIXELS:
        raise ValueError(f"{name} has {w}x{h} pixels, more than the cap of {MAX_IMAGE_PIXELS}")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(image, name)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except BOMBS:
        raise ValueError(f"{name} has more than the cap of {MAX_IMAGE_PIXELS} pixels") from None
    except DECODE_ERRORS as error:
        # Pillow's own words say what is missing ("image file is truncated (12 bytes not processed)").
        reason = str(error) if isinstance(error, (OSError, SyntaxError)) and " at 0x" not in str(error) else type(error).__name__
        raise ValueError(f"{name} is damaged or cut short: {reason}") from None
    narrow = _eight_bit(upright, name)
    try:
        return narrow.convert("RGB")
    except ValueError:
        raise ValueError(f"{name} has mode {narrow.mode}, which has no conversion to RGB") from None


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """16-bit and 32-bit integer greyscale to 8 bit; all other modes as they are.

    I;16 is x / 257, rounded. I (32 bit) is taken as 8 bit where no value passes 255, as 16 bit where none passes 65535.
    """
    if image.mode == "F":
        raise ValueError(f"{name} holds floating-point pixels, whose range is not defined: scale it to 8 bit first")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"{name} holds greyscale values from {low} to {high}, expected 0 to 65535")
    if image.mode != "I" or high > 255:
        values = (values * 2 + 257) // 514
    return Image.fromarray(values.astype(np.uint8), "L")


def to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of `colour` (LLaVA's `expand2square`)."""
    w, h = image.size
    if w == h:
        return image
    side = max(w, h)
    if side * side > MAX_RESIZED_PIXELS:
        raise ValueError(f"a picture of {w}x{h} padded to a square has more than the cap of {MAX_RESIZED_PIXELS} pixels")
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    return square


@dataclass(frozen=True)
class ImageProcessor:
    """What transformers' SiglipImageProcessor, CLIPImageProcessor and LlavaImageProcessor do, as uint8 views.

    size S.  mode: 'squash' resizes to SxS; 'crop' resizes the short side to S and cuts the middle SxS.  resample: a
    PIL.Image.Resampling value (3 is bicubic).  do_pad: pad to a square first, for processors that say so.
    `normalise` of kernels/patchify.py with image_mean, image_std and rescale gives their pixel_values.
    """

    size: int
    resample: int = 3
    mode: Literal["squash", "crop"] = "squash"
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF
    rescale: float = 1 / 255
    do_pad: bool = False

    @staticmethod
    def from_pretrained(directory: str | Path) -> ImageProcessor:
        """From preprocessor_config.json, or the image_processor entry of processor_config.json (where 5.x writes it)."""
        for file, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
            path = Path(directory, file)
            if path.is_file():
                config = json.loads(path.read_text())
                config = config.get(key) if key else config
                if config:
                    return ImageProcessor.from_config(config, str(path))
        raise ValueError(f"{directory} has neither preprocessor_config.json nor an image_processor in processor_config.json")

    @staticmethod
    def from_config(config: dict[str, Any], name: str) -> ImageProcessor:
        """From the keys of preprocessor_config.json; absent ones take the defaults of the class it names.

        Raises ValueError for a step that is off, a size that is not square, or a crop that is not the size.
        """
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor")
        clip = "siglip" not in kind.lower()
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(step, True) is False:
                raise ValueError(f"{name} sets {step} to false, expected true")
        size = config.get("size") or ({"shortest_edge": 224} if clip else 224)
        if isinstance(size, int):  # older files: the short side where a crop follows, a square elsewhere
            size = {"shortest_edge": size} if clip else {"height": size, "width": size}
        crop = config.get("crop_size") or 224
        crop = (crop, crop) if isinstance(crop, int) else (crop.get("height"), crop.get("width"))
        cropped, short_side = config.get("do_center_crop", clip), size.get("shortest_edge")
        side = short_side or size.get("height")
        if not side or size.get("longest_edge") or (not short_side and size.get("width") != side):
            raise ValueError(f"{name} resizes to {size}, expected a square or a shortest_edge")
        if bool(short_side) and not cropped:
            raise ValueError(f"{name} resizes the shortest edge to {side} with no crop after it, expected do_center_crop")
        if cropped and crop != (side, side):
            raise ValueError(f"{name} crops {crop[1]}x{crop[0]} after resizing to {size}, expected the same size")
        mean, std = config.get("image_mean") or (CLIP_MEAN if clip else HALF), config.get("image_std") or (CLIP_STD if clip else HALF)
        return ImageProcessor(
            size=int(side),
            resample=int(config.get("resample", 3)),
            mode="crop" if short_side else "squash",
            image_mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            image_std=(float(std[0]), float(std[1]), float(std[2])),
            rescale=float(config.get("rescale_factor", 1 / 255)),
            # LlavaNextImageProcessor has a do_pad too, which pads the number of tiles in a batch.
            do_pad=bool(config.get("do_pad")) and kind.startswith("LlavaImageProcessor"),
        )

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """int(mean * 255): 127 for SigLIP, (122, 116, 104) for CLIP."""
        r, g, b = (int(value * 255) for value in self.image_mean)
        return r, g, b

    def views(self, image: Image.Image, aspect: Literal["squash", "pad"] = "squash") -> Tensor:
        """uint8 [1, 3, S, S] of one RGB picture. 'pad' makes it square with the mean colour first, as LLaVA-1.5 was trained."""
        if aspect == "pad" or self.do_pad:
            image = to_square(image, self.pad_colour)
        return _to_tensor(self._fit(image))[None]

    def tiles(self, image: Image.Image, pinpoints: Pinpoints) -> Tensor:
        """uint8 [1 + n, 3, S, S]: the picture squashed, then the n anyres tiles row by row.

        The picture is resized to fit the best of `pinpoints` (the free side rounded up), put in the middle of black, and cut.
        """
        S = self.size
        (across, down), (width, height) = anyres_grid(image.size, S, pinpoints)
        w, h = image.size
        scale_w, scale_h = width / w, height / h
        if scale_w < scale_h:
            fitted = (width, min(math.ceil(h * scale_w), height))
        else:
            fitted = (min(math.ceil(w * scale_h), width), height)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize(fitted, self.resample), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
        tiles = _to_tensor(canvas).view(3, down, S, across, S).permute(1, 3, 0, 2, 4).reshape(-1, 3, S, S)
        return torch.cat([_to_tensor(image.resize((S, S), self.resample))[None], tiles])

    def _fit(self, image: Image.Image) -> Image.Image:
        S, (w, h) = self.size, image.size
        if self.mode == "squash":
            return image.resize((S, S), self.resample)
        # The long side is int(S * long / short), in this order, and the crop starts at a floor: transformers' arithmetic.
        long = int(S * max(w, h) / min(w, h))
        if S * long > MAX_RESIZED_PIXELS:
            raise ValueError(
                f"a picture of {w}x{h} is too long for a crop: with its short side resized to {S} it has {S * long} pixels, "
                f"more than the cap of {MAX_RESIZED_PIXELS}"
            )
        resized = image.resize((S, long) if w <= h else (long, S), self.resample)
        left, top = (resized.width - S) // 2, (resized.height - S) // 2
        return resized.crop((left, top, left + S, top + S))


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to uint8 [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
