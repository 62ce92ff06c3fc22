"""Native extensions; everything else is in pyproject.toml. Neither extension needs torch, its headers or a GPU to build.

llava_fast._cpu   csrc/bindings.cpp and csrc/cpu/*.cpp, wherever there is a C++ compiler. Files that end in _avx2.cpp,
                  _avx512.cpp or _amx.cpp get their instruction set's flags and are left out where the compiler refuses these
                  or builds for another architecture too; the rest is portable.
llava_fast._cuda  csrc/cuda/*, where nvcc is found: machine code for sm_80 and sm_90a, PTX for compute_80 and compute_90.

LLAVA_FAST_CUDA=0 leaves _cuda out; LLAVA_FAST_CUDA=1 makes it a must. Otherwise a failing compile prints a warning and the
package installs without that extension: everything then runs on the reference and Triton paths.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# No contraction: the compiler fuses no a * b + c, so what is written apart rounds apart in every instruction set. Where registers have
# another width, or an instruction set another instruction, sums differ in their last bits all the same.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own _mm512_undefined_ps
ISA_FLAGS = {  # each set includes the one before
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cpp": AVX512,
    "_amx.cpp": [*AVX512, "-mamx-tile", "-mamx-bf16"],  # GCC 11, clang 12
}
# Python's own flags ask for debug information, a third of the time. The rest is where the compiler works longest for nothing: bindings
# are templates of pybind11, and what is vectorised by hand is unrolled where its source says so.
LEVELS = {"bindings.cpp": ["-O1"], "attention_portable.cpp": ["-O2"], "attention_backward_portable.cpp": ["-O2"]}
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads", "2", "-Xcompiler=-fPIC,-fvisibility=hidden", "--cudart=static"]
NVCC_FLAGS += ["-gencode", "arch=compute_80,code=[sm_80,compute_80]"]
NVCC_FLAGS += ["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_90,code=compute_90"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's clang has none: one thread there


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_choice() -> str:
    choice = os.environ.get("LLAVA_FAST_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"LLAVA_FAST_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "1" and find_nvcc() is None:
        raise SystemExit("LLAVA_FAST_CUDA=1 but there is no nvcc on PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin")
    return choice


def extensions() -> list[Extension]:
    choice = cuda_choice()
    headers = glob("csrc/**/*.h", recursive=True)
    found = [
        Extension(
            "llava_fast._cpu",
            ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=headers,
            include_dirs=[pybind11.get_include(), "csrc"],
            extra_compile_args=CXX_FLAGS + OPENMP,
            extra_link_args=OPENMP,
            language="c++",
            optional=True,
        )
    ]
    if choice != "0" and find_nvcc():
        sources = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
        found.append(Extension("llava_fast._cuda", sources, depends=headers, language="c++", optional=choice != "1"))
    return found


class BuildExtensions(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._cuda"):
            self._build_cuda(ext)
            return
        level = self.level()
        left_out = tuple(ISA_FLAGS)[level:]
        ext.sources = [source for source in ext.sources if not source.endswith(left_out)]
        ext.extra_compile_args = [*ext.extra_compile_args, f"-DLLAVA_FAST_LEVEL={level}"]

        def compiled(source: str) -> str:
            (built,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if self.force or newer_group([source, *ext.depends, __file__], built):
                flags = [flag for suffix, special in {**ISA_FLAGS, **LEVELS}.items() if source.endswith(suffix) for flag in special]
                arguments = {"output_dir": self.build_temp, "include_dirs": ext.include_dirs}
                self.compiler.compile([source], extra_postargs=ext.extra_compile_args + flags, **arguments)
            return built

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # setuptools would compile one file after the other, and all of them
            ext.extra_objects = list(pool.map(compiled, ext.sources))
        ext.sources, ext.depends = [], [*ext.depends, *ext.extra_objects]
        super().build_extension(ext)

    def level(self) -> int:
        """How many of ISA_FLAGS the compiler takes. None where any of its targets is not x86-64: a universal2 build has two."""
        with TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text("#ifndef __x86_64__\n#error this target is not x86-64\n#endif\n")
            for level, (suffix, flags) in enumerate(ISA_FLAGS.items()):
                try:
                    self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
                except CompileError:
                    print(f"csrc/cpu/*{suffix} and beyond are left out: the compiler does not take their flags for its target", flush=True)
                    return level
        return len(ISA_FLAGS)

    def _build_cuda(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(file).stat().st_mtime for file in [*ext.sources, *ext.depends, __file__])
        if target.exists() and target.stat().st_mtime > newest and not self.force:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), *self.include_dirs, "csrc"]
        command = [find_nvcc(), *NVCC_FLAGS, "-shared", *[f"-I{path}" for path in includes], *ext.sources, "-o", str(target)]
        print(" ".join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            raise CompileError(f"nvcc could not build {ext.name}: {error}") from error


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})
