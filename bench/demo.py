"""The demo with three seeds, each in a process of its own: `python -m bench.demo`. Writes bench/results/<device>/<date>-<commit>-demo.json.

Seconds are of whole steps of the demo; accuracy is over its held-out questions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import results
from bench.limits import describe, probe

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
        row: dict[str, Any] = {"name": f"demo_seed_{seed}", "device": "cpu", "steps": summary["steps"]}
        row |= {f"accuracy_{scenario['scenario'].replace(' ', '_')}": scenario["accuracy"] for scenario in summary["scenarios"]}
        row |= {f"{name}_s": value for name, value in summary["seconds"].items()}
        row |= {key: summary[key] for key in ("training_tokens_per_second", "answers_per_second")}
        row |= {key: summary[key] for key in ("agree_with_transformers", "compared_with_transformers")}
        rows.append(row)
    print(f"written: {results.write('demo', rows, {'seeds': list(SEEDS)}, limits)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
