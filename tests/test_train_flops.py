"""The count of operations against torch's flop counter on the reference path, and the sizes it is made from against masks written out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import llava_fast as lf
from llava_fast.batch import IGNORE, Features, Resample, Sample, Visual, pack
from llava_fast.inputs.layouts import view_layout
from llava_fast.kernels import registry
from llava_fast.training.config import PARTS
from llava_fast.training.flops import flops, row_flops, work_of, work_of_sizes
from llava_fast.training.step import part_of

REFERENCE = dict.fromkeys(("linear", "linear_cross_entropy", "varlen_attention", "projector", "spatial_pool"), "reference")


def sample(length, labels, pictures=0, patches=9, seed=0):
    """Pictures first, the last `labels` tokens supervised."""
    ids = np.random.default_rng(seed).integers(10, 300, length)
    ids[: pictures * patches] = 0
    visuals = tuple(Visual(1, patches, np.arange(patches)) for _ in range(pictures))
    wanted = np.where(np.arange(length) >= length - labels, ids, IGNORE)
    return Sample(ids, visuals, tuple(patches * i for i in range(pictures)), wanted)


def batch(samples, prefix_of=None, size=42):
    """Random pictures, the same ones of a sample in any batch."""
    seeds = [(s.views, torch.Generator().manual_seed(int(s.token_ids.sum()))) for s in samples if s.views]
    views = [torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=seed) for n, seed in seeds]
    return pack(samples, torch.cat(views) if views else None, prefix_of)


@pytest.fixture(scope="module", params=["qwen", "llama"])
def model(request, checkpoints):
    return lf.load(checkpoints[request.param], device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    "trained",
    [PARTS, ("projector", "decoder"), ("projector",), ("decoder",), ("vision_tower",)],
    ids=lambda parts: "+".join(parts),
)
@pytest.mark.parametrize("pictures", [True, False])
def test_equal_to_the_flop_counter(model, trained, pictures):
    row = batch([sample(40, 7, 2 * pictures), sample(25, 3, pictures), sample(11, 11)])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
    # torch's products of a causal attention are those of the whole square.
    lengths, place = row.cu_seqlens.diff().tolist(), torch.bucketize(row.needed_rows, row.cu_seqlens[1:].long(), right=True)
    square = dataclasses.replace(
        work_of(row, model.config.patches),
        seen=sum(n * n for n in lengths),
        needed_seen=sum(lengths[s] for s in place.tolist()),
    )
    with registry.use(**REFERENCE), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model.loss(row)
        if loss.requires_grad:
            loss.backward()
    model.zero_grad(set_to_none=True)
    vision = model.config.vision
    k = 3 * vision.patch_size**2
    padding = 2 * square.views * vision.grid**2 * vision.width * (-k % 8) * (1 + (pictures and "vision_tower" in trained))
    assert counter.get_total_flops() - padding == flops(model.config, square, trained)


@pytest.mark.parametrize("missing", [[], [0, 2]])
def test_the_tower_counts_for_what_it_is_given_and_the_projector_for_all(model, missing):
    """Of three views whose features are known, all or one: torch counts the same."""
    row = batch([sample(40, 7, 2), sample(25, 3, 1)])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) != "vision_tower")
    known = Features(model.features(row.views), torch.tensor(missing, dtype=torch.int64), tuple("ab"[: len(missing)]))
    row = dataclasses.replace(row, views=row.views[missing] if missing else None, features=known)
    work, lengths = work_of(row, model.config.patches), row.cu_seqlens.diff().tolist()
    assert (work.views, work.shown, row.num_views) == (len(missing), 3, 3)
    place = torch.bucketize(row.needed_rows, row.cu_seqlens[1:].long(), right=True)
    square = dataclasses.replace(work, seen=sum(n * n for n in lengths), needed_seen=sum(lengths[s] for s in place.tolist()))
    with registry.use(**REFERENCE), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(row).backward()
    model.zero_grad(set_to_none=True)
    vision = model.config.vision
    padding = 2 * len(missing) * vision.grid**2 * vision.width * (-3 * vision.patch_size**2 % 8)
    assert counter.get_total_flops() - padding == flops(model.config, square, ("projector", "decoder"))
    twice = dataclasses.replace(row, features=dataclasses.replace(known, keys=("a",) * len(missing)))
    assert work_of(twice, model.config.patches).views == min(len(missing), 1)


def test_adapters_cost_no_weight_gradients(model):
    row = [400, 100]
    whole, adapted = row_flops(model.config, row, 2), row_flops(model.config, row, 2, trained=(), adapted=PARTS)
    assert row_flops(model.config, row, 2, trained=()) < adapted < whole
    products = row_flops(model.config, row, labels=50, trained=()) - 4 * _attention(model, row, 50)
    assert row_flops(model.config, row, labels=50, trained=(), adapted=("decoder",)) == 2 * products + 12 * _attention(model, row, 50)


def _attention(model, lengths, labels):
    work, c = work_of_sizes(model.config.patches, lengths, labels=labels), model.config.decoder
    return c.heads * c.head_dim * ((c.layers - 1) * work.seen + work.needed_seen)


def test_sizes_of_a_row_with_a_prefix_are_those_of_its_mask():
    row = batch([sample(30, 0, 1), sample(8, 8, seed=1), sample(5, 5, seed=2), sample(17, 4)], prefix_of=[None, 0, 0, None])
    bounds = row.cu_seqlens.tolist()
    mask = torch.zeros(60, 60, dtype=torch.bool)
    for (start, end), (first, last) in zip(zip(bounds, bounds[1:], strict=False), row.prefix.tolist(), strict=True):
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        mask[start:end, first:last] = True
    work = work_of(row, 9)
    assert (work.tokens, work.views, work.projected) == (60, 1, 9)
    assert work.seen == mask.sum() and work.needed_seen == mask[row.needed_rows].sum()
    assert (work.needed, work.labels) == (row.needed_rows.shape[0], 8 + 5 + 4)
    assert work.needed == work.labels - 1  # the prompt's last row predicts the first token of both
    planned = work_of_sizes(9, [30, 8, 5, 17], views=1, labels=17, prefixes=[0, 30, 30, 0])
    assert planned == dataclasses.replace(work, needed=17, needed_seen=planned.needed_seen)


def test_pooled_rows_alone_meet_the_second_product():
    pooled = Visual(2, 9, np.arange(2 * 4) + 2 * 9, (Resample("average", np.arange(18).reshape(2, 3, 3), (2, 2)),))
    for mode, expected in (("average", 8), ("bilinear", 8), ("max", 18)):
        visual = dataclasses.replace(pooled, resamples=(dataclasses.replace(pooled.resamples[0], mode=mode),))
        ids = np.arange(20)
        work = work_of(batch([Sample(ids, (visual,), (0,), ids)]), 9)
        assert work.projected == expected, mode


def test_sizes_alone_balance_rows(model):
    """Labels that are not known are guessed; a longer sequence costs more than two of its halves, and a view more than its tokens."""
    assert row_flops(model.config, [1000]) > row_flops(model.config, [500, 500]) > row_flops(model.config, [500, 400])
    assert row_flops(model.config, [1000], 3) > row_flops(model.config, [1000], 2)
    assert row_flops(model.config, np.array([1000]), labels=37) == row_flops(model.config, [1000])
    with pytest.raises(ValueError, match="parts are vision_tower, projector, decoder, got 'tower'"):
        row_flops(model.config, [10], trained=("tower",))


def test_the_05b_model_by_hand():
    """Per token of a long row: 24 layers of 12.8 M weights, six operations each; the head on the labels alone."""
    from bench.full_size import config_05b
    from llava_fast.config import from_hf

    config = from_hf(config_05b(151_000))
    layer = 4 * 1024 * 1024 + 3 * 1024 * 2816
    short = row_flops(config, [1] * 1000, labels=1000)
    assert short == 6.0 * 1000 * (24 * layer + 1024 * 152_000) + 12 * 1024 * 24 * 1000
    last = row_flops(config, [1] * 1000, labels=0)
    assert last == 6.0 * 1000 * (23 * layer + 2 * 1024 * 1024) + 12 * 1024 * 23 * 1000
    assert view_layout(27).tokens == config.patches == 729


def test_a_reference_is_a_forward_pass_more(model):
    """Of DPO under LoRA: the tower's features are shared where it does not learn."""
    row = batch([sample(30, 0, 1), sample(8, 8, seed=1), sample(5, 5, seed=2)], prefix_of=[None, 0, 0])
    work = work_of(row, model.config.patches)
    no_tower = flops(model.config, dataclasses.replace(work, views=0), trained=())
    for adapted, more in ((("decoder",), no_tower), (PARTS, flops(model.config, work, trained=()))):
        step = row_flops(model.config, row, trained=(), adapted=adapted)
        assert row_flops(model.config, row, trained=(), adapted=adapted, reference=True) == step + more
    assert 0 < no_tower < flops(model.config, work, trained=())
