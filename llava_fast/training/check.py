"""`llava-fast data check`: everything about a run's data that can be known before a device is touched."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml
from rich.table import Table
from rich.text import Text

from llava_fast.checkpoint import input_spec
from llava_fast.inputs.packing import pack_rows
from llava_fast.inputs.prepare import InputSpec
from llava_fast.inputs.records import SCENARIOS
from llava_fast.inputs.sources import find_sources
from llava_fast.training.config import TrainConfig, as_config
from llava_fast.training.examine import Fault, Finding, Job
from llava_fast.training.index import build_index, index_folder, lock
from llava_fast.training.workers import examine_all

# Readable on a light page and on a dark one: the picture has no background, and no colour of it is near black or white.
GREY = "#8b949e"
COLOURS = {"single-image": "#3b82f6", "multi-image": "#f59e0b", "multi-view": "#10b981", "video": "#ef4444", "text": "#a78bfa"}


@dataclass
class Group:
    """Sums over the records of a data set or scenario. cut: of them, those that lost turns at their end.  left_out: by kind of fault."""

    records: int = 0
    tokens: int = 0
    labels: int = 0
    views: int = 0
    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass
class Summary:
    """What a check found. groups: by (data set, scenario).  stopped: not all records were looked at.

    rows, fill: packed rows an epoch and their used share (of a recipe, or with a model).  index: where the index is.
    validation: of validation_data.
    """

    groups: dict[tuple[str, str], Group] = field(default_factory=dict)
    lengths: dict[str, list[np.ndarray]] = field(default_factory=dict)
    faults: int = 0
    stopped: bool = False
    rows: int | None = None
    fill: float | None = None
    index: str | None = None
    validation: Summary | None = None

    def add(self, finding: Finding, accepted: tuple[str, ...]) -> None:
        broken = np.isin(finding.rows["record"].to_numpy(), [fault.record for fault in finding.unreadable])
        columns = {name: finding.rows[name].to_pylist() for name in ("dataset", "scenario", "tokens", "labels", "views", "dropped")}
        for bad, dataset, scenario, tokens, labels, views, dropped in zip(broken, *columns.values(), strict=True):
            if not bad:
                group = self._group(dataset, SCENARIOS[scenario])
                group.records += 1
                group.tokens += tokens
                group.labels += labels
                group.views += views
                group.cut += dropped > 0
        scenarios, tokens = finding.rows["scenario"].to_numpy(), finding.rows["tokens"].to_numpy()
        for number in np.unique(scenarios[~broken]):
            self.lengths.setdefault(SCENARIOS[number], []).append(tokens[~broken & (scenarios == number)])
        for fault in finding.faults + finding.unreadable:
            self._group(fault.dataset, fault.scenario).left_out[fault.kind] += 1
            self.faults += fault.kind not in accepted

    def _group(self, dataset: str, scenario: str) -> Group:
        return self.groups.setdefault((dataset, scenario), Group())

    def by(self, part: int) -> dict[str, Group]:
        """Sums by data set (0) or scenario (1)."""
        sums: dict[str, Group] = {}
        for key, group in self.groups.items():
            total = sums.setdefault(key[part], Group())
            for name in ("records", "tokens", "labels", "views", "cut"):
                setattr(total, name, getattr(total, name) + getattr(group, name))
            total.left_out.update(group.left_out)
        return sums

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        tables = {
            name: {key: {**vars(group), "left_out": dict(group.left_out)} for key, group in self.by(part).items()}
            for part, name in enumerate(PARTS)
        }
        found = {**tables, "faults": self.faults, "stopped": self.stopped, "rows": self.rows, "fill": self.fill, "index": self.index}
        return found if self.validation is None else {**found, "validation": self.validation.plain()}

    @property
    def parts(self) -> list[tuple[str, Summary]]:
        """Of the training's data, and of what it is validated on."""
        return [("", self)] + ([] if self.validation is None else [("validation: ", self.validation)])


PARTS = ("datasets", "scenarios")


def read_settings(
    what: str | Path | list[Path], model: str | None = None, media_folder: str | None = None
) -> tuple[TrainConfig, InputSpec | None]:
    """The configuration to check, from a recipe or from sources, and what its model says of inputs (None where no model is known)."""
    paths = [Path(path) for path in (what if isinstance(what, list) else [what])]
    if len(paths) == 1 and _is_recipe(paths[0]):
        config = as_config(paths[0])
        config = dataclasses.replace(config, model=model or config.model, media_folder=media_folder or config.media_folder)
        return config, input_spec(config.model)
    config = TrainConfig(model or "none", tuple(map(str, paths)), "none", media_folder)
    return config, None if model is None else input_spec(model)


def _is_recipe(path: Path) -> bool:
    if path.suffix not in (".yaml", ".yml", ".toml") or not path.is_file():
        return False
    if path.suffix == ".toml":
        return True
    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return isinstance(fields, Mapping) and "datasets" not in fields


