"""Pictures: every kind of source and mode, every kind of damage, and pixel values equal to transformers' PIL processors."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import socket
import struct
import threading
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_fast.inputs import fetch as fetching
from llava_fast.inputs import images
from llava_fast.inputs.images import CLIP_MEAN, CLIP_STD, HALF, ImageProcessor, image_size, open_image, source_name
from llava_fast.inputs.layouts import anyres_grid, default_pinpoints
from llava_fast.kernels import patchify
from llava_fast.kernels.patchify import normalise
from llava_fast.requests import InputOptions

SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
SKIMAGE = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = [
    SKLEARN / "china.jpg",
    SKLEARN / "flower.jpg",
    SKIMAGE / "rocket.jpg",
    SKIMAGE / "retina.jpg",
    SKIMAGE / "astronaut.png",
    SKIMAGE / "coffee.png",
    SKIMAGE / "chelsea.png",
    SKIMAGE / "camera.png",
    SKIMAGE / "text.png",
    Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
    Path(matplotlib.get_data_path()) / "sample_data" / "Minduka_Present_Blue_Pack.png",
]
SIGLIP = {"size": {"height": 384, "width": 384}, "resample": 3, "do_convert_rgb": None}
CLIP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
CLIP_336 = ImageProcessor(336, mode="crop", image_mean=CLIP_MEAN, image_std=CLIP_STD)


@pytest.fixture(params=PHOTOGRAPHS, ids=lambda path: path.name)
def photograph(request) -> Path:
    return request.param


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(w: int, h: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(w * 7 + h).integers(0, 256, (h, w, channels), dtype=np.uint8)
    return Image.fromarray(values if channels > 1 else values[..., 0])


def from_hf(processor) -> ImageProcessor:
    return ImageProcessor.from_config(processor.to_dict(), type(processor).__name__)


def pixel_values(processor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


def ours(processor: ImageProcessor, image: Image.Image, aspect="squash") -> torch.Tensor:
    views = processor.views(image, aspect)
    assert views.dtype == torch.uint8 and views.shape == (1, 3, processor.size, processor.size) and views.is_contiguous()
    return normalise(views, processor.image_mean, processor.image_std, processor.rescale)


# --- preprocessing ---


def test_opening_equals_transformers(photograph):
    assert np.array_equal(np.array(open_image(photograph)), np.array(load_image(str(photograph))))


def test_siglip_is_bit_equal_to_transformers(photograph):
    reference = SiglipImageProcessorPil(**SIGLIP)
    processor = from_hf(reference)
    assert processor == ImageProcessor(384)
    image = open_image(photograph)
    assert torch.equal(ours(processor, image), pixel_values(reference, image))


def test_clip_is_bit_equal_to_transformers(photograph):
    reference = CLIPImageProcessorPil(**CLIP)
    processor = from_hf(reference)
    assert processor == CLIP_336
    image = open_image(photograph)
    assert torch.equal(ours(processor, image), pixel_values(reference, image))


@pytest.mark.parametrize("statistics", [(CLIP_MEAN, CLIP_STD), (HALF, HALF)], ids=["clip", "half"])
def test_padding_is_bit_equal_to_transformers(photograph, statistics):
    mean, std = statistics
    reference = LlavaImageProcessorPil(do_pad=True, image_mean=list(mean), image_std=list(std), **CLIP)
    image = open_image(photograph)
    padded = from_hf(reference)
    assert padded.do_pad and padded.pad_colour == ((122, 116, 104) if mean == CLIP_MEAN else (127, 127, 127))
    assert torch.equal(ours(padded, image), pixel_values(reference, image))
    plain = from_hf(LlavaImageProcessorPil(image_mean=list(mean), image_std=list(std), **CLIP))
    assert not plain.do_pad and torch.equal(ours(plain, image, "pad"), pixel_values(reference, image))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (3, 3), (5, 4), (20000, 3), (3, 20000), (384, 384), (385, 383), (31, 40)])
def test_odd_sizes_are_bit_equal_too(size):
    image = noise(*size)
    for reference in (SiglipImageProcessorPil(**SIGLIP), CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)):
        assert torch.equal(ours(from_hf(reference), image), pixel_values(reference, image))


def test_a_crop_of_a_sliver_is_refused_and_a_squash_is_not():
    sliver = noise(20000, 3)
    with pytest.raises(ValueError, match="20000x3 is too long for a crop: .* short side resized to 336 .* 752640000 pixels"):
        CLIP_336.views(sliver)
    with pytest.raises(ValueError, match="20000x3 padded to a square"):
        ImageProcessor(384).views(sliver, "pad")
    assert ImageProcessor(384).views(sliver).shape == (1, 3, 384, 384)


@pytest.mark.parametrize("statistics", [(HALF, HALF), (CLIP_MEAN, CLIP_STD), ((0.1, 0.2, 0.3), (0.7, 0.8, 0.9))])
@pytest.mark.parametrize("rescale", [1 / 255, 0.00392156862745098, 1 / 127.5, 1 / 256, 1.0])
def test_every_byte_value_is_normalised_as_transformers_does(statistics, rescale):
    mean, std = statistics
    square = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([square, square[::-1], square.T], axis=-1))
    reference = SiglipImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=list(mean), image_std=list(std), rescale_factor=rescale
    )
    got = ours(from_hf(reference), image)
    assert got.dtype == torch.float32 and torch.equal(got, pixel_values(reference, image))


def test_siglip_takes_the_short_form_and_clip_the_table():
    cpu = torch.device("cpu")
    assert patchify._levels(HALF, HALF, 1 / 255, cpu)[1] and not patchify._levels(CLIP_MEAN, CLIP_STD, 1 / 255, cpu)[1]


def test_normalise_refuses_what_are_not_views():
    with pytest.raises(ValueError, match=r"uint8 \[N, 3, S, S\], got torch.float32 \[1, 3, 4, 4\]"):
        normalise(torch.zeros(1, 3, 4, 4))


# --- anyres tiles ---


@pytest.mark.parametrize("tile", [384, 336])
def test_tiles_are_bit_equal_to_transformers(photograph, tile):
    image = open_image(photograph)
    pinpoints = default_pinpoints(tile)
    reference = LlavaNextImageProcessorPil(
        size={"height": tile, "width": tile} if tile == 384 else {"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=[[h, w] for w, h in pinpoints],  # transformers reads (height, width)
    )
    processor = ImageProcessor(tile, mode="squash" if tile == 384 else "crop", image_mean=CLIP_MEAN, image_std=CLIP_STD)
    tiles = processor.tiles(image, pinpoints)
    (across, down), _ = anyres_grid(image.size, tile, pinpoints)
    assert tiles.dtype == torch.uint8 and tiles.shape == (1 + across * down, 3, tile, tile)
    assert torch.equal(normalise(tiles, CLIP_MEAN, CLIP_STD), pixel_values(reference, image)[0])


def test_tiles_go_row_by_row_on_centred_black():
    image = Image.new("RGB", (60, 20), (255, 255, 255))
    image.paste((200, 0, 0), (0, 0, 20, 20))
    tiles = ImageProcessor(20, resample=0).tiles(image, [(60, 40)])  # 60x20 fits at scale 1: ten black rows above and below
    assert tiles.shape == (7, 3, 20, 20)
    whole = tiles[1:].view(2, 3, 3, 20, 20).permute(2, 0, 3, 1, 4).reshape(3, 40, 60)
    assert not whole[:, :10].any() and not whole[:, 30:].any()
    assert torch.equal(whole[:, 10:30], torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000), (7, 1000)])
def test_tiles_of_slivers(size):
    tiles = ImageProcessor(14).tiles(noise(*size), "(1x1),...,(3x3)")
    (across, down), _ = anyres_grid(size, 14, "(1x1),...,(3x3)")
    assert tiles.shape == (1 + across * down, 3, 14, 14)


# --- reading the processor of a checkpoint ---


def test_from_pretrained_reads_what_transformers_saves(tmp_path):
    SiglipImageProcessor(**SIGLIP).save_pretrained(tmp_path / "siglip")
    CLIPImageProcessor(**CLIP).save_pretrained(tmp_path / "clip")
    assert ImageProcessor.from_pretrained(tmp_path / "siglip") == ImageProcessor(384)
    assert ImageProcessor.from_pretrained(tmp_path / "clip") == CLIP_336
    nested = json.loads((tmp_path / "siglip" / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested, "patch_size": 14}))
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor(384)


def test_from_pretrained_reads_the_released_files(tmp_path):
    released = {  # llava-interleave-qwen and llava-1.5, as published
        "siglip": {
            "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor", "image_std": [0.5, 0.5, 0.5], "processor_class": "LlavaProcessor",
            "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 384, "width": 384},
        },
        "clip": {
            "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
            "image_processor_type": "CLIPImageProcessor", "resample": 3, "size": {"shortest_edge": 336},
        },
        "clip_old": {"crop_size": 336, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor", "size": 336},
    }  # fmt: skip
    for name, config in released.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(config))
    assert ImageProcessor.from_pretrained(tmp_path / "siglip") == ImageProcessor(384)
    for name in ("clip", "clip_old"):
        assert ImageProcessor.from_pretrained(tmp_path / name) == CLIP_336


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "sets do_normalize to false"),
        ({"size": {"height": 384, "width": 336}}, "expected a square"),
        ({"size": {"shortest_edge": 384}}, "no crop after it"),
        ({"do_center_crop": True, "crop_size": {"height": 300, "width": 384}}, "crops 384x300"),
    ],
)
def test_processors_that_do_something_else_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_config({"image_processor_type": "SiglipImageProcessor", **SIGLIP, **change}, "the processor")


def test_a_directory_without_a_processor_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither preprocessor_config.json nor"):
        ImageProcessor.from_pretrained(tmp_path)


# --- sources ---


def test_all_sources_give_the_same_picture(photograph):
    data = photograph.read_bytes()
    kind = "jpeg" if photograph.suffix == ".jpg" else "png"
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    want = np.array(open_image(photograph))
    with Image.open(photograph) as lazy:
        for source in (str(photograph), data, bytearray(data), memoryview(data), url, lazy):
            image = open_image(source)
            assert image.mode == "RGB" and np.array_equal(np.array(image), want)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(upright, exif=exif)
    got = np.array(open_image(data))
    want = np.array(load_image("data:image/png;base64," + base64.b64encode(data).decode()))
    assert np.array_equal(got, want) and (got.shape[:2] == ((6, 4) if orientation > 4 else (4, 6)))
    with Image.open(io.BytesIO(data)) as lazy:
        assert np.array_equal(np.array(open_image(lazy)), want)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_become_rgb_as_pillow_converts_them(mode):
    image = noise(9, 7, 4).convert("RGB").convert(mode) if mode not in ("LA", "PA", "RGBA") else noise(9, 7, 4).convert(mode)
    assert image.mode == mode
    assert np.array_equal(np.array(open_image(image)), np.array(image.convert("RGB")))


def test_alpha_is_dropped_as_transformers_load_image_drops_it(tmp_path):
    noise(9, 7, 4).save(tmp_path / "alpha.png")
    palette = noise(9, 7).convert("P")
    palette.save(tmp_path / "palette.png", transparency=3)
    for name in ("alpha.png", "palette.png"):
        assert np.array_equal(np.array(open_image(tmp_path / name)), np.array(load_image(str(tmp_path / name))))


def test_cmyk_jpeg():
    data = encoded(noise(16, 16).convert("CMYK"), "JPEG")
    with Image.open(io.BytesIO(data)) as cmyk:
        assert cmyk.mode == "CMYK"
        assert np.array_equal(np.array(open_image(data)), np.array(cmyk.convert("RGB")))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 128, 129, 256, 257], [385, 386, 32768, 65406, 65535]], np.uint16)
    want = np.array([[0, 0, 1, 1, 1], [1, 2, 128, 254, 255]], np.uint8)
    assert np.array_equal(want, np.floor(values / 257 + 0.5).astype(np.uint8))
    Image.fromarray(values).save(tmp_path / "grey16.png")
    Image.fromarray(values).save(tmp_path / "grey16.tif")
    for source in (
        Image.fromarray(values),
        tmp_path / "grey16.png",
        tmp_path / "grey16.tif",
        Image.fromarray(values.astype(np.int32), "I"),
    ):
        got = np.array(open_image(source))
        assert np.array_equal(got, np.repeat(want[..., None], 3, axis=-1))
    small = np.array([[0, 7, 255]], np.int32)
    assert np.array_equal(np.array(open_image(Image.fromarray(small, "I")))[..., 0], small)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.array([[0, 70000]], np.int32), "I"), "greyscale values from 0 to 70000, expected 0 to 65535"),
        (Image.fromarray(np.array([[0.5]], np.float32), "F"), "floating-point pixels"),
        (Image.new("La", (4, 4)), "mode La, which has no conversion"),
        (Image.new("RGB", (0, 5)), "no pixels"),
    ],
    ids=["int32", "float", "premultiplied", "empty"],
)
def test_pictures_without_an_rgb_meaning_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        open_image(image)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [noise(8, 8), noise(8, 9).resize((8, 8))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as gif:
        assert np.array_equal(np.array(open_image(data)), np.array(gif.convert("RGB")))


# --- bad sources ---


def refused(source, *, name: str | None = None, options: InputOptions | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        open_image(source, options)
    message = str(caught.value)
    assert " at 0x" not in message and len(message) < 700, message
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ or caught.value.__context__ is None
    if name is not None:
        assert name in message, message
    return message


def test_damaged_files(tmp_path):
    jpeg = (SKLEARN / "china.jpg").read_bytes()
    cut, text, empty = tmp_path / "cut.jpg", tmp_path / "text.png", tmp_path / "empty.png"
    cut.write_bytes(jpeg[: len(jpeg) // 2])
    text.write_text("this is not a picture")
    empty.write_bytes(b"")
    assert "cut short: image file is truncated" in refused(cut, name=str(cut))
    assert "not a picture that can be read" in refused(text, name=str(text))
    assert "empty (0 bytes)" in refused(empty, name=str(empty))
    assert "not a picture that can be read" in refused(jpeg[:3000], name="3000 bytes")  # cut inside the header
    assert "cut short" in refused((SKIMAGE / "coffee.png").read_bytes()[:5000])
    missing = tmp_path / "missing.png"
    assert "No such file" in refused(missing, name=str(missing))
    assert "not a regular file" in refused(tmp_path)
    assert "malformed" in refused("a\0b")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own words on damaged TIFF tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_any_damage_is_a_value_error_or_a_picture(kind):
    good = bytearray(encoded(noise(24, 18), kind))
    rng = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(int(rng.integers(1, 6))):
            bad[int(rng.integers(len(bad)))] = int(rng.integers(256))
        bad = bad[: int(rng.integers(1, len(bad) + 1))]
        try:
            assert open_image(bytes(bad)).mode == "RGB"
        except ValueError as error:
            assert " at 0x" not in str(error)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png;base64,@@@@", "broken base64"),
        ("data:image/png,abc", "data:<type>;base64,<data>"),
        ("data:image/png;base64,", "empty"),
        ("A" * 5000, "a string of 5000 characters"),
        (42, "got a int"),
        (object(), "got a object"),
        (None, "got a NoneType"),
    ],
)
def test_bad_sources(source, message):
    told = refused(source)
    assert message in told and "AAAA" not in told


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")


def test_postscript_is_not_run():
    assert "not a picture" in refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


def claiming(w: int, h: int) -> bytes:
    """A small PNG whose header claims a size."""
    data = bytearray(encoded(noise(4, 4)))
    data[16:24] = struct.pack(">II", w, h)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_in_a_header_is_that_of_the_picture(orientation, kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(30, 20).save(tmp_path / "picture", kind, exif=exif)
    size = image_size(tmp_path / "picture")
    assert size == open_image(tmp_path / "picture").size == ((20, 30) if orientation >= 5 else (30, 20))
    noise(30, 20).save(tmp_path / "plain", kind)
    assert image_size(tmp_path / "plain") == (30, 20)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("w", "h"), [(14_000, 14_000), (10_000, 9_000), (0, 5)])
def test_a_header_is_refused_as_the_picture_is(w, h, tmp_path, monkeypatch):
    (tmp_path / "big.png").write_bytes(claiming(w, h))
    with pytest.raises(ValueError, match=r"big\.png' .*(pixels|not a picture)") as of_header:
        image_size(tmp_path / "big.png")
    assert str(of_header.value) == refused(tmp_path / "big.png")
    for name, data in (("text", b"hello"), ("empty", b""), ("absent", None)):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as of_header:
            image_size(tmp_path / name)
        assert str(of_header.value) == refused(tmp_path / name)
    with pytest.raises(ValueError, match="not a regular file"):
        image_size(tmp_path)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(ValueError, match="5 bytes, more than the cap of 4"):
        image_size(tmp_path / "text")


def test_caps(monkeypatch):
    assert "more than the cap of 89478485 pixels" in refused(claiming(30000, 30000))
    between = claiming(11000, 11000)  # past our cap, below Pillow's error
    with pytest.warns(Image.DecompressionBombWarning):
        assert "pixels, more than the cap" in refused(between)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 1000)
    big = SKLEARN / "china.jpg"
    assert f"{big.stat().st_size} bytes, more than the cap of 1000" in refused(big)
    assert "more than the cap of 1000" in refused(big.read_bytes())
    assert "more than the cap of 1000" in refused("data:image/jpeg;base64," + base64.b64encode(big.read_bytes()).decode())
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 100)
    assert "20x6 pixels, more than the cap of 100" in refused(noise(20, 6))


# --- http ---


@pytest.fixture
def server():
    """A local server: /ok a picture, /loop and /away redirect, /big is long, /missing is 404."""
    picture = encoded(noise(5, 4))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            hosts.append(self.headers["Host"])
            locations = {"/loop": "/loop", "/away": "http://other.example/ok", "/file": "file:///etc/passwd", "/hop": "/ok"}
            if path in locations:
                self.send_response(302)
                self.send_header("Location", locations[path])
                self.end_headers()
            elif path in ("/ok", "/big", "/packed"):
                self.send_response(200)
                if path == "/packed":
                    self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                self.wfile.write(picture if path != "/big" else b"x" * 200_000)
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    hosts: list[str] = []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd.server_address[1], hosts
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def public(server, monkeypatch):
    """pictures.example and other.example resolve to a public address, which is wired to the local server."""
    port, hosts = server
    monkeypatch.setattr(fetching, "resolve", lambda host, _: ["93.184.216.34"])
    monkeypatch.setattr(fetching, "connect", lambda address, _: socket.create_connection(("127.0.0.1", port), timeout=5))
    return hosts


ALLOWED = InputOptions(allowed_media_hosts=("pictures.example",))


def test_a_named_host_is_fetched(public):
    assert open_image("http://pictures.example/ok?token=secret", ALLOWED).size == (5, 4)
    assert open_image("http://PICTURES.example/hop", ALLOWED).size == (5, 4)
    assert set(public) == {"pictures.example"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://other.example/ok?token=secret", "its host is not among allowed_media_hosts"),
        ("http://pictures.example/away", "http://other.example is not fetched"),
        ("http://pictures.example:8080/ok", "http://pictures.example:8080 is not fetched"),
        ("http://user:secret@pictures.example/ok", "user name or password"),
        ("http://pictures.example/loop", "redirects more than 3 times"),
        ("http://pictures.example/file", "not http or https"),
        ("http://pictures.example/missing", "HTTP status 404"),
        ("http://pictures.example/packed", "compressed"),
        ("http://pictures.example:x/ok", "malformed"),
        ("http:///ok", "names no host"),
    ],
)
def test_what_is_not_fetched(public, url, message):
    told = refused(url, options=ALLOWED)
    assert message in told and "secret" not in told


def test_fetched_bytes_are_capped(public, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100_000)
    assert "larger than the cap of 100000 bytes" in refused("http://pictures.example/big", options=ALLOWED)


def test_a_slow_transfer_ends(public, monkeypatch):
    monkeypatch.setattr(fetching, "DEADLINE_S", -1.0)
    assert "took longer" in refused("http://pictures.example/ok", options=ALLOWED)


def test_nothing_is_fetched_unless_hosts_are_named(public):
    assert "allowed_media_hosts []" in refused("http://pictures.example/ok")
    assert not public


def test_a_local_server_is_refused_although_named(server):
    port, hosts = server
    for host in ("127.0.0.1", "localhost"):
        options = InputOptions(allowed_media_hosts=(f"{host}:{port}",))
        assert "which is not public" in refused(f"http://{host}:{port}/ok", options=options)
    assert not hosts


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255",
     "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
     "ff02::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address, monkeypatch):
    assert not fetching.is_public(address)
    monkeypatch.setattr(fetching, "resolve", lambda host, _: ["93.184.216.34", address])  # one public address does not help
    monkeypatch.setattr(fetching, "connect", lambda *_: pytest.fail("connected"))
    assert "which is not public" in refused("https://pictures.example/ok", options=ALLOWED)


def test_public_addresses():
    assert fetching.is_public("93.184.216.34") and fetching.is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_an_unreachable_host(monkeypatch):
    def nowhere(host, _):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(fetching, "resolve", nowhere)
    assert "could not be fetched: gaierror" in refused("https://pictures.example/ok", options=ALLOWED)


def test_names_of_sources():
    assert source_name("a/b.png") == "'a/b.png'" and source_name(Path("a/b.png")) == "'a/b.png'"
    assert source_name(b"abc") == "a picture of 3 bytes" and source_name(noise(3, 2)) == "a PIL image of 3x2, mode RGB"
    assert source_name("https://user:pw@host.example/a?key=1#x") == "https://host.example/a"
