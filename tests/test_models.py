"""The packed model against transformers: logits, loss, gradients, optimiser steps; isolation; what is saved changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from padded import pad, pixels, rows_of
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.batch import IGNORE, Sample, Visual, pack, splice
from llava_fast.config import from_hf
from llava_fast.inputs.layouts import frames_layout
from llava_fast.kernels import linear as linear_op

MIXED = [[3, "image", 5, "image", 4], [7, "image"], ["image", 6], [11]]
FLOOR = 1e-7  # absolute: the key biases' gradient is zero by mathematics


def assert_close(ours, theirs, relative: float = 1e-5, name: str = "") -> None:
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= relative * scale + FLOOR, f"{name}: off by {error:.3g} where the largest entry is {scale:.3g}"


def hf_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def batch_of(model, shapes, side="right", seed=0):
    rows, count = rows_of(shapes, model.config.patches, model.config.image_token_id, seed)
    ids, mask = pad(rows, side)
    labels = ids.masked_fill((mask == 0) | (ids == model.config.image_token_id), IGNORE)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=pixels(count, seed=seed), labels=labels)


def samples_of(model, shapes, seed=0) -> tuple[list[Sample], torch.Tensor | None]:
    """The same sequences as `batch_of`, as packed samples."""
    rows, count = rows_of(shapes, 1, model.config.image_token_id, seed)
    P = model.config.patches
    visual = Visual(1, P, np.arange(P))
    samples = []
    for row in rows:
        ids = np.array(row)
        labels = np.where(ids == model.config.image_token_id, IGNORE, ids)
        samples.append(splice(ids, [visual] * int((ids == model.config.image_token_id).sum()), model.config.image_token_id, labels))
    return samples, pixels(count, seed=seed)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_loss(directory, hf, side):
    model = lf.load(directory, dtype=torch.float32)
    inputs = batch_of(model, MIXED, side)
    with torch.no_grad():
        theirs, ours = hf(**inputs), model(**inputs)
    kept = inputs["attention_mask"].bool()
    assert_close(ours.logits[kept], theirs.logits[kept])
    assert ours.logits.shape == theirs.logits.shape and ours.logits[~kept].abs().max() == 0
    if side == "right":  # on the left, transformers lets the last pad row predict the first token
        assert_close(ours.loss, theirs.loss)


def test_every_gradient(directory, hf):
    model = lf.load(directory, dtype=torch.float32)
    inputs = batch_of(model, MIXED)
    hf(**inputs).loss.backward()
    samples, views = samples_of(model, MIXED)
    batch = pack(samples, views)
    loss = model.loss(batch, reduction="mean")
    loss.backward()
    theirs = dict(hf.named_parameters())
    seen = set()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, theirs[hf_name(name)].grad, name=name)
        seen.add(hf_name(name))
    trained = {name for name, parameter in theirs.items() if parameter.grad is not None and parameter.grad.abs().max() > 0}
    assert trained <= seen


def test_ten_adamw_steps(directory, hf):
    model = lf.load(directory, dtype=torch.float32)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    theirs = torch.optim.AdamW([p for n, p in hf.named_parameters()], lr=1e-4, weight_decay=0.01)
    for step in range(10):
        inputs = batch_of(model, MIXED, seed=step)
        samples, views = samples_of(model, MIXED, seed=step)
        a, b = model.loss(pack(samples, views), reduction="mean"), hf(**inputs).loss
        for optimiser, loss in ((ours, a), (theirs, b)):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert abs(a.item() - b.item()) <= 1e-5 * abs(b.item()), f"step {step}: {a.item()} against {b.item()}"


@pytest.mark.parametrize("layers", [-1, [-1], [-1, -2], [1, 3]])
@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_vision_feature_layers(tmp_path, kind, layers):
    path = tiny.make_checkpoint(tmp_path / "model", kind, vision_feature_layer=layers)
    model = lf.load(path)
    hf = LlavaForConditionalGeneration.from_pretrained(path).eval()
    count = 1 if isinstance(layers, int) else len(layers)
    assert model.multi_modal_projector.linear_1.in_features == model.config.vision.width * count
    assert len(model.vision_tower.encoder.layers) == max(model.config.selected)
    inputs = batch_of(model, [[3, "image", 5]])
    with torch.no_grad():
        assert_close(model(**inputs).logits, hf(**inputs).logits)


@pytest.mark.parametrize("layers", [0, -4, 4, [], [-1, 7]])
def test_feature_layer_out_of_range(tmp_path, layers):
    config = tiny.LlavaConfig(
        vision_config=tiny.vision_config("qwen"), text_config=tiny.text_config("qwen", 384), vision_feature_layer=layers
    )
    with pytest.raises(ValueError, match="vision_feature_layer"):
        from_hf(config)


def test_class_row_kept(tmp_path):
    path = tiny.make_checkpoint(tmp_path / "model", "llama", vision_feature_select_strategy="full")
    model, hf = lf.load(path), LlavaForConditionalGeneration.from_pretrained(path).eval()
    assert model.config.patches == 10
    inputs = batch_of(model, [[3, "image", 5]])
    with torch.no_grad():
        assert_close(model(**inputs).logits, hf(**inputs).logits)


@pytest.mark.parametrize("tokens, pictures", [(1, 2), (2, 1), (1, 0), (0, 1)])
def test_mismatching_num_image_tokens(checkpoints, tokens, pictures):
    model = lf.load(checkpoints["qwen"])
    P = model.config.patches
    ids = torch.tensor([[5, 6] + [model.config.image_token_id] * (tokens * P) + [7]])
    with pytest.raises(ValueError, match=f"tokens: {tokens * P}, features: {pictures * P}"):
        model(input_ids=ids, pixel_values=pixels(pictures))


@pytest.mark.parametrize("marks, pictures", [(1, 0), (0, 1), (2, 3)])
def test_splice_refuses_other_counts(marks, pictures):
    with pytest.raises(ValueError, match=f"{marks} <image>/<video> marks but {pictures}"):
        splice([5] + [3] * marks, [Visual(1, 4, np.arange(4))] * pictures, image_token_id=3)


def test_inputs_embeds_match_input_ids(directory, hf):
    model = lf.load(directory, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    embeds = model.language_model.embed_tokens(ids)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(inputs_embeds=embeds).logits)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=8), model.generate(input_ids=ids, max_new_tokens=8)[:, 5:])
    theirs = hf.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=8), theirs)


def test_packed_sequences_do_not_see_each_other(directory):
    """Other content in one sequence, not another length: the rest stays bit-equal, forward and backward."""
    model = lf.load(directory, dtype=torch.float32)
    samples, views = samples_of(model, MIXED)
    changed = [dataclasses.replace(samples[0], token_ids=np.where(samples[0].token_ids > 0, 11, 0)), *samples[1:]]
    changed_views = views.clone()
    changed_views[:2] += 1.0

    results = []
    for packed, pictures in ((samples, views), (changed, changed_views)):
        batch = pack(packed, pictures)
        embeds = model.embed(batch).detach().requires_grad_()
        hidden = model.hidden(batch, embeds=embeds)
        losses = torch.nn.functional.cross_entropy(model.logits(hidden[batch.label_index]), batch.labels, reduction="none")
        others = batch.label_seq > 0
        losses[others].sum().backward()
        first = len(packed[0])
        assert embeds.grad[:first].abs().max() == 0
        results.append((losses[others].detach(), embeds.grad[first:], model.label_losses(batch)[others].detach()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_packed_equals_alone(directory):
    model = lf.load(directory, dtype=torch.float32)
    samples, views = samples_of(model, MIXED)
    together = pack(samples, views)
    taken = 0
    with torch.no_grad():
        losses = model.label_losses(together)
        for s, sample in enumerate(samples):
            own = views[taken : taken + sample.views] if sample.views else None
            taken += sample.views
            assert_close(losses[together.label_seq == s], model.label_losses(pack([sample], own)), 1e-6)


def test_needed_rows_change_nothing(directory):
    """The last layer over needed rows, and the head over label rows, against computing everything."""
    model = lf.load(directory, dtype=torch.float32)
    samples, views = samples_of(model, MIXED)
    labelled, everything, last = (pack(samples, views, needed=needed) for needed in ("labels", "all", "last"))
    assert labelled.needed_rows.shape[0] < everything.needed_rows.shape[0]
    with torch.no_grad():
        full = model.hidden(everything)
        assert_close(model.hidden(labelled), full[labelled.needed_rows], 1e-6)
        assert_close(model.hidden(last), full[everything.cu_seqlens[1:].long() - 1], 1e-6)
        dense = F.cross_entropy(model.logits(full)[everything.label_rows], everything.labels, reduction="none")
        assert_close(model.label_losses(labelled), dense, 1e-6)


def test_shared_prefix(directory):
    """Two continuations of one visual prompt: the prompt is in the row once, the losses and gradients are those of two copies."""
    model = lf.load(directory, dtype=torch.float64)
    (prompt,), views = samples_of(model, [[4, "image", 3]])
    prompt = dataclasses.replace(prompt, labels=None)
    views = views.double()
    answers = [np.array([21, 22, 23, 24]), np.array([31, 32])]
    shared = pack([prompt, *(Sample(a, labels=a) for a in answers)], views, prefix_of=[None, 0, 0])
    copies = pack(
        [
            Sample(
                np.concatenate([prompt.token_ids, a]),
                prompt.visuals,
                prompt.starts,
                np.concatenate([np.full(len(prompt), IGNORE), a]),
            )
            for a in answers
        ],
        torch.cat([views, views]),
    )
    assert shared.num_tokens == len(prompt) + 6 and copies.num_tokens == 2 * len(prompt) + 6
    gradients = []
    for batch in (shared, copies):
        model.zero_grad()
        losses = model.label_losses(batch)
        losses.sum().backward()
        gradients.append((losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (a, grads_a), (b, grads_b) = gradients
    assert (a - b).abs().max() < 1e-6
    for name in grads_a:
        assert_close(grads_a[name], grads_b[name], 1e-6, name)


@pytest.mark.parametrize("mode", ["average", "bilinear", "max"])
def test_pooling_inside_the_projector(checkpoints, mode):
    """Pool before linear_2 where that is equal, after it for max: against pooling the projected maps."""
    path = checkpoints["qwen"]
    model = lf.load(path, dtype=torch.float64)
    grid, P = model.config.vision.grid, model.config.patches
    size = (grid // 2, grid // 2) if mode != "bilinear" else ((grid + 1) // 2, (grid + 1) // 2)
    frames = 3
    visual = frames_layout(frames, grid, mode)
    (pooled,) = visual.resamples
    sample = splice([5, 3, 6, 7, 3], [visual, Visual(1, P, np.arange(P))], image_token_id=3)
    views = pixels(4).double()
    batch = pack([sample], views, needed="all")
    with torch.no_grad():
        rows = model.multi_modal_projector(model.features(views), batch.layout)
        projected = model.multi_modal_projector(model.features(views)).view(4, grid, grid, -1)
        maps = projected[:3].permute(0, 3, 1, 2)
        expected = {
            "average": lambda: F.avg_pool2d(maps, 2),
            "max": lambda: F.max_pool2d(maps, 2),
            "bilinear": lambda: F.interpolate(maps, size=size, mode="bilinear", align_corners=False),
        }[mode]()
        expected = torch.cat([expected.permute(0, 2, 3, 1).reshape(pooled.tokens, -1), projected[3].reshape(P, -1)])
        embeds = model.embed(batch)
    assert (rows - expected).abs().max() < 1e-12
    assert (embeds[batch.layout.rows] - expected).abs().max() < 1e-12
    assert torch.equal(embeds[batch.layout.text_rows], model.language_model.embed_tokens.weight[[5, 6, 7]].double())


def test_bf16_weights_are_widened(checkpoints, tmp_path):
    """bf16 in memory, fp32 in arithmetic: the logits of transformers with dtype=float32, to rounding in the order of sums."""
    path = tiny.make_checkpoint(tmp_path / "model", "qwen_untied", dtype=torch.bfloat16)
    model = lf.load(path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.compute_dtype == torch.float32
    hf = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    inputs = batch_of(model, MIXED)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_close(model(**inputs).logits[kept], hf(**inputs).logits[kept])


@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_widening_by_blocks(monkeypatch, rows):
    """Weights of a narrower dtype in several blocks, few rows and many: the product with the weight widened whole."""
    for name in ("BLOCK_BYTES", "BLOCK_BYTES_FEW_ROWS"):
        monkeypatch.setattr(linear_op, name, 7 * 33 * 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, 33, generator=generator)[:1]
    weight, bias = torch.randn(50, 33, generator=generator).bfloat16(), torch.randn(50, generator=generator).bfloat16()
    with torch.no_grad():
        for b in (None, bias):
            expected = F.linear(x, weight.float(), None if b is None else b.float())
            assert_close(linear_op.linear(x, weight, b), expected, 1e-6)
    grown = x.clone().requires_grad_()
    linear_op.linear(grown, weight, bias).sum().backward()
    assert_close(grown.grad, weight.float().sum(0).expand_as(grown), 1e-6)


def test_views_of_another_size_are_refused(checkpoints):
    model = lf.load(checkpoints["qwen"])
    with pytest.raises(ValueError, match=r"views must be \[N, 3, 42, 42\], got \[1, 3, 28, 28\]"):
        model.features(torch.zeros(1, 3, 28, 28))
