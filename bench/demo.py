"""The demo with three seeds, each in a process of its own: `python -m bench.demo`. Writes bench/results/<device>/<date>-<commit>-demo.json.

Seconds are of whole stages, their data and measurements included; accuracy is over the demo's held-out questions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from bench import results
from llava_fast.limits import describe, probe

SEEDS = (0, 1, 2)


def main() -> None:
    limits = probe("cpu")
    print(describe(limits), flush=True)
    rows: list[dict[str, Any]] = []
    failed = False
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "-m", "llava_fast.cli", "demo", "--out", folder, "--seed", str(seed)])
            failed = failed or done.returncode != 0
            summary = json.loads((Path(folder) / "results.json").read_text())
        stages = summary["stages"]
        row: dict[str, Any] = {"name": f"demo_seed_{seed}", "device": "cpu", "steps": sum(stage["steps"] for stage in stages.values())}
        row |= {f"accuracy_{scenario['scenario'].replace(' ', '_')}": scenario["accuracy"] for scenario in summary["scenarios"]}
        row |= {"captions_random_projector": stages["decoder"]["captions"], "captions_aligned": stages["align"]["captions"]}
        row |= {f"accuracy_after_{name}": mean(stages[name]["scenarios"].values()) for name in ("align", "sft", "interleave", "dpo")}
        row |= {"preferred_before_dpo": stages["dpo"]["preferred_before"], "preferred_after_dpo": stages["dpo"]["preferred"]}
        row |= {"hedged_before_dpo": stages["interleave"]["hedged"], "hedged_after_dpo": stages["dpo"]["hedged"]}
        row |= {f"{name}_s": value for name, value in summary["seconds"].items()}
        row |= {"total_s": round(sum(summary["seconds"].values()), 1), "answers_per_second": summary["answers_per_second"]}
        row |= {"training_tokens_per_second": stages["interleave"]["tokens_per_second"]}
        row |= {key: summary[key] for key in ("agree_with_transformers", "compared_with_transformers")}
        rows.append(row)
    print(f"written: {results.write('demo', rows, {'seeds': list(SEEDS)}, limits)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