def check_data(
    config: TrainConfig,
    spec: InputSpec | None,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    processes: int | None = None,
) -> Summary:
    """Look at every record of a configuration (of preference pairs with `dpo`) and of its validation_data, with the headers of pictures and
    videos, and write `out`/faults.jsonl as faults are found; with a spec also the index (where training will look for it; pairs have
    none) and `out`/lengths.png. Ctrl-C ends it early, with what is known by then.

    Raises ValueError for sources that cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    with (out / "faults.jsonl").open("w", encoding="utf-8") as file:
        try:
            _check(config, spec, summary, file, processes, progress)
            if config.validation_data:
                summary.validation = Summary()
                held_out = dataclasses.replace(config, data=config.validation_data)
                _check(held_out, spec, summary.validation, file, processes, progress)
        except KeyboardInterrupt:
            summary.stopped = True
    if spec is not None and summary.lengths:
        draw_lengths(summary, config.tokens_per_row, out / "lengths.png")
    return summary


def _check(config: TrainConfig, spec: InputSpec | None, summary: Summary, file: TextIO, processes: int | None, progress: Any) -> None:
    """What is found of one configuration's `data`, as it is found."""
    sources = find_sources(config.data, config.media_folder)
    if config.dpo is not None and (other := [source.path for source in sources if source.path.suffix not in (".json", ".jsonl")]):
        raise ValueError(f"preferences are a .json or .jsonl file, got {other[0]}")
    job = Job(tuple(sources), config, spec, headers=True)
    accepted = ("too long", "too many views") if config.too_long == "skip" else ()
    sizes: list[tuple[np.ndarray, np.ndarray]] = []

    def take(finding: Finding) -> None:
        summary.add(finding, accepted)
        sizes.append((finding.rows["tokens"].to_numpy(), finding.rows["views"].to_numpy()))
        for fault in finding.faults + finding.unreadable:
            file.write(json.dumps(_shown(fault)) + "\n")

    if spec is None or config.dpo is not None:
        for finding in examine_all(job, processes, progress):
            take(finding)
    else:
        folder = index_folder(config, spec, sources)
        with lock(folder):
            index = build_index(job, folder, take, processes=processes, progress=progress)
        summary.index = str(index.folder)
    if spec is not None:
        empty = np.empty(0, dtype=np.int64)
        tokens, views = (np.concatenate([empty, *column]) for column in (zip(*sizes, strict=True) if sizes else ((), ())))
        packing = pack_rows(tokens, views, config.tokens_per_row, config.views_per_row, window=config.packing_window, seed=config.seed)
        summary.rows, summary.fill = len(packing.rows), packing.fill(tokens, config.tokens_per_row)


def _shown(fault: Fault) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(fault).items() if name not in ("source", "stamp")}


def tables(summary: Summary) -> list[Table]:
    return [_table(whose + name, found.by(part)) for whose, found in summary.parts for part, name in enumerate(("data set", "scenario"))]


def _table(title: str, groups: Mapping[str, Group]) -> Table:
    table = Table(title, *(f"{name}" for name in ("records", "tokens", "labels", "views", "cut", "left out")), show_footer=len(groups) > 1)
    for column in table.columns[1:6]:
        column.justify = "right"
    rows = sorted(groups.items(), key=lambda item: -item[1].tokens - item[1].records)
    total = Group()
    for name, group in rows:
        # As text: a name in brackets is no style, and what a terminal would obey is not printed.
        table.add_row(Text("".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)), *_cells(group))
        for number in ("records", "tokens", "labels", "views", "cut"):
            setattr(total, number, getattr(total, number) + getattr(group, number))
        total.left_out.update(group.left_out)
    for column, cell in zip(table.columns, ("together", *_cells(total)), strict=True):
        column.footer = cell
    return table


def _cells(group: Group) -> tuple[str, ...]:
    share = f"{group.labels / group.tokens:.1%}" if group.tokens else "-"
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in group.left_out.most_common())
    return f"{group.records:,}", f"{group.tokens:,}" if group.tokens else "-", share, f"{group.views:,}", f"{group.cut:,}", left_out


def draw_lengths(summary: Summary, tokens_per_row: int, target: Path) -> None:
    """How many records have how many tokens, by scenario, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = {name: np.concatenate(summary.lengths[name]) for name in SCENARIOS if name in summary.lengths}
    longest = max(int(values.max()) for values in lengths.values())
    shortest = min(int(values.min()) for values in lengths.values())
    edges = np.geomspace(max(shortest, 1), max(longest, tokens_per_row) * 1.1, 60)
    figure, axis = pyplot.subplots(figsize=(9, 4), layout="constrained")
    axis.hist(list(lengths.values()), bins=edges.tolist(), stacked=True, color=[COLOURS[name] for name in lengths], label=list(lengths))
    axis.axvline(tokens_per_row, color=GREY, linestyle="--", linewidth=1)
    axis.text(tokens_per_row, axis.get_ylim()[1], f" a row: {tokens_per_row:,}", color=GREY, ha="right", va="bottom", fontsize=9)
    axis.set_xscale("log")
    axis.set_xlabel("tokens of a record", color=GREY)
    axis.set_ylabel("records", color=GREY)
    axis.tick_params(colors=GREY, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.legend(frameon=False, labelcolor=GREY)
    figure.savefig(target, dpi=120, transparent=True)
    pyplot.close(figure)
