"""Generated visual questions in four scenarios. None can be answered without its pictures, and none from one view of them alone.

multi-image  each: the colours of three pictures, in order              what changed: two pictures, an object's colour or nothing
video        where to: a dot moves from one corner to the next           order: colours appear one after the other
3D views     corner: a box on a floor, seen from the front (left or right) and from its right side (front or back)
one picture  weave: threads of two complementary colours in alternate rows of pixels; they cancel where the picture is halved, so
             that only the full-resolution tiles show them                where: which colours are in which corners

What the first stages learn from has no questions: captions of single pictures, and the same in words alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 32  # pixels along one side of a view
FRAMES = 4
COLOURS = {"red": (220, 50, 50), "green": (60, 190, 70), "blue": (60, 90, 230), "yellow": (230, 210, 60)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
# Complementary colours: grey plus and minus these add up to grey.
THREADS = {"red and cyan": (110, 0, 0), "green and magenta": (0, 110, 0), "blue and yellow": (0, 0, 110), "black and white": (80, 80, 80)}
# Fades in and out over its rows: a hard edge would leave 15 levels of its colour in the halved picture.
FADE = np.sin(np.pi * (np.arange(SIDE) + 0.5) / SIDE) ** 2
HEDGE = ", I think"  # may end an answer: see stages.py
Rng = np.random.Generator


@dataclass(frozen=True)
class Question:
    """pictures: in reading order; the frames where is_video.  chance: of the best constant answer."""

    scenario: str
    task: str
    text: str
    answer: str
    pictures: tuple[Image.Image, ...]
    chance: float
    is_video: bool = False


def where(rng: Rng) -> Question:
    """Two squares; its answer is the picture's caption."""
    picture, corners = _ground(rng), sorted(int(corner) for corner in rng.permutation(4)[:2])
    colours = [str(colour) for colour in rng.choice(list(COLOURS), 2)]
    for colour, corner in zip(colours, corners, strict=True):
        _square(picture, colour, _corner(corner) + rng.uniform(-2, 2, 2), rng.uniform(5, 7))
    answer = ", ".join(f"{colour} {PLACES[corner]}" for colour, corner in zip(colours, corners, strict=True))
    picture = picture.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
    return Question("one picture", "where", "Which colours are where?", answer, (picture,), 1 / 96)


