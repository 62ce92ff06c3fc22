"""Every Triton kernel as it is shipped, and every .cu, compiled without a GPU: `python -m bench.aot [--check] [op ...]`

Each op's file lists its launches in shipped_calls(device): (case, thunk) pairs. Here they run on tensors of the device "meta", with a
driver that names a target and launches nothing, so that Triton itself derives signature, constants, divisibility and options, as for a
real launch. The table goes to aot.csv, which is committed: a change of registers or of shared memory shows as a diff.

    regs, spills   registers a thread; bytes of spill stores and loads and of stack (ptxas -v)
    smem           shared memory a program, static and dynamic, in bytes
    wgmma, mma     tensor core instructions in the PTX: warp-group products of sm_90, mma.sync
    v16            global loads of 16 bytes: ld.global.v4.b32 and the like, cp.async of 16, TMA
    cubin          bytes of machine code and metadata, without line numbers (they hold paths)

The gate: nothing spilled, registers and shared memory fit, products of 16- and 8-bit inputs on tensor cores (on wgmma where the tile is
tall enough), no product serialised by ptxas (C7511), loads of 16 bytes except where NARROW gives the reason.
--check writes nothing and fails if a row differs from aot.csv or breaks the gate; with names of ops only those are compiled.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import importlib
import inspect
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "aot.csv"
CACHE = ROOT / "build" / "aot"
SMEM = {80: 166_912, 90: 232_448}  # bytes a program may have on A100 and H100
REGISTERS = 65_536  # of a multiprocessor: a program must fit
NARROW_DTYPES = ("bf16", "f16", "f8E4M3FN", "f8E5M2", "i8")  # have tensor cores; in the words of Triton's IR

# Kernels without 16-byte loads, each with the reason.
NARROW: dict[str, str] = {
    "_patchify_kernel": "a row of a patch is 14 pixels: runs of 14, 28 or 56 bytes, at multiples of that",
}


@dataclass(frozen=True)
class Row:
    op: str
    case: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    regs: int
    spills: int
    smem: int
    wgmma: int
    mma: int
    v16: int
    cubin: int


@dataclass(frozen=True)
class Kernel:
    """A row and what is wrong with it."""

    row: Row
    faults: tuple[str, ...]


# --- Triton -----------------------------------------------------------------------------------------------------------------------


def _environment() -> None:
    """Before triton is imported: a cache of our own, whose every entry has the log of ptxas beside it."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


