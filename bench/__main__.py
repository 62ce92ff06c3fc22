"""`python -m bench`: every suite, each in a pytest process of its own, and a result file of each; `make bench`.

    python -m bench                        all of it, 25 minutes on two quiet cores; results under bench/results/<device>/
    python -m bench model serving          these suites
    python -m bench --long                 the benchmarks too long for that, hours in all; their files are called NAME_long
    python -m bench --missing              what has no result yet of this commit on this device: goes on where a run was stopped
    python -m bench --results DIR          elsewhere than bench/results

A suite that fails is told at the end, with what the others found kept. Ctrl-C loses the suite that runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import results
from bench.full_size import make_full_size
from llava_fast.limits import describe, probe

ROOT = Path(__file__).parent.parent
# name -> seconds on two quiet cores, the least measured, 0 where all is long; bench_<name>.py. Those that README quotes come first.
SUITES = {
    "first_token": 115,
    "model": 222,
    "loading": 105,
    "engine": 0,
    "serving": 170,
    "reuse": 139,
    "training": 286,
    "inputs": 27,
    "profile": 86,
    "linear_cross_entropy": 59,
    "varlen_attention": 90,
    "linear": 92,
    "rowwise": 43,
    "spatial_pool": 30,
    "sampling": 21,
}
NEEDS_FULL_SIZE = ("first_token", "model", "loading", "reuse", "profile")


def arguments_of(suite: str, long: bool, checkpoint: Path | None, folder: Path | None) -> list[str]:
    """pytest's."""
    chosen = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", f"bench/bench_{suite}.py", "--benchmark-only"]
    chosen += ["--benchmark-columns=median,rounds", "--record", f"{suite}_long" if long else suite]
    chosen += ["--long"] * long + (["--checkpoint", str(checkpoint)] if checkpoint else [])
    return chosen + (["--results", str(folder.resolve())] if folder else [])


def measured(folder: Path) -> set[str]:
    """Names that have a clean and complete result of the present commit on this device."""
    now = results.tree()
    files = [results.load(path) for path in folder.rglob("*.json")]
    same = [file for file in files if (file["commit"], file["dirty"]) == (now["commit"], False) and not now["dirty"]]
    return {file["name"] for file in same if file["device"]["name"] == results.cpu_name() and file["settings"].get("complete", True)}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="measure every suite and keep the results")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="some of " + ", ".join(SUITES))
    parser.add_argument("--long", action="store_true", help="the long benchmarks")
    parser.add_argument("--missing", action="store_true", help="only what this commit has no result of on this device")
    parser.add_argument("--results", type=Path, help="where the result files go")
    asked = parser.parse_args(given)
    if unknown := set(asked.suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}: expected some of {', '.join(SUITES)}")
    known = measured(asked.results or results.RESULTS) if asked.missing else set()
    if whole := [name for name in asked.suites if not (asked.long or SUITES[name])]:
        parser.error(f"all of {', '.join(whole)} is long: add --long")
    wanted = asked.suites or [name for name in SUITES if asked.long or SUITES[name]]
    chosen = [name for name in SUITES if name in wanted and (f"{name}_long" if asked.long else name) not in known]
    print(describe(probe("cpu")), flush=True)
    begun, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_full_size(Path(folder) / "model") if set(chosen) & set(NEEDS_FULL_SIZE) else None
        for number, name in enumerate(chosen, 1):
            left = sum(SUITES[later] for later in chosen[number - 1 :])
            expected = "" if asked.long else f", about {SUITES[name]} s; {left / 60:.0f} min to go"
            print(f"\n[{number}/{len(chosen)}] {name}{expected}, {(time.monotonic() - begun) / 60:.0f} min so far", flush=True)
            command = [sys.executable, *arguments_of(name, asked.long, checkpoint if name in NEEDS_FULL_SIZE else None, asked.results)]
            code = subprocess.run(command, cwd=ROOT).returncode
            nothing = asked.long and code == 5  # pytest's for "no tests": a suite without long ones
            failed += [name] if code and not nothing else []
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} suites in {(time.monotonic() - begun) / 60:.1f} min; `make report` renders them")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped; `python -m bench --missing` goes on with the suites that have no result yet")
