"""`train` on tiny checkpoints: records of every kind, transformers as the reference, learning, resume after a kill, what is saved."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, get_scheduler

import llava_fast as lf
from llava_fast import checkpoint
from llava_fast.kernels.patchify import normalise
from llava_fast.training.batches import Position, make_steps, plan_epoch
from llava_fast.training.config import as_config
from llava_fast.training.dataset import index_records
from llava_fast.training.step import decays, part_of

ANSWERS = ["yes", "no", "red", "green"]


def picture(seed, size=(60, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def record(number, answer, **media):
    question = "What are these?" if media else "Which one?"
    return {"id": number, **media, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def write(folder, records):
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, a video file, a folder of frames."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(8):
        picture(i, (60 + 30 * i, 40)).save(folder / f"{i}.png")
    (folder / "frames").mkdir()
    for i in range(5):
        picture(i).save(folder / "frames" / f"{i}.jpg")
    with av.open(str(folder / "clip.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(23):
            for packet in stream.encode(av.VideoFrame.from_image(picture(i, (64, 48)))):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return folder


@pytest.fixture
def four(folder):
    """Four records that only the pictures tell apart, one without."""
    media = [{"image": "0.png"}, {"image": ["1.png", "2.png"]}, {"image": "3.png"}, {}]
    return write(folder, [record(i, answer, **m) for i, (answer, m) in enumerate(zip(ANSWERS, media, strict=True))])


def fields(directory, data, out, **changes):
    return {
        "model": str(directory),
        "data": data,
        "output_dir": str(out),
        "tokens_per_row": 128,
        "max_steps": 10,
        "lr": 1e-3,
        "lr_vision_tower": 5e-4,
        "save_every": None,
        "progress": False,
        "log_every": 1,
        **changes,
    }


def tensors(directory):
    return dict(checkpoint.read_tensors(checkpoint.index_tensors(Path(directory))))


# --- records to samples ---


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"num_frames": 4},
        {"fps": 3},
        {"num_frames": 6, "pool": "average"},
        {"frames_upbound": 2},
        {"fps": 3, "frames_upbound": 6, "force_sample": True},
        {"anyres": True, "num_frames": 2},
        {"image_aspect": "pad"},
    ],
)
def test_sizes_known_beforehand_are_those_of_the_samples(checkpoints, folder, tmp_path, inputs):
    data = write(
        folder,
        [
            record(0, "yes", image="0.png"),
            record(1, "no", image="7.png"),
            record(2, "red", image=["1.png", "2.png", "7.png"]),
            record(3, "green", video="clip.mp4"),
            record(4, "blue", video="frames"),
            record(5, "yes"),
        ],
    )
    model = lf.load(checkpoints["qwen"])
    config = as_config(fields("m", data, tmp_path, inputs=inputs, tokens_per_row=2000))
    indexed = index_records(config, model.input_spec)
    for i in range(6):
        (sample,), views = (example := indexed.load(i)).sequences, example.views
        assert len(sample) == indexed.tokens[i]
        assert sample.views == indexed.views[i] == (0 if views is None else views.shape[0])
        assert views is None or views.dtype == torch.uint8
        supervised = sample.labels[sample.labels != -100]
        assert model.tokenizer.decode(supervised) == json.loads(Path(data).read_text())[i]["conversations"][1]["value"] + "<|im_end|>"
    # The clip has 23 frames at 10 a second: every third; the folder's 5 count as 2 a second: all.
    bound = inputs.get("frames_upbound")
    expected = {"fps": (8, 5), "num_frames": (inputs.get("num_frames"),) * 2}.get(next(iter(inputs), ""), (16, 16))
    expected = expected if bound is None else (bound, bound)
    if "anyres" not in inputs and "image_aspect" not in inputs:
        assert tuple(indexed.views[3:5]) == expected


def test_the_first_prompt_is_the_one_generate_sees(checkpoints, folder, four, tmp_path):
    from llava_fast.inputs.prepare import prepare

    model = lf.load(checkpoints["qwen"])
    indexed = index_records(as_config(fields("m", four, tmp_path)), model.input_spec)
    content = [{"type": "image", "image": str(folder / name)} for name in ("1.png", "2.png")] + [
        {"type": "text", "text": "What are these?"}
    ]
    asked = prepare(lf.Request([{"role": "user", "content": content}]), lf.InputOptions(), model.input_spec)
    (sample,), views = (example := indexed.load(1)).sequences, example.views
    np.testing.assert_array_equal(sample.token_ids[: len(asked.sample)], asked.sample.token_ids)
    assert torch.equal(views, asked.views)
    assert (sample.labels[: len(asked.sample)] == -100).all() and sample.labels[len(asked.sample)] != -100


def test_bad_media_and_long_records_are_named_or_left_out(checkpoints, folder, tmp_path):
    (folder / "cut.jpg").write_bytes(b"")
    picture(0, (400, 300)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:3000])
    long = record("long", "yes no " * 200)
    data = write(folder, [record("good", "yes", image="0.png"), record("cut", "no", image="cut.jpg"), long])
    with pytest.raises(ValueError, match=r"record 2 \(id 'long'\).*more than the 128"):
        lf.train(fields(checkpoints["qwen"], data, tmp_path / "a"))
    data = write(folder, [record("good", "yes", image="0.png"), record("cut", "no", image="cut.jpg")])
    with pytest.raises(ValueError, match=r"record 1 \(id 'cut'\)"):
        lf.train(fields(checkpoints["qwen"], data, tmp_path / "b"))
    data = write(folder, [record("good", "yes", image="0.png"), record("cut", "no", image="cut.jpg"), long])
    result = lf.train(fields(checkpoints["qwen"], data, tmp_path / "c", on_bad_record="skip", max_steps=3))
    assert result.steps == result.samples == 3
    assert len(result.skipped) == 2 and "'long'" in result.skipped[0] and "'cut'" in result.skipped[1]
    assert (tmp_path / "c" / "skipped.txt").read_text().splitlines() == result.skipped


def test_a_decompression_bomb_is_left_out_like_any_bad_picture(checkpoints, folder, tmp_path):
    """Its size is read when records are indexed, where tiles are cut."""
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")
    data = write(folder, [record("bomb", "no", image="bomb.png"), record("good", "yes", image="0.png")])
    config = as_config(fields("m", data, tmp_path, inputs={"anyres": True}, tokens_per_row=2000))
    spec = lf.load(checkpoints["qwen"]).input_spec
    said = []
    assert len(index_records(config, spec, said.append).records) == 1
    assert len(said) == 1 and "'bomb'" in said[0] and "more than the cap of 89478485 pixels" in said[0]
    with pytest.raises(ValueError, match="'bomb'.*more than the cap"):
        index_records(config, spec)


def test_samples_kept_in_memory_are_those_of_the_files_and_fit_the_budget(checkpoints, four, tmp_path):
    model = lf.load(checkpoints["qwen"])
    indexed = index_records(as_config(fields("m", four, tmp_path)), model.input_spec)
    first = [indexed.load(i) for i in range(4)]
    assert sorted(indexed.kept.examples) == [0, 1, 2, 3]
    assert all(indexed.load(i) is first[i] for i in range(4))
    nothing = index_records(as_config(fields("m", four, tmp_path, cache_mb=0)), model.input_spec)
    for i in range(4):
        np.testing.assert_array_equal(nothing.load(i).sequences[0].token_ids, first[i].sequences[0].token_ids)
    assert not nothing.kept.examples


# --- the reference ---


def hf_step_loss(hf, samples, patches, image_token):
    """Sum of transformers' losses over samples that it runs one at a time, over the number of their labels."""
    total, labels = 0.0, 0
    for sample, views in samples:
        ids, wanted = torch.from_numpy(sample.token_ids.copy()), torch.from_numpy(sample.labels.copy())
        for visual, start in zip(sample.visuals, sample.starts, strict=True):
            ids[start : start + visual.tokens] = image_token
        pixels = None if views is None else normalise(views, (0.5,) * 3, (0.5,) * 3)
        logits = hf(input_ids=ids[None], pixel_values=pixels).logits[0, :-1]
        total = total + F.cross_entropy(logits, wanted[1:], reduction="sum")
        labels += int((wanted[1:] != -100).sum())
    return total / labels


