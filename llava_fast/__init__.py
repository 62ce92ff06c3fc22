"""llava_fast: training and inference for LLaVA-NeXT-Interleave and its family, on packed rows.

import llava_fast as lf

model = lf.load("llava-hf/llava-interleave-qwen-0.5b-hf")
lf.generate(model, lf.Request("<image><image>What changed?", images=["a.jpg", "b.jpg"]))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_fast.api import LlavaFast, generate, load
    from llava_fast.engine.engine import Engine
    from llava_fast.requests import Completion, InputOptions, Request, SamplingParams
    from llava_fast.training.config import TrainConfig
    from llava_fast.training.loop import TrainResult, train

__version__ = "0.1.0"

# Imported when first asked for: `llava-fast --help` and `from llava_fast.batch import pack` should not wait for transformers.
_HOME = {
    "LlavaFast": "api",
    "generate": "api",
    "load": "api",
    "Engine": "engine.engine",
    "Completion": "requests",
    "InputOptions": "requests",
    "Request": "requests",
    "SamplingParams": "requests",
    "TrainConfig": "training.config",
    "TrainResult": "training.loop",
    "train": "training.loop",
}
__all__ = [
    "Completion",
    "Engine",
    "InputOptions",
    "LlavaFast",
    "Request",
    "SamplingParams",
    "TrainConfig",
    "TrainResult",
    "generate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llava_fast' has no attribute {name!r}")
    value = getattr(import_module(f"llava_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
