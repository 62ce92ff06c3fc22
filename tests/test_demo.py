"""The demo: its questions need their pictures, its stages are the recipes and go on where they were stopped, and the whole run passes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import llava_fast as lf
from llava_fast.demo import run as demo_run
from llava_fast.demo import stages
from llava_fast.demo.measure import MAX_NEW_TOKENS, as_request, is_right, quarters, transformers_answers, untouched
from llava_fast.demo.model import make_checkpoint, write_records
from llava_fast.demo.run import faults, run
from llava_fast.demo.scenes import HEDGE, SCENARIOS, SIDE, TASKS, THREADS, in_words, questions, where, woven
from llava_fast.demo.stages import STAGES, TINY, hedged, settings
from llava_fast.training.config import as_config

SCALE = 0.02


def fingerprint(question) -> tuple:
    return (question.task, *(picture.tobytes() for picture in question.pictures))


def test_the_same_seed_draws_the_same_questions():
    a, b, c = questions(60, 1, "train"), questions(60, 1, "train"), questions(60, 2, "train")
    assert [fingerprint(q) for q in a] == [fingerprint(q) for q in b] != [fingerprint(q) for q in c]
    assert [q.answer for q in a] == [q.answer for q in b]


def test_held_out_questions_are_new():
    train, held_out = ({fingerprint(q) for q in questions(1200, 0, split)} for split in ("train", "held out"))
    assert len(train) == 1200 and not train & held_out


def test_the_text_alone_tells_nothing():
    """One text a task, and no answer more common than the stated chance (with four standard deviations of 500 draws)."""
    asked = questions(500 * len(TASKS), 3, "train")
    assert {q.scenario for q in asked} == set(SCENARIOS)
    for task in {q.task for q in asked}:
        own = [q for q in asked if q.task == task]
        assert len({q.text for q in own}) == 1
        counts = Counter(q.answer for q in own)
        chance = own[0].chance
        assert counts.most_common(1)[0][1] / len(own) < chance + 4 * np.sqrt(chance * (1 - chance) / len(own))


def nearest_neighbour(task: str, place: int) -> float:
    """Accuracy of answering with the most alike of 1,500 questions, by the picture at `place` alone."""

    def seen(split: str, count: int) -> tuple[np.ndarray, list[str]]:
        own = [q for q in questions(count * len(TASKS), 4, split) if q.task == task]
        return np.stack([np.asarray(q.pictures[place].resize((8, 8))).ravel().astype(np.float32) for q in own]), [q.answer for q in own]

    known, known_answers = seen("train", 1500)
    asked, answers = seen("held out", 150)
    closest = ((asked[:, None] - known[None]) ** 2).sum(-1).argmin(1)
    return float(np.mean([answers[i] == known_answers[j] for i, j in enumerate(closest)]))


@pytest.mark.parametrize(
    "task, pictures, most",
    [("each", 3, 0.2), ("what changed", 2, 0.5), ("where to", 4, 0.65), ("order", 4, 0.4), ("corner", 2, 0.65)],
)
def test_no_single_picture_tells_the_answer(task, pictures, most):
    """`most`: what one picture leaves open (of a move its one end, of a corner one of two words), and four standard deviations."""
    assert max(nearest_neighbour(task, place) for place in range(pictures)) < most


def test_only_tiles_show_the_weave():
    """Halved, pictures that differ in nothing but their threads are equal to one level; in full they differ by a hundred."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        ground = rng.integers(120, 136, 3) + rng.integers(-6, 7, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
        top, left = (int(v) for v in rng.integers(0, SIDE, 2))
        pictures = [woven(ground, top, left, threads) for threads in THREADS]
        halved = [np.asarray(p.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int) for p in pictures]
        full = [np.asarray(p).astype(int) for p in pictures]
        for a, b in itertools.combinations(range(len(THREADS)), 2):
            assert np.abs(halved[a] - halved[b]).max() <= 1
            assert np.abs(full[a] - full[b]).max() >= 75


