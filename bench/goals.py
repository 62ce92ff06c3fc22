"""What the figures are held against: the project's goals, met or not. docs/performance.md prints them.

A goal's measured value is the worst over the measurements that it names: a bound that one shape breaks is not met.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """what: a line.  bound: the least (or, at_most, the greatest) value that meets it.
    result, measurements: the result file's name and a pattern of its measurements' names (fnmatch, [ and ] as they are).
    key: what is read of each, a pattern too; inverse: 1 over it (a memory ratio 'baseline over ours' as 'ours over baseline').
    unit: 'x', '%', or a rate of UNITS, in which the bound is.
    """

    what: str
    bound: float
    result: str
    measurements: str
    key: str = "ratio"
    unit: str = "x"
    at_most: bool = False
    inverse: bool = False

    def values(self, known: Mapping[str, Mapping[str, Any]]) -> list[float]:
        """Of every file whose name matches `result` (a pattern too)."""
        found = [m for name, result in known.items() if fnmatchcase(name, self.result) for m in result["measurements"]]
        pattern = self.measurements.replace("[", "[[]")
        values = [m[key] for m in found if fnmatchcase(m["name"], pattern) for key in m if fnmatchcase(key, self.key)]
        return [1 / value for value in values] if self.inverse else [value * UNITS.get(self.unit, 1.0) for value in values]

    def value(self, known: Mapping[str, Mapping[str, Any]]) -> float | None:
        values = self.values(known)
        return (max if self.at_most else min)(values) if values else None

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def shown(self, value: float) -> str:
        if self.unit == "%":
            return f"{value:.0%}"
        if self.unit in UNITS:
            return f"{value:,.0f} {self.unit}"
        return f"{value:,.0f}x" if abs(value) >= 20 else f"{value:.3g}x"


STEP, MEMORY = "ratio_step_s", "ratio_anon_bytes"
CPU: dict[str, tuple[Goal, ...]] = {
    "One request": (
        Goal("two photographs, to the first token, against transformers", 1.25, "first_token", "first_token_05b*", "ratio_first_token_s"),
        Goal("decode at 1,500 tokens, bf16 weights, results equal to fp32, against transformers", 3, "model", "test_decode[bf16]"),
        Goal("the same, share of read bandwidth", 0.75, "model", "test_decode[bf16]", "of_limit", "%"),
        Goal("decode with int8 weights and a bf16 cache, against transformers", 5.5, "model", "test_decode[int8]"),
        Goal("the same, share of read bandwidth", 0.75, "model", "test_decode[int8]", "of_limit", "%"),
        Goal("vision tower, against transformers", 1.3, "model", "test_vision_tower[*]"),
        Goal("prompt of 1,500 tokens, against transformers", 1.12, "model", "test_prefill"),
    ),
    "Ops": (
        Goal("products of many rows, fp32, share of the FMA limit", 0.85, "linear", "test_many_rows[*float32]", "of_limit", "%"),
        Goal("spatial pooling, share of copy bandwidth", 0.8, "spatial_pool", "test_spatial_pool[*", "of_limit", "%"),
        Goal("norms and activations, share of copy bandwidth", 0.8, "rowwise*", "test_*ward[*", "of_limit", "%"),
        Goal("attention of packs of 8, forward, against padded SDPA", 4, "varlen_attention", "test_pack_forward[*"),
        Goal("the same with its gradient", 4, "varlen_attention", "test_pack_forward_and_backward[*"),
        Goal("loss at 4 % labels of 8,192 rows, against all rows", 18, "linear_cross_entropy", "test_linear_cross_entropy_at_4*"),
        Goal("its memory, of theirs", 0.1, "linear_cross_entropy", "linear_cross_entropy_memory", "ratio_mb", "%", True, True),
    ),
    "Many requests": (
        Goal("a second question on four photographs, as people use transformers", 150, "reuse_long", "second_*_as_used", "ratio_s"),
        Goal("the same, against features and a cache kept by hand", 1.5, "reuse_long", "second_*_by_hand", "ratio_s"),
        Goal("32 requests shaped like M4, against padded batches", 2, "engine_long", "many_requests_m4", "ratio_requests_per_s"),
        Goal("their peak memory, of theirs", 0.5, "engine_long", "many_requests_m4", MEMORY, "%", True, True),
        Goal("8 requests of 256 new tokens, decode step", 3, "engine_long", "many_requests_long", "ratio_decode_ms"),
        Goal("the same, end to end", 1.9, "engine_long", "many_requests_long", "ratio_total_s"),
    ),
    "Training": (
        Goal("a step of 2,407 tokens, against transformers' padded one", 6, "training*", "training_padded_2407*", STEP),
        Goal("its peak memory, of theirs", 0.35, "training*", "training_padded_2407*", MEMORY, "%", True, True),
        Goal(
            "a step of 2,407 tokens, 4 layers, against a padding-free loop by hand", 1.5, "training*", "training_padding_free_2407_4*", STEP
        ),
        Goal("a step of 5,523 tokens, 4 layers, likewise", 2.2, "training*", "training_padding_free_5523_4*", STEP),
        Goal("their peak memory, and that of 12 layers, of theirs", 0.9, "training*", "training_padding_free*", MEMORY, "%", True, True),
        Goal(
            "rate of the slowest step from 1,000 to 16,000 tokens, of their median",
            0.75,
            "training_*",
            "*operations*",
            "ratio_*_s",
            "%",
        ),
        Goal("a preference pair with 8 pictures, against both conversations whole", 1.6, "*", "preferences_*", STEP),
    ),
}
# Of `make gpu` on one H200: rates of the best implementation of ours, in the files that its stages write.
KERNELS, MODEL = "gpu_kernels", "gpu_model"
GPU: dict[str, tuple[Goal, ...]] = {
    "Kernels on one H200": (
        Goal("attention d=72 over 64 views, forward, Triton", 300, KERNELS, "attention d72 full*729", "ours triton_gflops", "TFLOP/s"),
        Goal("the same, CUDA C++", 340, KERNELS, "attention d72 full*729", "ours cuda_gflops", "TFLOP/s"),
        Goal("attention d=128, causal, 4k, forward, Triton", 340, KERNELS, "attention d128 causal*4096", "ours triton_gflops", "TFLOP/s"),
        Goal("the same with its gradient", 245, KERNELS, "attention d128 causal*backward", "ours triton_gflops", "TFLOP/s"),
        Goal("loss of 4,096 label rows at 7b, forward and backward", 550, KERNELS, "loss 7b*backward", "gflops", "TFLOP/s"),
        Goal("norms, share of copy bandwidth", 0.85, KERNELS, "*_norm *", "of_limit", "%"),
        Goal("pooling, share of copy bandwidth", 0.85, KERNELS, "pool *", "of_limit", "%"),
    ),
    "The 0.5b model on one H200": (
        Goal("decode of one request", 2000, MODEL, "decode at 1500, batch 1, triton*", "tokens_per_s", "tokens/s"),
        Goal("vision tower", 700, MODEL, "tower, 32 views, triton*", "views_per_s", "views/s"),
    ),
}
UNITS = {"TFLOP/s": 1e-3, "tokens/s": 1.0, "views/s": 1.0}  # what a file's number is multiplied by


def table(goals: Iterable[Goal], known: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| goal | at | measured | |", "|---|---|---|---|"]
    for goal in goals:
        value, bound = goal.value(known), f"{'at most' if goal.at_most else 'at least'} {goal.shown(goal.bound)}"
        verdict = ("met" if goal.met(value) else "**not met**") if value is not None else ""
        rows.append(f"| {goal.what} | {bound} | {NOT_MEASURED if value is None else goal.shown(value)} | {verdict} |")
    return "\n".join(rows)


def section(known: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Goals with what was measured (the worst of the shapes that a goal names), of the CPU and of a GPU."""
    parts = ["## Goals", "A goal's value is its worst shape's."]
    for where, kind, goals in (("the CPU", "cpu", CPU), ("a GPU", "cuda", GPU)):
        every = [goal for own in goals.values() for goal in own]
        values = [(goal, goal.value(known.get(kind, {}))) for goal in every]
        met, open_ = sum(value is not None and goal.met(value) for goal, value in values), sum(value is None for _, value in values)
        parts.append(f"On {where} {met} of {len(every)} are met{f', {open_} not measured' if open_ else ''}.")
        for name, own in goals.items():
            parts += [f"**{name}**", table(own, known.get(kind, {}))]
    return parts
