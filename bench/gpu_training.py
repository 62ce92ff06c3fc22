"""A training step of the 0.5b architecture on a GPU: one row of 16,000 tokens in bf16, ours and the best loop by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.baselines import training as baselines
from bench.full_size import TEXTS, config_05b, save_processor
from bench.training_steps import CONFIG, Shape, samples, shapes
from llava_fast.demo.tokenizer import train_tokenizer
from llava_fast.limits import seconds

SMALL: list[Shape] = [(1, 40, 16), (0, 60, 24)]
ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2"}


def save_random(folder: str, device: str, small: bool) -> int:
    """Writes transformers' model, and returns its placeholder. Its matrices of N(0, 1 / inputs) are made where it is used: the CPU would
    take half a minute."""
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    tokenizer = train_tokenizer(TEXTS)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = config_05b(image_token, *(2, 2) if small else ())
    if small:
        config.text_config.vocab_size = 2000
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model = model.to(torch.float32 if small else torch.bfloat16).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    save_processor(folder, tokenizer)
    return image_token


def measure_training(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """A row a side: milliseconds and tokens a second of a step, its first loss, peak bytes; `of_limit` of ours is MFU. small: of a few
    tokens in two layers, in fp32. Raises AssertionError where a side's loss is another than ours."""
    from transformers import LlavaForConditionalGeneration

    dtype = torch.float32 if small else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        rows, pixels = samples(SMALL if small else shapes("16000"), save_random(folder, device, small), 2000 if small else 100_000)
        tokens = sum(len(ids) for ids, _ in rows)
        step, operations = _ours(folder, device, dtype, rows, pixels)
        expected, row = _timed("training step, llava_fast", step, tokens, device, small)
        yield row | {"gflops": operations / row["ms"] / 1e6}
        del step
        inputs = baselines.padding_free_batch(rows, None if pixels is None else pixels.to(dtype))
        for name, attention in ATTENTION.items():
            title = f"training step, transformers padding-free, {name}"
            if device == "cuda":
                torch.cuda.empty_cache()
            try:
                model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device).train()
            except (ImportError, ValueError) as error:
                yield {"name": title, "absent": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                continue
            loss, row = _timed(title, _theirs(model, inputs, device), tokens, device, small)
            assert abs(loss - expected) <= (1e-4 if small else 2e-2) * abs(expected), f"{title}: loss {loss}, ours {expected}"
            yield row
            del model


def _timed(name: str, step: Callable[[], Tensor], tokens: int, device: str, small: bool) -> tuple[float, dict[str, Any]]:
    first = float(step())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    time = min(seconds(step, device) for _ in range(1 if small else 4))
    row = {"name": name, "ms": time * 1e3, "tokens": tokens, "tokens_per_s": tokens / time, "loss": first}
    return first, row | ({"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {})


def _ours(folder: str, device: str, dtype: torch.dtype, rows: Any, pixels: Tensor | None) -> tuple[Callable[[], Tensor], float]:
    from llava_fast import checkpoint as files
    from llava_fast.batch import Sample
    from llava_fast.engine.dropin import pack_marked
    from llava_fast.models.llava import Llava
    from llava_fast.training.batches import Row
    from llava_fast.training.config import TrainConfig
    from llava_fast.training.flops import row_flops
    from llava_fast.training.step import LabelLoss, make_optimizer, prepare_parameters, train_step

    model = files.load(Llava, folder, device=device, dtype=dtype)
    config = TrainConfig("m", "a.json", "out", **CONFIG)
    trained = prepare_parameters(model, config, "fp32" if dtype == torch.float32 else "bf16")
    optimizer = make_optimizer(trained.masters, config)
    batch = pack_marked(model, [Sample(ids.numpy(), labels=labels.numpy()) for ids, labels in rows], pixels, "labels")
    operations = row_flops(model.config, batch.to("cpu"), trained=("projector", "decoder"))
    row = Row(batch, tuple(range(len(rows))), tuple(range(len(rows) + 1)))
    return lambda: train_step(model, trained, optimizer, [row], 1.0, config.clip, device, LabelLoss())[0], operations


def _theirs(model: Any, inputs: dict[str, Any], device: str) -> Callable[[], Tensor]:
    model.model.vision_tower.requires_grad_(False)
    moved = {key: value.to(device) for key, value in inputs.items() if isinstance(value, Tensor)}
    moved["model"] = {key: value if value is None else value.to(device) for key, value in inputs["model"].items()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=CONFIG["lr"], weight_decay=0.0, fused=True)

    def step() -> Tensor:
        loss = baselines.padding_free_loss(model, moved)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, CONFIG["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
