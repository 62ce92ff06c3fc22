"""What is shipped: the sdist, the wheel built from it, an install without a compiler, and the C++ under sanitizers."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution
from setuptools.command.build_ext import customize_compiler, new_compiler

ROOT = Path(__file__).parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
NATIVE = ("_cpu.cpython", "_cuda.cpython")
CHECK = """
import sys, torch, llava_fast, llava_fast.kernels
from llava_fast.kernels import registry
from llava_fast.kernels.spatial_pool import spatial_pool
assert llava_fast.__file__.startswith(sys.prefix) and llava_fast.kernels.__file__.startswith(sys.prefix), llava_fast.__file__
out = spatial_pool(torch.arange(16.0).view(16, 1), torch.arange(16).view(1, 4, 4), (2, 2), "average")
assert out.flatten().tolist() == [2.5, 4.5, 10.5, 12.5], out
print(registry.resolve_name("spatial_pool", "cpu", torch.float32))
"""


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llava_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """Of this process, without what would show it this tree or choose for it."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LLAVA_FAST_CUDA", "LLAVA_FAST_KERNELS")}


def run(*command: str | Path, cwd: Path, **changed: str) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env={**environment(), **changed}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel) of a copy of the tree without what was built in it; the wheel is made from the sdist, CUDA where nvcc is."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "kernels", "llava_fast"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, tree)
    cuda = "1" if load_setup().find_nvcc() else "0"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=tree, LLAVA_FAST_CUDA=cuda)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def environment_with(package: Path, folder: Path, **changed: str) -> Path:
    """The Python of a new environment that has `package` installed and otherwise sees the packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (own,) = (folder / "lib").glob("python*/site-packages")
    # --system-site-packages would show those of the base interpreter. A path in a .pth file comes after the environment's own,
    # and the .pth files of that path (an editable install's) are not read.
    paths = [path for path in [*site.getsitepackages(), site.getusersitepackages()] if Path(path).exists()]
    (own / "parent.pth").write_text("\n".join(paths) + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-build-isolation", package]
    run(*install, cwd=folder, **changed)
    return python


def package_files() -> set[str]:
    """Python files of the package and its data, those behind the link included, as they are named in an archive."""
    names = {str("llava_fast" / path.relative_to(ROOT / "llava_fast")) for path in (ROOT / "llava_fast").rglob("*.py")}
    names |= {str("llava_fast/kernels" / path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    return names | {"llava_fast/py.typed", "llava_fast/kernels/tuned.json"}


@pytest.mark.slow
def test_archives_hold_the_package(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    expected = package_files() | {"LICENSE", "setup.py", "pyproject.toml"}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert expected <= set(members)
    assert all(members[name].isfile() for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert package_files() <= names
    assert {name.partition("/")[0] for name in names} == {"llava_fast", "llava_fast-0.1.0.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    native = [name for name in names if name.endswith(".so")]
    assert len(native) == 2 if load_setup().find_nvcc() else len(native) == 1


@pytest.mark.slow
def test_wheel_runs(built: tuple[Path, Path], tmp_path: Path) -> None:
    python = environment_with(built[1], tmp_path / "environment")
    assert run(python, "-c", CHECK, cwd=tmp_path).split() == ["cpu"]
    assert (python.parent / "llava-fast").exists()
    if load_setup().find_nvcc():  # the CUDA module is importable with no driver
        run(python, "-c", "from llava_fast import _cuda; _cuda.spatial_pool_forward", cwd=tmp_path)


@pytest.mark.slow
def test_sdist_installs_without_a_compiler(built: tuple[Path, Path], tmp_path: Path) -> None:
    python = environment_with(built[0], tmp_path / "environment", CC="false", CXX="false", LLAVA_FAST_CUDA="0")
    assert run(python, "-c", CHECK, cwd=tmp_path).split() == ["reference"]
    asked = subprocess.run(
        [python, "-c", CHECK], cwd=tmp_path, env={**environment(), "LLAVA_FAST_KERNELS": "spatial_pool=cpu"}, capture_output=True
    )
    assert asked.returncode == 1 and b"llava_fast._cpu does not import" in asked.stderr


def test_cuda_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    monkeypatch.delenv("LLAVA_FAST_CUDA", raising=False)
    assert [extension.name for extension in setup.extensions()] == ["llava_fast._cpu"]
    monkeypatch.setenv("LLAVA_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="there is no nvcc"):
        setup.extensions()
    monkeypatch.setattr(setup, "find_nvcc", lambda: "nvcc")
    cpu, cuda = setup.extensions()
    assert cpu.optional and not cuda.optional
    monkeypatch.setenv("LLAVA_FAST_CUDA", "")
    assert setup.extensions()[1].optional
    monkeypatch.setenv("LLAVA_FAST_CUDA", "0")
    assert len(setup.extensions()) == 1
    monkeypatch.setenv("LLAVA_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        setup.extensions()


@pytest.mark.parametrize(
    ("case", "level"), [("-)", 3), ("*-mamx*) exit 1", 2), ("*-mavx512*) exit 1", 1), ('*) set -- -U__x86_64__ "$@"', 0), ("*) exit 1", 0)]
)
def test_instruction_sets_by_compiler(case: str, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler lacks, or cannot do for all of its targets, is left out, and nothing else."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {case};; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("CXX", str(compiler))
    command = load_setup().BuildExtensions(Distribution())
    command.compiler = new_compiler()
    customize_compiler(command.compiler)
    assert command.level() == (level if X86 else 0)


COMPILE = ["g++", "-std=c++17", "-O1", "-g", "-fopenmp", "-ffp-contract=off", f"-DLLAVA_FAST_LEVEL={3 if X86 else 0}"]
COMPILE += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The CPU kernels without their bindings, as objects."""
    folder = tmp_path_factory.mktemp("sanitized")
    flags = load_setup().ISA_FLAGS if X86 else {}
    objects = []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        special = [found for suffix, found in flags.items() if source.name.endswith(suffix)]
        if not source.name.endswith("_bindings.cpp") and (special or not source.name.endswith(("_avx2.cpp", "_avx512.cpp", "_amx.cpp"))):
            objects.append(folder / f"{source.stem}.o")
            run(*COMPILE, *(special[0] if special else []), "-c", source, "-o", objects[-1], cwd=folder)
    return objects


@pytest.mark.slow
@pytest.mark.parametrize("driver", sorted((ROOT / "csrc" / "tests").glob("*_test.cpp")), ids=lambda path: path.stem)
def test_cpp_under_sanitizers(driver: Path, sanitized: list[Path], tmp_path: Path) -> None:
    run(*COMPILE, driver, *sanitized, "-o", tmp_path / "driver", cwd=tmp_path)
    lines = run(tmp_path / "driver", cwd=tmp_path, LLAVA_FAST_ISA="").splitlines()
    assert "portable ok" in lines and lines[-1] == "bounds ok"
