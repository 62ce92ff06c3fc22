"""The parts of a first answer on the 0.5b architecture, against transformers in fp32: the tower, a prefill, a token.

The limit of the tower and of the prefill is the rate of fp32 multiply-adds; that of a token is the bandwidth at which memory is read:
every weight of the decoder and the head once, and the keys and values of the context. Results are compared before anything is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from llava_fast import load
from llava_fast.engine.runner import Runner
from llava_fast.engine.stats import weight_bytes
from llava_fast.kernels import registry
from llava_fast.models.decoder import KVCache
from llava_fast.models.llava import Llava

CONTEXT = 1500


@pytest.fixture(scope="module")
def theirs(full_size: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(full_size, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def quantised(request: pytest.FixtureRequest, full_size: Path) -> tuple[str, Llava]:
    return request.param, load(full_size, device="cpu", **({} if request.param == "bf16" else {"quantise": request.param}))


@pytest.fixture(scope="module")
def ours(full_size: Path) -> Llava:
    return load(full_size, device="cpu")


def embeds(rows: int) -> Tensor:
    return torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def decoder_operations(model: Llava, rows: int) -> float:
    """Multiply-adds count two: the layers' products for all rows, those of the last layer but k and v and the head for one row, and causal
    attention."""
    c = model.config.decoder
    qkv, rest = (c.heads + 2 * c.kv_heads) * c.head_dim * c.width, c.heads * c.head_dim * c.width + 3 * c.mlp_width * c.width
    last = 2 * c.kv_heads * c.head_dim * c.width
    products = (c.layers - 1) * (qkv + rest) * rows + last * rows + c.vocab_size * c.width
    return 2.0 * products + 2.0 * (c.layers - 1) * c.heads * c.head_dim * rows * rows


def tower_operations(model: Llava, views: int) -> float:
    v = model.config.vision
    patches = v.grid**2
    layer = 4 * v.width**2 + 2 * v.width * v.mlp_width
    products = patches * (model.config.executed_layers * layer + 3 * v.patch_size**2 * v.width)
    return views * (2.0 * products + 4.0 * model.config.executed_layers * patches**2 * v.width)


@pytest.mark.parametrize("views", [1, 4])
@torch.inference_mode()
def test_vision_tower(views: int, ours: Llava, theirs: Any, paired: Any, limits: Any) -> None:
    pixels = torch.rand(views, 3, 384, 384, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tower = theirs.model.vision_tower

    def reference() -> Tensor:
        return tower(pixels, output_hidden_states=True).hidden_states[-1]

    assert relative_error(ours.features(pixels), reference()) < 1e-4
    paired(lambda: ours.features(pixels), reference, operations=tower_operations(ours, views), limit=limits("cpu").fma_fp32_gflops * 1e9)


@torch.inference_mode()
def test_prefill(ours: Llava, theirs: Any, paired: Any, limits: Any) -> None:
    x = embeds(CONTEXT)
    positions, bounds, last = torch.arange(CONTEXT), torch.tensor([0, CONTEXT], dtype=torch.int32), torch.tensor([CONTEXT - 1])
    runner = new_runner(ours, torch.float32)
    cache = KVCache(runner.k, runner.v, torch.arange(BLOCKS, dtype=torch.int32)[None], positions, bounds[1:])

    def prefill() -> Tensor:
        return ours.logits(ours.language_model(x, positions, bounds, needed_R=last, cache=cache))

    def reference() -> Tensor:
        return theirs(inputs_embeds=x[None], use_cache=True, logits_to_keep=1).logits[0]

    assert relative_error(prefill(), reference()) < 1e-4
    paired(prefill, reference, operations=decoder_operations(ours, CONTEXT), limit=limits("cpu").fma_fp32_gflops * 1e9)


PAGE, BLOCKS = 64, CONTEXT // 64 + 1


def new_runner(model: Llava, dtype: torch.dtype) -> Runner:
    """With a cache that holds something."""
    runner = Runner(model, BLOCKS, PAGE, dtype, 1)
    generator = torch.Generator().manual_seed(2)
    for buffer in (runner.k, runner.v):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return runner


@torch.inference_mode()
def test_decode(quantised: tuple[str, Llava], theirs: Any, paired: Any, limits: Any) -> None:
    """One token at a context of 1,500. bf16: bf16 weights, fp32 keys and values, the fp32 answer; int8 and int4: bf16 keys and values."""
    weights, model = quantised
    runner = new_runner(model, torch.float32 if weights == "bf16" else torch.bfloat16)
    past = DynamicCache()
    for layer in range(model.config.decoder.layers):
        k, v = (buffer[layer].flatten(0, 1)[:CONTEXT].float().transpose(0, 1)[None].contiguous() for buffer in (runner.k, runner.v))
        past.update(k, v, layer)
    token, position, table = torch.tensor([7]), torch.tensor([CONTEXT]), torch.arange(BLOCKS)[None]
    recorded = runner.new_step(1)

    def step() -> Tensor:
        return recorded(token, position, table)

    def reference() -> Tensor:
        logits = theirs(input_ids=token[None], past_key_values=past, position_ids=position[None], use_cache=True).logits[0]
        past.crop(-1)
        return logits

    # bf16 weights give transformers' fp32 answer; narrower ones that of the same numbers widened by torch.
    if weights == "bf16":
        expected = reference()
    else:
        with registry.use(linear="reference"):
            expected = runner.new_step(1)(token, position, table)
    assert relative_error(step(), expected) < 1e-4
    kv_bytes = 2 * CONTEXT * runner.k[:, 0, 0].nbytes
    paired(step, reference, bytes_read=weight_bytes(model) + kv_bytes)