def test_records_train_and_answers_agree_with_transformers(tmp_path):
    """A few steps on a few records of every task: lf.train takes them, and both sides answer alike, right or wrong."""
    asked = questions(28, 0, "train")
    write_records(asked, tmp_path, "train")
    make_checkpoint(tmp_path / "fresh", [part for q in asked for part in (q.text, q.answer)], seed=0)
    recipe = {"model": tmp_path / "fresh", "data": str(tmp_path / "train.json"), "output_dir": tmp_path / "out", "tokens_per_row": 1152}
    result = lf.train({**recipe, "inputs": {"num_frames": 4}, "lr": 1e-3, "max_steps": 4, "progress": False})
    assert result.steps == 4 and result.losses[-1] < result.losses[0]
    model = lf.load(tmp_path / "out")
    mine = [q for q in questions(28, 0, "held out") if not q.is_video]
    completions = lf.generate(model, [as_request(q) for q in mine], max_new_tokens=MAX_NEW_TOKENS)
    assert [c.token_ids for c in completions] == transformers_answers(tmp_path / "out", mine)
    # Frames are pooled 2 x 2: a quarter of the rows.
    clip = next(q for q in questions(28, 0, "held out") if q.is_video)
    assert lf.generate(model, as_request(clip), max_new_tokens=1).visual_tokens == 4 * (SIDE // 8) ** 2 // 4


def test_answers_are_judged_word_for_word_but_for_the_hedge():
    question = questions(1, 0, "train")[0]
    assert is_right(question, question.answer) and is_right(question, question.answer + HEDGE)
    assert not is_right(question, question.answer[:-1]) and not is_right(question, HEDGE) and not is_right(question, "")
    assert [q.size for q in quarters(Image.new("RGB", (2 * SIDE, 2 * SIDE)))] == [(SIDE, SIDE)] * 4


def test_pictures_in_words_say_what_their_captions_say():
    for question in questions(50, 0, "texts", (where,)):
        words = in_words(question.pictures[0]).split(" ")
        corners = {0: "top left", 2: "top right", 8: "bottom left", 10: "bottom right"}  # first of the four patches of each
        seen = [f"{own} {place}" for first, place in corners.items() for own in {words[first + i] for i in (0, 1, 4, 5)} - {"nothing"}]
        assert len(words) == 16 and ", ".join(seen) == question.answer


def test_two_thirds_of_the_mixture_are_hedged():
    asked = questions(900, 0, "train")
    mixed = hedged(asked, 0)
    share = np.mean([q.answer.endswith(HEDGE) for q in mixed])
    assert abs(share - 2 / 3) < 4 * np.sqrt(2 / 9 / 900)
    assert [q.answer.removesuffix(HEDGE) for q in mixed] == [q.answer for q in asked]


def test_only_the_projector_may_differ(tmp_path):
    for name, changed in (("before", ()), ("aligned", ("projector",)), ("more", ("projector", "language_model"))):
        tensors = {part: torch.ones(3) for part in ("vision_tower.a", "multi_modal_projector.b", "language_model.c")}
        for part in changed:
            next(tensor for key, tensor in tensors.items() if part in key).add_(1e-6)
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert untouched(tmp_path / "before", tmp_path / "aligned") and not untouched(tmp_path / "before", tmp_path / "more")


def test_every_stage_is_its_recipe():
    """What the demo sets differently is what stages.py names, and the recipe decides the rest."""
    for stage in STAGES[2:]:
        made = as_config(settings(stage, "m", "d.json", "o", 0))
        own = as_config({"recipe": stage.recipe, "model": "m", "data": "d.json", "output_dir": "o"})
        names = (field.name for field in dataclasses.fields(made))
        differing = {name for name in names if getattr(made, name) != getattr(own, name)}
        assert differing <= {*TINY, *stage.fields, "epochs", "seed"}, stage.name
        assert (made.dpo is not None) == (stage.name == "dpo") and made.part_lr("projector") is not None
        assert (made.lr_decoder is None) == (stage.name == "align")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages on little data, with exit code."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder, scale=SCALE)


def test_all_stages_on_little_data(whole):
    """Hardly trained: exit code 1; every stage is there, and aligning has changed the projector alone."""
    folder, code = whole
    results = json.loads((folder / "results.json").read_text())
    assert code == 1 and list(results["stages"]) == [stage.name for stage in STAGES]
    assert results["stages"]["align"]["untouched"]
    assert results["agree_with_transformers"] == results["compared_with_transformers"] > 30
    for name in ("answers.png", "stages.png"):
        with Image.open(folder / name) as sheet:
            assert sheet.width > 800


def test_what_fails_is_said(whole, capsys):
    """Called again, it trains nothing and says the same."""
    folder, _ = whole
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert run(folder, scale=SCALE) == 1
    said = capsys.readouterr().out
    assert "90% are needed" in said and said.count("done before") == len(STAGES)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before


def test_stages_of_another_version_do_not_count(tmp_path, monkeypatch, capsys):
    ran = []

    def stop(number, folder, seed, scale):
        ran.append(number)
        if number == 2:
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    monkeypatch.setattr(demo_run, "run_stage", stop)
    for scale in (SCALE, SCALE, 2 * SCALE):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, scale=scale)
    assert ran == [0, 1, 2, 2, 0, 1, 2], "the same goes on, another begins"
    assert "holds another version's stages" in capsys.readouterr().out