@pytest.mark.parametrize("kind", ["qwen", "qwen_untied"])
def test_ten_steps_equal_transformers_with_torch_adamw(directory, hf, four, tmp_path):
    config = as_config(fields(directory, four, tmp_path / "run", weight_decay=0.1, warmup_ratio=0.2, tokens_per_row=64, rows_per_step=2))
    result = lf.train(config)
    assert result.steps == 10

    model = lf.load(directory, dtype=torch.float32)
    data = index_records(config, model.input_spec)
    names = [(name.removeprefix("model."), parameter) for name, parameter in hf.named_parameters()]
    groups = [
        {"params": [p for n, p in names if (part_of(n) == "vision_tower", decays(n)) == key], "lr": lr, "weight_decay": decay}
        for key, lr, decay in (
            ((True, True), 5e-4, 0.1),
            ((True, False), 5e-4, 0.0),
            ((False, True), 1e-3, 0.1),
            ((False, False), 1e-3, 0.0),
        )
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
    rows = [row for epoch in range(10) for row in plan_epoch(data, config, epoch).rows]
    assert len(plan_epoch(data, config, 0).rows) > 1
    for step in range(10):
        examples = [data.load(i) for row in rows[2 * step : 2 * step + 2] for i in row]
        samples = [(example.sequences[0], example.views) for example in examples]
        loss = hf_step_loss(hf, samples, model.config.patches, model.config.image_token_id)
        assert result.losses[step] == pytest.approx(loss.item(), rel=1e-5), f"step {step}"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# --- learning ---


@pytest.mark.parametrize("kind", ["qwen", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_over_fitting_four_samples_and_answering_them(directory, folder, four, tmp_path, precision):
    result = lf.train(fields(directory, four, tmp_path, max_steps=80, lr=5e-3, lr_vision_tower=1e-3, precision=precision, rows_per_step=2))
    assert result.losses[0] > 2 and result.losses[-1] < 0.05
    model = lf.load(result.output_dir)
    assert model.stored_dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)

    def ask(*names):
        items = [{"type": "image", "image": str(folder / name)} for name in names]
        return [{"role": "user", "content": [*items, {"type": "text", "text": "What are these?" if names else "Which one?"}]}]

    asked = [ask("0.png"), ask("1.png", "2.png"), ask("3.png"), ask()]
    completions = lf.generate(model, asked, max_new_tokens=4)
    assert [completion.text.strip() for completion in completions] == ANSWERS
    assert all(completion.finish_reason == "stop" for completion in completions)
    if precision == "fp32":
        hf = LlavaForConditionalGeneration.from_pretrained(result.output_dir, dtype=torch.float32).eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, hf(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen"])
@pytest.mark.parametrize("template", ["qwen_1_5", "qwen_1_5_eval", "plain", "hf"])
def test_every_chatml_template_trains(directory, folder, tmp_path, template):
    data = write(folder, [record(i, ANSWERS[i], image=f"{i}.png") for i in range(4)])
    result = lf.train(fields(directory, data, tmp_path, template=template, max_steps=12, lr=3e-3))
    assert result.losses[-1] < 0.8 * result.losses[0]


@pytest.mark.parametrize("kind", ["qwen", "llama"])
@pytest.mark.parametrize("trained", ["projector", "decoder", "vision_tower"])
def test_only_the_part_with_a_learning_rate_changes(directory, four, tmp_path, trained):
    rates = {f"lr_{part}": "lr" if part == trained else "frozen" for part in ("vision_tower", "projector", "decoder")}
    lf.train(fields(directory, four, tmp_path, max_steps=3, **rates))
    before, after = tensors(directory), tensors(tmp_path)
    assert before.keys() == after.keys()
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {trained}


def test_yaml_configuration_and_what_a_run_writes(checkpoints, four, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {checkpoints['qwen']}\ndata: {four}\noutput_dir: {tmp_path}/out\n"
        "tokens_per_row: 128\nmax_steps: 4\nlr: 1e-3\nsave_every: 2\nlog_every: 1\n"
    )
    result = lf.train(path)
    said = capsys.readouterr().out
    assert "4 samples" in said and "tokens/s" in said and "labels" in said and "data wait" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == result.losses and len(lines) == 4
    assert sum(line["tokens"] for line in lines) == result.tokens and sum(line["labels"] for line in lines) == result.labels
    assert 0 < result.fill <= 1 and result.tokens_per_second > 0 and result.data_wait <= result.seconds
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-00000002", "checkpoint-00000004"]


def test_the_model_is_not_written_over(checkpoints, four):
    with pytest.raises(ValueError, match="own directory"):
        lf.train(fields(checkpoints["qwen"], four, checkpoints["qwen"]))


# --- resume ---


@pytest.fixture
def half_done(checkpoints, tmp_path):
    """Fields of a run over a folder of its own that was interrupted after four of ten steps, its tower frozen."""
    folder = tmp_path / "here"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    data = write(folder, [record(i, ANSWERS[i], image=f"{i}.png") for i in range(2)])

    def stop(metrics):
        if metrics.step == 4:
            signal.raise_signal(signal.SIGINT)

    settings = fields(checkpoints["qwen"], data, tmp_path / "run", lr_vision_tower="frozen")
    with pytest.raises(KeyboardInterrupt):
        lf.train(settings, on_step=stop)
    return settings


def test_another_base_model_is_refused_on_resume(half_done, tmp_path):
    other = tiny.make_checkpoint(tmp_path / "other", "qwen", seed=1)
    with pytest.raises(ValueError, match="base model: .*restore them or choose another output_dir"):
        lf.train({**half_done, "model": str(other)})
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("change", [{"answer": "no"}, {"image": "2.png"}])
def test_other_records_of_the_same_sizes_are_refused_on_resume(half_done, change):
    folder = Path(half_done["data"]).parent
    write(folder, [record(0, **{"answer": "yes", "image": "0.png", **change}), record(1, "no", image="1.png")])
    with pytest.raises(ValueError, match="data set: '2 samples, contents"):
        lf.train(half_done)


@pytest.mark.parametrize("absolute", [False, True])
def test_moved_files_are_the_same_data_and_model(half_done, tmp_path, absolute):
    folder = (tmp_path / "here").rename(tmp_path / "there")
    if absolute:
        write(folder, [record(i, ANSWERS[i], image=str(folder / f"{i}.png")) for i in range(2)])
    model = shutil.copytree(half_done["model"], tmp_path / "model")
    result = lf.train({**half_done, "model": str(model), "data": str(folder / "data.json")})
    assert result.steps == 10 and result.samples == 12


def test_unreadable_media_alone_are_no_run(checkpoints, tmp_path):
    (tmp_path / "0.png").write_bytes(b"nothing")
    data = write(tmp_path, [record(0, "yes", image="0.png")])
    for steps in ({"max_steps": 3}, {"max_steps": None, "epochs": 1}):
        with pytest.raises(ValueError, match="a whole epoch gave nothing to learn"):
            lf.train(fields(checkpoints["qwen"], data, tmp_path / "run", on_bad_record="skip", **steps))
        assert not (tmp_path / "run" / "model.safetensors").exists()


def test_rows_of_the_demo_budget_hold_several_samples(checkpoints, four, tmp_path):
    model = lf.load(checkpoints["qwen"])
    config = as_config(fields("m", four, tmp_path))
    step = next(make_steps(index_records(config, model.input_spec), config, Position()))
    assert step.rows[0].batch.num_sequences == 4 and step.rows[0].batch.num_tokens <= 128
