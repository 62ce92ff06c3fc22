"""One process of the preference benchmark: `python -m bench.preference_steps SIDE CHECKPOINT STEPS`.

SIDE: shared (the trainer's row: prompt and pictures once, both answers after them) or apart (the same trainer with a row of two whole
conversations: what every trainer does that concatenates chosen and rejected). One pair of 8 pictures, a question of 60 tokens and answers
of 120 and 80, the tower frozen, everything else trained, AdamW fused, fp32, the reference's log-probabilities known. The step before those
that are timed is not. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.training_steps import CONFIG, PATCHES, SIZE, timed
from llava_fast import checkpoint as files
from llava_fast.batch import IGNORE, Sample, Visual, pack, splice
from llava_fast.models.llava import Llava
from llava_fast.training.batches import Row
from llava_fast.training.config import TrainConfig
from llava_fast.training.dpo import PreferenceLoss, pair_logps
from llava_fast.training.flops import row_flops
from llava_fast.training.options import DpoOptions
from llava_fast.training.step import make_optimizer, prepare_parameters, train_step

PICTURES, QUESTION, CHOSEN, REJECTED = 8, 60, 120, 80


def pair_row(side: str, image_token: int, pictures: int = PICTURES) -> Row:
    """One pair as three sequences: what is shared, chosen, rejected; apart, what is shared is one token that no other attends to."""
    rng = np.random.default_rng(0)
    prompt = np.concatenate([np.full(pictures, image_token), rng.integers(1000, 100_000, QUESTION)])
    answers = [rng.integers(1000, 100_000, length) for length in (CHOSEN, REJECTED)]
    visuals = [Visual(1, PATCHES, np.arange(PATCHES))] * pictures
    pixels = torch.rand(pictures, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    unlabelled = np.full(len(prompt), IGNORE)
    if side == "shared":
        continued = [Sample(answer, labels=answer) for answer in answers]
        batch = pack([splice(prompt, visuals, image_token, unlabelled), *continued], pixels, (None, 0, 0))
    else:
        whole = [splice(np.concatenate([prompt, answer]), visuals, image_token, np.concatenate([unlabelled, answer])) for answer in answers]
        batch = pack([Sample(prompt[-1:], labels=np.array([IGNORE])), *whole], torch.cat([pixels, pixels]))
    return Row(batch, (0,), (0, 3))


def main(side: str, checkpoint: str, steps: int) -> dict[str, Any]:
    model = files.load(Llava, checkpoint, device="cpu", dtype=torch.float32)
    config = TrainConfig("m", "a.json", "out", **CONFIG)
    trained = prepare_parameters(model, config, "fp32")
    optimizer = make_optimizer(trained.masters, config)

    row = pair_row(side, model.config.image_token_id)
    with torch.no_grad():
        known = pair_logps(model, row).float()
    objective = PreferenceLoss(DpoOptions(), known)
    operations = row_flops(model.config, row.batch, trained=("projector", "decoder"))
    found = timed(lambda: float(train_step(model, trained, optimizer, [row], 1.0, config.clip, "cpu", objective)[0]), steps)
    # The first loss is ln 2 whatever the model is: what the sides must agree on is the log-probabilities too.
    return found | {"losses": [*known.flatten().tolist(), *found["losses"]], "operations": operations}


if __name__ == "__main__":
    Path("/proc/self/oom_score_adj").write_text("1000")
    assert sys.argv[1] in ("shared", "apart"), sys.argv[1]
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
