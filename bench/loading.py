"""One process of the loading benchmark: `python -m bench.loading SIDE CHECKPOINT` loads and prints JSON.

Sides: llava_fast (bf16 as it is in the file, read and laid out), llava_fast int8 and int4 (narrowed while loading), transformers fp32
(answers as ours does), transformers bf16 (the file mapped into memory, nothing read yet), transformers int8 (fp32, then torch's own
quantisation, which keeps the embedding table and the tower in fp32).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from bench.memory import peak_in_process, status

SIDES = ("llava_fast", "llava_fast int8", "llava_fast int4", "transformers fp32", "transformers bf16", "transformers int8")


def loaded(side: str, checkpoint: str) -> dict[str, Any]:
    """Seconds of the load alone; peak of the anonymous memory while it ran, and what stays, both past what imports took; bytes.

    Raises ValueError for a side that there is not.
    """
    if side not in SIDES:
        raise ValueError(f"a side is one of {', '.join(SIDES)}, got {side!r}")
    import torch
    from transformers.models.llava import modeling_llava  # noqa: F401 - lazy otherwise, as the next is

    from bench.baselines import inference
    from llava_fast import load

    library, _, kind = side.partition(" ")
    before = status()["RssAnon"]
    with peak_in_process() as peak:
        start = time.perf_counter()
        if library == "llava_fast":
            model: Any = load(checkpoint, device="cpu", quantise=kind or None)
        else:
            model = inference.load(checkpoint, torch.bfloat16 if kind == "bf16" else torch.float32)
            model = inference.dynamic_int8(model) if kind == "int8" else model
        took = time.perf_counter() - start
    after = status()["RssAnon"]
    del model
    return {"load_s": took, "peak_bytes": peak.anon - before, "kept_bytes": after - before}


if __name__ == "__main__":
    print(json.dumps(loaded(sys.argv[1], sys.argv[2])))
