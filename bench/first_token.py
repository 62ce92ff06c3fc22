"""One process of the first-token benchmark: `python -m bench.first_token llava_fast|transformers CHECKPOINT NEW_TOKENS`.

Loads the checkpoint (bf16 on disk, fp32 arithmetic on both sides), answers a question about two photographs, and prints JSON:
seconds to load, to the first token (pictures read from disk, preprocessing, tower, prefill), per later token, and the ids.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

QUESTION = "What do they have in common?"


def photographs() -> list[str]:
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [str(folder / "china.jpg"), str(folder / "flower.jpg")]


def messages() -> list[dict[str, Any]]:
    content = [{"type": "image", "image": path} for path in photographs()]
    return [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]


def with_llava_fast(checkpoint: str, new_tokens: int) -> dict[str, Any]:
    from llava_fast import generate, load  # imports before the clock starts, as on the other side

    start = time.perf_counter()
    model = load(checkpoint, device="cpu")
    model.generation_config.eos_token_id = []
    loaded = time.perf_counter()
    completion = generate(model, messages(), max_new_tokens=new_tokens)
    return report(start, loaded, completion.timings["first_token"], completion.timings["total"], completion.token_ids)


def with_transformers(checkpoint: str, new_tokens: int) -> dict[str, Any]:
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.generation.streamers import BaseStreamer
    from transformers.models.llava import modeling_llava, processing_llava  # noqa: F401 - lazy otherwise

    start = time.perf_counter()
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    loaded = time.perf_counter()
    times: list[float] = []

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter() - loaded)

        def end(self) -> None:
            pass

    text = processor.apply_chat_template(messages(), add_generation_prompt=True)
    inputs = processor(images=[Image.open(path) for path in photographs()], text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[], streamer=Clock())
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return report(start, loaded, times[1], times[-1], new)  # the streamer is given the prompt first


def report(start: float, loaded: float, first: float, total: float, ids: list[int]) -> dict[str, Any]:
    return {"load_s": loaded - start, "first_token_s": first, "token_ms": (total - first) / max(1, len(ids) - 1) * 1e3, "ids": ids}


if __name__ == "__main__":
    side, checkpoint, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    print(json.dumps({"llava_fast": with_llava_fast, "transformers": with_transformers}[side](checkpoint, new_tokens)))
