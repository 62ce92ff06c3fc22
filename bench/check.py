"""Whether anything got slower: `python -m bench.check FOLDER` holds new results against the committed ones of the same device.

Ratios are compared, ours against the baseline of the same run, not times: these change with the machine's mood. A ratio that fell by more
than ALLOWED fails, unless its quartiles still meet those of before; so does a measurement that is no longer there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import results

ALLOWED = 0.07


def ratios(m: Mapping[str, Any]) -> Iterator[tuple[str, float, float, float]]:
    """(quantity, low, ratio, high) of a measurement; one that was taken once has no spread, one of a few rounds the least and greatest.

    Where there are several baselines the strongest is part of the quantity: another one is no measure of what got slower.
    """
    against = f" against {m['baseline']}" if "baseline" in m else ""
    for key, value in m.items():
        if key == "ratio":
            yield f"ms{against}", m["ratio_low"], value, m["ratio_high"]
        elif key.startswith("ratio_") and key not in ("ratio_low", "ratio_high"):
            quantity = key.removeprefix("ratio_")
            each = m.get(f"ratios_{quantity}", [value])
            yield f"{quantity}{against}", min(each), value, max(each)


def by_name(folder: Path) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(device, measurement, quantity) -> (low, ratio, high), the newest."""
    found = {}
    for result in sorted((results.load(path) for path in folder.rglob("*.json")), key=lambda result: result["date"]):
        for m in result["measurements"]:
            for quantity, *values in ratios(m):
                found[result["device"]["name"], m["name"], quantity] = tuple(values)
    return found  # type: ignore[return-value]


def slower(before: Mapping[Any, tuple[float, float, float]], now: Mapping[Any, tuple[float, float, float]]) -> list[str]:
    """A line for each ratio that fell."""
    lines = []
    for key in sorted(before.keys() & now.keys()):
        (low, old, _), (_, new, high) = before[key], now[key]
        if new < (1 - ALLOWED) * old and high < low:
            lines.append(f"{key[1]}, {key[2]}: {old:.2f}x before, {new:.2f}x now ({new / old - 1:+.0%}) on {key[0]}")
    return lines


def gone(committed: Path, folder: Path) -> list[str]:
    """A line for each measurement of a committed file that the new file of that name lacks: voided, or no longer taken."""
    before, now = names(committed), names(folder)
    return [f"{name} of {key[1]} was not measured" for key in sorted(before.keys() & now.keys()) for name in sorted(before[key] - now[key])]


def names(folder: Path) -> dict[tuple[str, str], set[str]]:
    """(device, result) -> its measurements, of the newest file."""
    files = sorted((results.load(path) for path in folder.rglob("*.json")), key=lambda result: result["date"])
    return {(file["device"]["name"], file["name"]): {m["name"] for m in file["measurements"]} for file in files}


def main(folder: Path, committed: Path = results.RESULTS) -> int:
    before, now = by_name(committed), by_name(folder)
    lines, missing = slower(before, now), gone(committed, folder)
    compared = f"{len(before.keys() & now.keys())} ratios compared, {len(lines)} fell by more than {ALLOWED:.0%}"
    print("\n".join([*lines, *missing, compared]))
    if not before.keys() & now.keys():
        print(f"nothing in {folder} was measured before on this device", file=sys.stderr)
        return 2
    return 1 if lines or missing else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
