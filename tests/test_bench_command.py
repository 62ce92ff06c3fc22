"""`python -m bench`: which suites run, with what, and what is told of them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

import bench.__main__ as command
from bench import results
from llava_fast.limits import Limits

ROOT = Path(__file__).parent.parent
LIMITS = Limits("cpu", 2, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands in place of processes; `training` ends with 1, and `inputs` has no tests."""
    commands: list[list[str]] = []

    def run(arguments: list[str], **_: Any) -> Any:
        commands.append(arguments)
        name = next(a for a in arguments if a.startswith("bench/"))
        return types.SimpleNamespace(returncode={"bench/bench_training.py": 1, "bench/bench_inputs.py": 5}.get(name, 0))

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "probe", lambda device: LIMITS)
    monkeypatch.setattr(command, "make_full_size", lambda path: path)
    monkeypatch.setattr(results, "tree", lambda: {"commit": "abc", "dirty": False})
    return commands


def test_every_suite_is_known() -> None:
    assert {f"bench_{name}.py" for name in command.SUITES} == {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    assert sum(command.SUITES.values()) <= 25 * 60


def test_suites_run_one_by_one_and_a_failure_is_told(ran: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["training", "model", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "1 of 2 suites" in said.out and "failed: training" in said.err
    model, training = ran
    assert "bench/bench_model.py" in model and model[model.index("--record") + 1] == "model" and "--checkpoint" in model
    assert "--checkpoint" not in training and training[training.index("--results") + 1] == str(tmp_path) and "--long" not in training


def test_long_ones_have_files_of_their_own(ran: list[list[str]]) -> None:
    assert command.main(["--long", "inputs", "engine"]) == 0, "a suite without long benchmarks is no failure"
    assert [arguments[arguments.index("--record") + 1] for arguments in ran] == ["engine_long", "inputs_long"]
    assert all("--long" in arguments for arguments in ran)
    assert command.main(["inputs"]) == 1, "without --long it is one"


def test_missing_goes_on_where_a_run_stopped(ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write("model", [], {}, LIMITS, tmp_path)
    monkeypatch.setattr(results, "tree", lambda: {"commit": "abc", "dirty": True})
    results.write("rowwise", [], {}, LIMITS, tmp_path)
    assert command.measured(tmp_path) == set(), "a tree with changes has no results"
    monkeypatch.setattr(results, "tree", lambda: {"commit": "abc", "dirty": False})
    results.write("linear", [], {"complete": False}, LIMITS, tmp_path)
    assert command.measured(tmp_path) == {"model"}, "one that failed in part is measured again"
    command.main(["model", "rowwise", "--missing", "--results", str(tmp_path)])
    assert ["bench/bench_rowwise.py" in arguments for arguments in ran] == [True]


def test_a_suite_that_is_long_alone_runs_with_long_alone(ran: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    assert len(ran) == len(command.SUITES) - 1 and not any("bench/bench_engine.py" in arguments for arguments in ran)
    with pytest.raises(SystemExit):
        command.main(["engine"])
    assert "all of engine is long: add --long" in capsys.readouterr().err and len(ran) == len(command.SUITES) - 1


def test_a_suite_nobody_knows_is_refused(ran: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["modle"])
    assert "no suite modle: expected some of first_token" in capsys.readouterr().err and not ran
