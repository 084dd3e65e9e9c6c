"""The kernels compile for every target without a warning and keep what they work on in registers."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("specblock_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # setup.py names everything from there
        spec.loader.exec_module(module)
        yield module


def spills(report: str) -> dict[tuple[str, str], int]:
    """(kernel, target) -> bytes of stack and spills, from what ptxas -v says."""
    return {
        (m["name"], m["arch"]): sum(int(m[k]) for k in ("stack", "stores", "loads")) for m in RESOURCES.finditer(report)
    }


def test_kernels_compile_for_both_generations_without_spills(build: ModuleType, tmp_path: Path) -> None:
    cuda = build.find_cuda()
    if cuda is None:
        pytest.skip("no CUDA compiler")
    found: dict[tuple[str, str], int] = {}
    for source in build.cuda_sources():
        command = build.nvcc_command(
            cuda[0], source, tmp_path / f"{source.stem}.o", "-Xptxas", "-v", "-Werror", "all-warnings"
        )
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        found |= spills(result.stderr)
    assert {arch for _, arch in found} == {"sm_80", "sm_90"}
    assert {kernel: size for kernel, size in found.items() if size} == {}


def test_the_report_is_understood() -> None:
    line = (
        "ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kPf\n"
        "    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads\n"
    )
    assert spills(line) == {("_Z1kPf", "sm_90"): 14}


def test_an_incomplete_toolkit_is_none(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = build.find_cuda()
    assert found is None or not found[0].is_relative_to(tmp_path)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    assert build.find_cuda() == (tmp_path / "bin" / "nvcc", tmp_path / "lib64")
