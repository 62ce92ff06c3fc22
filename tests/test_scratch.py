"""Working memory of the CPU kernels: what cannot be had is a MemoryError and not the end of the process; little is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llava_fast._cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space and reads /proc")

ROOT = Path(__file__).parent.parent
PREAMBLE = """
import re, resource, torch
from llava_fast.kernels.linear import linear
from llava_fast.kernels.varlen_attention import varlen_attention

def mapped():
    return int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

def linear_call():
    x, weight, out = torch.ones(64, 4096), torch.ones(4096, 4096), torch.empty(64, 4096)
    return lambda: linear(x, weight, out=out)

def attention_backward(rows, head_dim=64):
    q = torch.ones(rows, 1, head_dim, requires_grad=True)
    cu = torch.tensor([*range(64), rows], dtype=torch.int32)  # many sequences, so that many threads have work
    out, grad = varlen_attention(q, q.detach(), q.detach(), cu, cu), torch.ones_like(q)
    return lambda: torch.autograd.grad(out, q, grad, retain_graph=True)
"""
WITHOUT_MEMORY = """
torch.set_num_threads(1)
calls = [linear_call(), attention_backward(2000)]
for call in calls:
    call()
resource.setrlimit(resource.RLIMIT_AS, (mapped() + (8 << 20), -1))
for call in calls:
    torch.set_num_threads(512)
    try:
        call()
    except MemoryError:
        print("MemoryError")
    torch.set_num_threads(1)
    call()
print("alive")
"""
KEPT = """
torch.set_num_threads(4)
attention_backward(1000)()
for rows in (1000, 6000):  # 32 MB of working memory are kept, 190 MB are not
    call, before = attention_backward(rows, 256), mapped()
    call()
    first = mapped()
    call()
    print(first - before >> 20, mapped() - first >> 20)
"""


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PREAMBLE + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_memory_that_cannot_be_had() -> None:
    assert run(WITHOUT_MEMORY) == ["MemoryError", "MemoryError", "alive"]


def test_little_is_kept() -> None:
    grown = [int(megabytes) for megabytes in run(KEPT)]
    assert 20 < grown[0] < 60 and all(abs(more) < 20 for more in grown[1:]), grown
