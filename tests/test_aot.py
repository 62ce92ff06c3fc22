"""bench/aot.py: what it reads from compiled kernels, and that its gate catches what it is there for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import aot_sample
import pytest

from bench import aot
from llava_fast.kernels import _triton

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "CACHE", tmp_path)
    for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_DUMP_PTXAS_LOG", "TRITON_DISABLE_LINE_INFO"):
        monkeypatch.setenv(name, "")  # what _environment sets is undone with it
    aot._environment()
    for kernel in (aot_sample._softmax_kernel, aot_sample._product_kernel):
        kernel.device_caches.clear()


def compiled(calls: Callable[[str], Iterator[tuple[str, Callable[[], object]]]], case: str, arch: int = 90) -> aot.Kernel:
    chosen = [(name, call) for name, call in calls("meta") if name == case]
    (kernel,) = aot.compile_calls("sample", lambda device: iter(chosen), arch)
    return kernel


def test_good_kernels_pass() -> None:
    softmax, product = aot.compile_calls("sample", aot_sample.shipped_calls, 90)
    assert not softmax.faults and not product.faults
    assert (softmax.row.kernel, softmax.row.num_warps, softmax.row.spills) == ("_softmax_kernel", 4, 0)
    assert softmax.row.v16 == 1 and softmax.row.wgmma == 0 and 16 <= softmax.row.regs <= 64
    assert product.row.wgmma > 0 and product.row.mma == 0 and product.row.smem >= 2 * (64 + 64) * 64 * 2
    older = compiled(aot_sample.shipped_calls, "product", 80)
    assert not older.faults and older.row.wgmma == 0 and older.row.mma > 0


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("spills", "bytes of spills and stack"),
        ("narrow", "no load of 16 bytes"),
        ("unaligned", "no load of 16 bytes"),
        ("serialised", "ptxas serialised wgmma"),
        ("shared", "262144 bytes of shared memory > 232448"),
        ("scalar", "without tensor cores"),
        ("raises", "Both operands must be same dtype. Got bf16 and fp32"),
        ("nothing", "nothing was launched"),
    ],
)
def test_faults_are_found(case: str, fault: str) -> None:
    assert fault in "; ".join(compiled(aot_sample.faulty_calls, case).faults)


def test_wgmma_is_asked_of_tall_tiles() -> None:
    """The rule itself: triton gives no tall product of bf16 without wgmma to try it on."""
    good = compiled(aot_sample.shipped_calls, "product")
    assert not good.faults
    text = {"ptx": "ld.global.v4.b32", "ttir": "tt.dot %a, %b, %c : tensor<64x64xbf16> * tensor<64x64xbf16> -> x", "cubin": b""}
    meta = type("Meta", (), {"target": type("Target", (), {"arch": 90}), "name": "k", "num_warps": 4, "num_stages": 2, "shared": 0})
    kernel = type("Compiled", (), {"asm": text, "metadata": meta})
    assert aot.inspect_kernel("op", "case", kernel, "Used 32 registers").faults == ("a product of 64 rows or more without wgmma",)
    text["ttir"] = text["ttir"].replace("64x64xbf16> *", "16x64xbf16> *")
    assert aot.inspect_kernel("op", "case", kernel, "Used 32 registers").faults == ()


def test_cached_and_fresh_compiles_agree(tmp_path: Path) -> None:
    """The log of ptxas is kept: a row does not depend on who compiled the kernel, nor on how often."""
    first = compiled(aot_sample.shipped_calls, "product")
    aot_sample._product_kernel.device_caches.clear()
    assert compiled(aot_sample.shipped_calls, "product") == first
    (log,) = tmp_path.rglob("*.ptxas")
    log.unlink()
    aot_sample._product_kernel.device_caches.clear()
    assert compiled(aot_sample.shipped_calls, "product") == first
    assert log.exists()


def test_launch_parameters_are_those_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_tuned", lambda: {"sm_80": {"_product_kernel": {"any": {"num_warps": 8, "num_stages": 2}}}})
    rows = [compiled(aot_sample.shipped_calls, "product", arch).row for arch in (80, 90)]
    assert [(row.num_warps, row.num_stages) for row in rows] == [(8, 2), (4, 3)]


def test_nothing_stays_patched() -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = driver._active, JITFunction.run, _triton.TARGET
    compiled(aot_sample.faulty_calls, "raises", 80)
    assert (driver._active, JITFunction.run, _triton.TARGET) == before


ROW = aot.Row("norm", "rms 1024", "_rms_norm", 90, 4, 2, 40, 0, 64, 0, 0, 1, 7000)


def test_check_fails_on_a_changed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [aot.Kernel(ROW, ()), aot.Kernel(replace(ROW, arch=80), ())]
    monkeypatch.setattr(aot, "TABLE", tmp_path / "aot.csv")
    monkeypatch.setattr(aot, "compile_all", lambda chosen: found)
    assert aot.main([]) == 0
    text = aot.TABLE.read_text()
    assert aot.main(["--check"]) == 0 and text.splitlines()[2].startswith("norm,rms 1024,_rms_norm,80,")  # sorted

    found[0] = aot.Kernel(replace(ROW, regs=41), ())
    assert aot.main(["--check"]) == 1 and aot.TABLE.read_text() == text
    told = capsys.readouterr().out
    assert "-norm,rms 1024,_rms_norm,90,4,2,40,0" in told and "+norm,rms 1024,_rms_norm,90,4,2,41,0" in told

    aot.TABLE.write_text(text.replace("triton", "triton 0.0 not"))  # another compiler: rows may differ, the gate holds
    assert aot.main(["--check"]) == 0
    found[0] = aot.Kernel(ROW, ("spills",))
    assert aot.main(["--check"]) == 1 and aot.main([]) == 1


def test_cuda_log() -> None:
    log = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem, 368 bytes cmem[0]"""
    assert aot.ptxas_facts(log) == {"regs": 32, "spills": 24, "smem": 1024}