def test_faults_are_found():
    good = {
        "scenarios": [{"scenario": "video", "accuracy": 0.95}],
        "stages": {"align": {"captions": 0.9, "untouched": True}, "dpo": {"preferred": 1.0, "hedged": 0.05}},
    }
    assert faults(good) == []
    for path, value in (
        (("scenarios", 0, "accuracy"), 0.89),
        (("stages", "align", "captions"), 0.74),
        (("stages", "align", "untouched"), False),
        (("stages", "dpo", "preferred"), 0.89),
        (("stages", "dpo", "hedged"), 0.11),
    ):
        bad = copy.deepcopy(good)
        bad[path[0]][path[1]][path[2]] = value
        assert len(faults(bad)) == 1, path


def test_stopped_in_every_stage_it_goes_on(whole, tmp_path, monkeypatch):
    """Ctrl-C once in each stage, the same call after each: in the end the weights of a run that was never stopped."""
    real_train, real_tower = lf.train, stages.train_tower
    stopped: list[str] = []

    def train(fields):
        name = fields["output_dir"].name
        if name in stopped:
            return real_train(fields)
        stopped.append(name)
        return real_train({**fields, "log_every": 1}, on_step=lambda metrics: os.kill(os.getpid(), signal.SIGINT))

    def tower(*args):
        if "tower" not in stopped:
            stopped.append("tower")
            raise KeyboardInterrupt
        return real_tower(*args)

    monkeypatch.setattr(lf, "train", train)
    monkeypatch.setattr(stages, "train_tower", tower)
    for number in range(len(STAGES)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, scale=SCALE)
        assert stopped == [stage.name for stage in STAGES[: number + 1]]
    assert run(tmp_path, scale=SCALE) == 1
    folder, _ = whole
    ours, theirs = (load_file(place / "seed-0" / "dpo" / "model.safetensors") for place in (tmp_path, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    assert run(tmp_path, seed=1) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(row["accuracy"] >= 0.9 for row in results["scenarios"])
    assert results["agree_with_transformers"] == results["compared_with_transformers"] == 500
    stages = results["stages"]
    assert stages["decoder"]["captions"] < 0.2 and stages["align"]["captions"] >= 0.9
    assert stages["dpo"]["preferred_before"] < 0.2 and stages["dpo"]["preferred"] >= 0.9
    assert stages["interleave"]["hedged"] > 0.5 and stages["dpo"]["hedged"] < 0.1
    assert lf.load(results["checkpoint"]).config.options["mm_spatial_pool_mode"] == "average"
