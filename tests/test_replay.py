"""A step that is recorded and repeated gives what running it gives, to the bit; what is more than launches is not repeated."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llava_fast as lf
from llava_fast.engine.replay import Replay
from llava_fast.engine.runner import DecodeStep, Runner
from llava_fast.kernels import _native, registry
from llava_fast.kernels.linear import linear
from llava_fast.kernels.paged_attention import paged_attention


def step_of(model: lf.LlavaFast, count: int) -> DecodeStep:
    """Over a cache of 4 blocks of 16 rows with something in it."""
    runner = Runner(model, 4, 16, torch.float32, 4)
    for buffer in (runner.k, runner.v):
        buffer.normal_(generator=torch.Generator().manual_seed(0))
    return runner.new_step(count)


@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_repeated_steps_equal_run_ones(directory, count: int) -> None:
    model = lf.load(directory, device="cpu", dtype=torch.float32)
    recorded, run = step_of(model, count), step_of(model, count)
    table = torch.tensor([[3], [0], [2]])[:count]
    for token in range(5):
        ids, positions = torch.arange(count) + token, torch.arange(count) + 3 + token
        ours = recorded(ids, positions, table).clone()
        run.repeat = None  # so that it runs again
        assert torch.equal(ours, run(ids, positions, table))
        for a, b in ((recorded.cache.k, run.cache.k), (recorded.cache.v, run.cache.v)):
            assert torch.equal(a, b)
    assert isinstance(recorded.repeat, Replay) and recorded.repeat.exact
    assert len(recorded.repeat.launches) == 9 * model.config.decoder.layers + 2  # and the last norm, and the head


@torch.inference_mode()
def test_the_reference_is_not_repeated(directory) -> None:
    model = lf.load(directory, device="cpu", dtype=torch.float32)
    with registry.use(norm="reference"):
        step = step_of(model, 1)
        first = step(torch.tensor([5]), torch.tensor([3]), torch.tensor([[1]])).clone()
        assert isinstance(step.repeat, Replay) and not step.repeat.exact
        assert not torch.equal(step(torch.tensor([6]), torch.tensor([4]), torch.tensor([[1]])), first)


@torch.inference_mode()
def test_rows_of_nobody_are_written_nowhere(directory) -> None:
    """As a captured step of more sequences than there are runs."""
    model = lf.load(directory, device="cpu", dtype=torch.float32)
    exact, filled = step_of(model, 1), step_of(model, 4)
    for token in range(3):
        call = (torch.tensor([token]), torch.tensor([17 + token]), torch.tensor([[1, 3]]))
        assert (exact(*call) - filled(*call)[:1]).abs().max() < 1e-5
        assert torch.equal(exact.cache.k[0], filled.cache.k[0])  # below the first attention: bit-equal


def test_what_is_no_launch_is_seen() -> None:
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    with torch.inference_mode():
        assert Replay(lambda: linear(x, w).view(4, 2)).exact
        assert not Replay(lambda: linear(x, w) + 1).exact
        assert not Replay(lambda: (linear(x, w), torch._foreach_add_([x], 0.0))[0]).exact
        assert not Replay(lambda: x.view(8, 2)).exact  # no launch at all
        assert not Replay(lambda: linear(x * 2, w)).exact
        assert not Replay(lambda: linear(torch.arange(16.0).view(2, 8), w)).exact
        assert not Replay(lambda: linear(x.t().contiguous().t(), w)).exact


def test_memory_made_in_a_recording_stays_its_own() -> None:
    x, w = torch.randn(2, 64), torch.randn(64, 64)
    with torch.inference_mode():
        replay = Replay(lambda: linear(linear(linear(x, w), w), w))
        others = [torch.full((2, 64), 7.0) for _ in range(100)]
        x.mul_(-1)
        torch.testing.assert_close(replay(), x @ w.T @ w.T @ w.T, rtol=1e-4, atol=1e-2)
    assert all(bool((other == 7).all()) for other in others)


def test_another_number_of_threads_runs_the_function() -> None:
    calls: list[int] = []
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    with torch.inference_mode():
        replay = Replay(lambda: (calls.append(0), linear(x, w))[1])
        replay()
        assert len(calls) == 1
        torch.set_num_threads(2)
        try:
            replay()
        finally:
            torch.set_num_threads(1)
        assert len(calls) == 2


def test_a_recording_is_of_its_thread() -> None:
    """What other threads launch meanwhile is theirs, and they may record too."""
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    others: list[Replay] = []

    def beside() -> Tensor:
        thread = threading.Thread(target=lambda: others.append(Replay(lambda: linear(x, w))))
        thread.start()
        thread.join()
        return linear(x, w)

    with torch.inference_mode():
        replay = Replay(beside)
    assert replay.exact and others[0].exact and len(replay.launches) == len(others[0].launches) == 1


def test_paged_attention_is_repeated() -> None:
    q, k, v = (torch.randn(shape) for shape in [(1, 2, 64), (4, 16, 2, 64), (4, 16, 2, 64)])
    table, cu, lengths = (torch.tensor(rows, dtype=torch.int32) for rows in ([[2, 0]], [0, 1], [20]))
    with torch.inference_mode():
        replay = Replay(lambda: paged_attention(q, k, v, table, cu, lengths))
        q.copy_(torch.randn(1, 2, 64))
        assert replay.exact and torch.equal(replay(), paged_attention(q, k, v, table, cu, lengths))


def test_every_op_launches_where_a_recording_sees_it() -> None:
    for file in Path(registry.__file__).parent.glob("*.py"):
        assert file.name == "_native.py" or "import _cpu" not in file.read_text(), file


def test_a_recording_ends_where_the_function_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        Replay(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with _native.recording(), pytest.raises(RuntimeError, match="already"), _native.recording():
        pass