@contextmanager
def recorded(arch: int, keep: Callable[[Any, str], object]) -> Iterator[None]:
    """Inside, a launch of a Triton kernel compiles it for sm_`arch` and calls keep(compiled, log of ptxas) instead of launching it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from llava_fast.kernels import _triton

    target = GPUTarget("cuda", arch, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: arch,  # triton keeps what it compiled by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    run, config, before = JITFunction.run, triton.runtime.driver, _triton.TARGET

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = True, **kwargs: Any) -> Any:
        log = io.StringIO()
        with redirect_stdout(log):
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        (cubin,) = [path for name, path in compiled.metadata_group.items() if name.endswith(".cubin")]
        beside = Path(cubin).with_suffix(".ptxas")
        if "registers" in log.getvalue():
            beside.write_text(log.getvalue())
        elif not beside.exists():  # a compile that was interrupted, or that another process has not finished: anew
            shutil.rmtree(beside.parent, ignore_errors=True)
            self.device_caches.clear()
            return compile_only(self, *args, grid=grid, **kwargs)
        keep(compiled, beside.read_text())
        return compiled

    active = config._active
    config.set_active(driver)
    JITFunction.run, _triton.TARGET = compile_only, f"sm_{arch}"
    try:
        yield
    finally:
        JITFunction.run, _triton.TARGET = run, before
        config.set_active(active)


def ptxas_facts(log: str) -> dict[str, int]:
    """regs, spills, smem (static) of the one kernel in a log of ptxas -v."""

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    spills = number(r"(\d+) bytes stack frame") + number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return {"regs": number(r"Used (\d+) registers"), "spills": spills, "smem": number(r"(\d+) bytes smem")}


def inspect_kernel(op: str, case: str, compiled: Any, log: str) -> Kernel:
    """The row of a compiled Triton kernel, and the rules of the gate that it breaks."""
    ptx, ttir, meta = compiled.asm["ptx"], compiled.asm["ttir"], compiled.metadata
    arch = meta.target.arch
    facts = ptxas_facts(log)
    wide_loads = r"ld\.global[\w.:]*\.v4\.[buf]32|ld\.global[\w.:]*\.v2\.[buf]64|cp\.async\.cg\.shared|cp\.async\.bulk\.tensor"
    row = Row(
        op,
        case,
        meta.name,
        arch,
        meta.num_warps,
        meta.num_stages,
        facts["regs"],
        facts["spills"],
        facts["smem"] + meta.shared,
        len(re.findall(r"wgmma\.mma_async", ptx)),
        len(re.findall(r"\bmma\.sync", ptx)),
        len(re.findall(wide_loads, ptx)),
        len(compiled.asm["cubin"]),
    )
    faults = [*limits(row)]
    # tt.dot %a, %b, %c ... : tensor<64x32xbf16> * tensor<32x64xbf16> -> ...
    dots = re.findall(r"tt\.dot(?:_scaled)? .*: tensor<(\d+)x\d+x(\w+)> \* tensor<", ttir)
    tall = any(dtype in NARROW_DTYPES and int(rows) >= 64 for rows, dtype in dots) and meta.num_warps % 4 == 0
    if arch == 90 and tall and not row.wgmma:
        faults.append("a product of 64 rows or more without wgmma")
    # Inputs widened to fp32 before tl.dot: exact, and at a fifteenth of the rate.
    if "tt.dot" in ttir and not row.wgmma + row.mma and re.search(r"!tt\.ptr<(?:" + "|".join(NARROW_DTYPES) + r")>", ttir):
        faults.append("a product without tensor cores, of narrow inputs")
    if "C7511" in log or re.search(r"wgmma.*serializ", log):
        faults.append("ptxas serialised wgmma (C7511)")
    if not row.v16 and row.kernel not in NARROW:
        faults.append("no load of 16 bytes, and no reason in NARROW")
    return Kernel(row, tuple(faults))


def limits(row: Row) -> Iterator[str]:
    if row.spills:
        yield f"{row.spills} bytes of spills and stack"
    if row.regs * row.num_warps * 32 > REGISTERS:
        yield f"{row.regs} registers x {row.num_warps * 32} threads > {REGISTERS}"
    if row.smem > SMEM[row.arch]:
        yield f"{row.smem} bytes of shared memory > {SMEM[row.arch]}"


def compile_calls(op: str, calls: Callable[[str], Iterator[tuple[str, Callable[[], object]]]], arch: int) -> list[Kernel]:
    """Every distinct kernel that the cases of shipped_calls launch; a case that raises is a row of zeros with its error as the fault."""
    kernels: list[Kernel] = []
    found: dict[str, Kernel] = {}
    case = ""
    with recorded(arch, lambda compiled, log: found.setdefault(compiled.hash, inspect_kernel(op, case, compiled, log))):
        for case, call in calls("meta"):
            fault = "nothing was launched"
            try:
                call()
            except Exception as error:  # any: it is reported, and the gate fails with it
                fault = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
                found.clear()
            kernels += list(found.values()) or [Kernel(Row(op, case, "none", arch, *[0] * 9), (fault,))]
            found.clear()
    return kernels


def _compile_op(op: str, arch: int) -> list[Kernel]:
    return compile_calls(op, importlib.import_module(f"llava_fast.kernels.{op}").shipped_calls, arch)


# --- CUDA -------------------------------------------------------------------------------------------------------------------------


def _compile_cuda(source: Path, arch: int) -> list[Kernel]:
    """The entry functions of a .cu, by the log of ptxas, which is kept under a key of nvcc's version and all CUDA sources."""
    from setup import NVCC_FLAGS, find_nvcc

    nvcc, key = find_nvcc(), hashlib.sha256(nvcc_version().encode())
    for file in sorted([*(ROOT / "csrc").rglob("*.h"), source]):
        key.update(file.read_bytes())
    log = CACHE / "cuda" / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.log"
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        name = "sm_90a" if arch == 90 else f"sm_{arch}"
        flags = NVCC_FLAGS[: NVCC_FLAGS.index("-gencode")]
        cubin = log.with_suffix(".cubin")
        command = [str(nvcc), *flags, f"-arch={name}", "-cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc'}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        log.write_text(done.stderr)
    parts = re.split(r"Compiling entry function '(\w+)'", log.read_text())
    kernels = []
    for name, facts in zip(parts[1::2], map(ptxas_facts, parts[2::2]), strict=True):
        row = Row(f"cuda/{source.stem}", "", readable(name), arch, 0, 0, facts["regs"], facts["spills"], facts["smem"], 0, 0, 0, 0)
        kernels.append(Kernel(row, tuple(limits(row))))
    return kernels


def readable(mangled: str) -> str:
    """'forward_kernel<float>' for _ZN10llava_fast...; the mangled name where there is no c++filt."""
    if not shutil.which("c++filt"):
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |llava_fast::|\(anonymous namespace\)::|\(.*", "", name.replace("(anonymous namespace)::", ""))


def nvcc_version() -> str:
    from setup import find_nvcc

    nvcc = find_nvcc()
    if nvcc is None:
        return "none"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V([\d.]+)", told)[0]


# --- the table --------------------------------------------------------------------------------------------------------------------


def ops() -> list[str]:
    """Names of the modules of kernels/ that define shipped_calls."""
    import llava_fast.kernels as package

    names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "shipped_calls")]


