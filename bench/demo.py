"""The demo, each seed in a process of its own: `python -m bench.demo [SEED ...]`. Writes bench/results/<device>/<date>-<commit>-demo.json.

In place of a seed, a results.json that a demo wrote is taken as it is.

Seconds are of whole stages, their data and measurements included; accuracy is over the demo's held-out questions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench import results
from llava_fast.limits import describe, probe

SEEDS = ("0", "1", "2")


def row_of(summary: dict[str, Any]) -> dict[str, Any]:
    """From the results.json of a demo."""
    stages = summary["stages"]
    row: dict[str, Any] = {"name": f"demo_seed_{summary['seed']}", "device": "cpu"}
    row |= {"steps": sum(stage["steps"] for stage in stages.values())}
    row |= {f"accuracy_{scenario['scenario'].replace(' ', '_')}": scenario["accuracy"] for scenario in summary["scenarios"]}
    row |= {"captions_random_projector": stages["decoder"]["captions"], "captions_aligned": stages["align"]["captions"]}
    row |= {f"accuracy_after_{name}": mean(stages[name]["scenarios"].values()) for name in ("align", "sft", "interleave", "dpo")}
    row |= {"preferred_before_dpo": stages["dpo"]["preferred_before"], "preferred_after_dpo": stages["dpo"]["preferred"]}
    row |= {"hedged_before_dpo": stages["interleave"]["hedged"], "hedged_after_dpo": stages["dpo"]["hedged"]}
    row |= {f"{name}_s": value for name, value in summary["seconds"].items()}
    row |= {"total_s": round(sum(summary["seconds"].values()), 1), "answers_per_second": summary["answers_per_second"]}
    row |= {"training_tokens_per_second": stages["interleave"]["tokens_per_second"]}
    return row | {key: summary[key] for key in ("agree_with_transformers", "compared_with_transformers")}


def main(asked: Sequence[str]) -> None:
    limits = probe("cpu")
    print(describe(limits), flush=True)
    rows: list[dict[str, Any]] = []
    failed = False
    for seed in asked:
        if seed.endswith(".json"):
            rows.append(row_of(json.loads(Path(seed).read_text())))
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "-m", "llava_fast.cli", "demo", "--out", folder, "--seed", seed])
            failed = failed or done.returncode != 0
            rows.append(row_of(json.loads((Path(folder) / "results.json").read_text())))
    print(f"written: {results.write('demo', rows, {'seeds': [row['name'] for row in rows]}, limits)}")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:] or SEEDS)