def in_words(picture: Image.Image) -> str:
    """What each of the base view's patches shows, as its middle tells: a colour or nothing."""
    known, cell = {levels: colour for colour, levels in COLOURS.items()}, picture.width // 4
    middles = np.asarray(picture)[cell // 2 :: cell, cell // 2 :: cell].reshape(-1, 3).tolist()
    return " ".join(known.get((red, green, blue), "nothing") for red, green, blue in middles)


def colour_of_each(rng: Rng) -> Question:
    colours = [str(colour) for colour in rng.choice(list(COLOURS), 3)]
    pictures = []
    for colour in colours:
        picture, radius = _ground(rng), rng.uniform(6, 9)
        _square(picture, colour, rng.uniform(radius, SIDE - radius, 2), radius)
        pictures.append(picture)
    return Question("multi-image", "each", "Which colour does each picture show?", ", ".join(colours), tuple(pictures), 1 / 64)


def what_changed(rng: Rng) -> Question:
    before, after = (str(colour) for colour in rng.choice(list(COLOURS), 2, replace=False))
    if rng.random() < 0.25:
        after = before
    radius = rng.uniform(6, 9)
    place = rng.uniform(radius, SIDE - radius, 2)
    first = _ground(rng)
    second = first.copy()
    _square(first, before, place, radius)
    _square(second, after, place, radius)
    answer = "nothing" if after == before else f"{before} to {after}"
    return Question("multi-image", "what changed", "What changed?", answer, (first, second), 1 / 4)


def where_to(rng: Rng) -> Question:
    start = int(rng.integers(4))
    end = start ^ int(rng.choice([1, 2]))  # a neighbouring corner
    a, b = (_corner(corner) + rng.uniform(-2, 2, 2) for corner in (start, end))
    ground, colour = _ground(rng), str(rng.choice(list(COLOURS)))
    frames = []
    for t in (0, 0.5, 1, 1):  # half-way a frame tells the two ends, but not which is which
        frame = ground.copy()
        x, y = a + (b - a) * t
        ImageDraw.Draw(frame).ellipse((x - 5, y - 5, x + 5, y + 5), fill=COLOURS[colour])
        frames.append(frame)
    answer = f"{PLACES[start]} to {PLACES[end]}"
    return Question("video", "where to", "From where to where does it move?", answer, tuple(frames), 1 / 8, is_video=True)


def order(rng: Rng) -> Question:
    colours = [str(colour) for colour in rng.choice(list(COLOURS), 3, replace=False)]
    frame, frames = _ground(rng), []
    frames.append(frame.copy())
    for colour, corner in zip(colours, rng.permutation(4), strict=False):
        _square(frame, colour, _corner(int(corner)), 6)
        frames.append(frame.copy())
    chance = 1 / len(list(itertools.permutations(COLOURS, 3)))
    text = "In which order do the colours appear?"
    return Question("video", "order", text, ", ".join(colours), tuple(frames), chance, is_video=True)


def corner(rng: Rng) -> Question:
    right, back = bool(rng.integers(2)), bool(rng.integers(2))
    colour, ground = COLOURS[str(rng.choice(list(COLOURS)))], _ground(rng)
    views = []
    for beyond in (right, back):  # from the front its right is on the right; from its right side, so is its back
        view, x, height = ground.copy(), (24 if beyond else 8) + rng.uniform(-2, 2), rng.uniform(8, 11)
        draw = ImageDraw.Draw(view)
        draw.rectangle((0, 22, SIDE, SIDE), fill=(110, 100, 90))
        draw.rectangle((x - height / 2, 24 - height, x + height / 2, 24), fill=colour)
        views.append(view)
    answer = f"{'right' if right else 'left'} {'back' if back else 'front'}"
    return Question("3D views", "corner", "Where is the box?", answer, tuple(views), 1 / 4)


def weave(rng: Rng) -> Question:
    threads, size = str(rng.choice(list(THREADS))), 2 * SIDE
    ground = rng.integers(120, 136, 3) + rng.integers(-6, 7, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
    top, left = (int(place) for place in rng.integers(0, SIDE, 2))
    picture = woven(ground, top, left, threads)
    return Question("one picture", "weave", "Which colours are woven together?", threads, (picture,), 1 / 4)


def woven(ground: np.ndarray, top: int, left: int, threads: str) -> Image.Image:
    """Threads in SIDE x SIDE pixels of the ground, int [2 * SIDE, 2 * SIDE, 3], whose even rows have the first colour."""
    signs = np.where((np.arange(SIDE) + top) % 2 == 0, FADE, -FADE)
    pixels = ground.astype(float)
    pixels[top : top + SIDE, left : left + SIDE] += signs[:, None, None] * np.array(THREADS[threads])
    assert 0 <= pixels.min() and pixels.max() <= 255  # clipped, they would not cancel
    return Image.fromarray(pixels.round().astype(np.uint8))


Task = Callable[[Rng], Question]
TASKS: tuple[Task, ...] = (colour_of_each, what_changed, where_to, order, corner, weave, where)
SCENARIOS = ("multi-image", "video", "3D views", "one picture")
SPLITS = (
    "train",
    "held out",
    "pictures",
    "texts",
    "captions",
    "single pictures",
    "preferences",
    "held-out captions",
    "held-out preferences",
)


def questions(count: int, seed: int, split: str, tasks: Sequence[Task] = TASKS) -> list[Question]:
    """`count` questions, the tasks in turn. Each split draws from streams of its own."""
    streams = [np.random.default_rng([seed, SPLITS.index(split), task]) for task in range(len(tasks))]
    return [tasks[i % len(tasks)](streams[i % len(tasks)]) for i in range(count)]


def _ground(rng: Rng) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), tuple(int(level) for level in rng.integers(20, 70, 3)))


def _corner(number: int) -> np.ndarray:
    return np.array([8 + 16 * (number % 2), 8 + 16 * (number // 2)], dtype=float)


def _square(picture: Image.Image, colour: str, centre: np.ndarray, radius: float) -> None:
    x, y = centre
    ImageDraw.Draw(picture).rectangle((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