def versions() -> str:
    import triton

    return f"# triton {triton.__version__}, nvcc {nvcc_version()}"


def render(rows: Sequence[Row], head: str) -> str:
    """The table as text: sorted, so that it is the same whatever was compiled first."""
    out = io.StringIO()
    out.write(head + "\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    writer.writerows(sorted(astuple(row) for row in rows))
    return out.getvalue()


def difference(committed: str, found: str) -> list[str]:
    """Lines of a diff; none where the two are equal."""
    return list(difflib.unified_diff(committed.splitlines(), found.splitlines(), "aot.csv", "compiled", n=0, lineterm=""))


def compile_all(chosen: Sequence[str], workers: int = 2) -> list[Kernel]:
    names = ops()
    if unknown := [name for name in chosen if name not in names]:
        raise SystemExit(f"no shipped_calls in {', '.join(unknown)}: expected some of {', '.join(names)}")
    with ProcessPoolExecutor(workers) as pool:
        # Long ones first: the longest files.
        wanted = sorted(chosen or names, key=lambda name: -len(inspect.getsource(importlib.import_module(f"llava_fast.kernels.{name}"))))
        jobs = [pool.submit(_compile_op, name, arch) for name in wanted for arch in SMEM]
        if not chosen and nvcc_version() != "none":
            jobs += [pool.submit(_compile_cuda, path, arch) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for arch in SMEM]
        return [kernel for job in jobs for kernel in job.result()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with aot.csv instead of writing it")
    parser.add_argument("ops", nargs="*", help="only these; prints their rows and writes nothing")
    asked = parser.parse_args(arguments)
    _environment()
    start = time.perf_counter()
    kernels = compile_all(asked.ops)
    faulty = [kernel for kernel in kernels if kernel.faults]
    table = render([kernel.row for kernel in kernels], versions())
    changes: list[str] = []
    if asked.ops:
        print(table, end="")
    elif not asked.check:
        TABLE.write_text(table)
    else:
        committed = TABLE.read_text() if TABLE.exists() else ""
        if committed.splitlines()[:1] == [versions()]:
            changes = difference(committed, table)
        else:
            print(f"aot: compiled with {versions()[2:]}, aot.csv with {committed.splitlines()[:1]}: the gate alone is checked")
    for line in changes:
        print(line)
    for kernel in faulty:
        row = kernel.row
        print(f"aot: {row.op} {row.case} {row.kernel} sm_{row.arch}: {'; '.join(kernel.faults)}")
    verdict = "failed" if faulty or changes else "passed"
    print(
        f"aot {verdict}: {len(kernels)} kernels in {time.perf_counter() - start:.0f} s, {len(faulty)} at fault, "
        f"{sum(line[0] in '+-' for line in changes[2:])} changed lines"
    )
    return int(verdict == "failed")


if __name__ == "__main__":
    sys.exit(main())
