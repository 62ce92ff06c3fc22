"""Memory that is ready before it is written to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_fast import memory
from llava_fast.engine.engine import BYTES_AHEAD, Engine

CHECK = """
import sys, torch
from llava_fast import memory

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) * 1024

buffer = memory.empty((16, 1 << 20), torch.float32, torch.device("cpu"))  # 64 MB
buffer[3] = 7
before = held()
memory.populate(buffer[2:10])
assert 24 << 20 < held() - before < 48 << 20, held() - before
assert (buffer[3] == 7).all() and (buffer[2] == 0).all()
"""

KEPT = """
import torch
from llava_fast import memory
from llava_fast.memory import kept_memory

def made(megabytes):
    return memory.empty((megabytes << 18,), torch.float32, torch.device("cpu"))

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) // 1024

with kept_memory():
    table = made(64).fill_(1)
    before, place = held(), table.data_ptr()
    view = table[1:].detach().view(torch.int32)
    del table
    other = made(64)  # of the first a view is alive
    assert other.data_ptr() != place and abs(held() - before) < 8
    del view
    assert made(32).data_ptr() != place  # of another size
    again = made(64)
    assert again.data_ptr() == place and (again == 1).all()
    del again, other
    for size in (64, 65, 66, 67):
        made(size).fill_(1)  # two of them are kept
    assert 120 < held() - before + 64 < 150, held() - before
assert held() - before + 64 < 20, held() - before
first = made(64).fill_(1)
place = held()
del first
assert place - held() > 60
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of other systems is their own")
def test_tables_take_the_memory_of_those_that_are_gone() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not memory.populate(torch.zeros(1)), reason="before Linux 5.14 there is no MADV_POPULATE_WRITE")
def test_populate_takes_pages_and_leaves_what_they_hold() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_engine_has_its_next_blocks_ready(checkpoints, monkeypatch) -> None:
    import llava_fast as lf

    asked: list[int] = []
    monkeypatch.setattr(memory, "populate", lambda part: asked.append(part.shape[0]))
    model = lf.load(checkpoints["qwen_untied"], dtype=torch.float32)
    with Engine(model, page=16, kv_cache_bytes=1 << 27) as engine:
        engine.submit("What is this?", lf.SamplingParams(max_new_tokens=4)).result(60)
        block = engine._core.block_bytes
        blocks = min(BYTES_AHEAD // block, engine._core.pool.count - 1)
    assert len(asked) == 2 * model.config.decoder.layers and set(asked) <= {blocks, blocks + 1} and blocks > 10
