"""Maps the fixed top-level folders to the import package ``specblock``, and builds the native operations.

Plain top-level ``bandit`` and ``daemon`` would clobber two packages of those names
(the security linter and python-daemon), so the folders install as ``specblock.bandit`` and so on.
The list is computed because a static one forgets new subpackages in wheels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

ROOTS = ("bandit", "cuda_ext", "daemon", "drafter", "verifier")
PACKAGES = {
    f"specblock.{name}": name.replace(".", "/")
    for root in ROOTS
    for name in [root, *(f"{root}.{sub}" for sub in find_packages(root))]
}
CSRC = Path("cuda_ext/csrc")
# Machine code for the two generations in use, and PTX that a driver compiles for later ones.
CUDA_TARGETS = [
    f"-gencode=arch={arch},code={code}"
    for arch, code in (("compute_80", "sm_80"), ("compute_90", "sm_90"), ("compute_90", "compute_90"))
]


def find_cuda() -> tuple[Path, Path] | None:
    """The CUDA compiler and the folder of its static runtime; None where there is no complete toolkit."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parents[1], "/usr/local/cuda"]
    for home in (Path(home) for home in homes if home):
        nvcc = home / "bin" / "nvcc"
        for folder in ("lib64", "lib", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"):
            if nvcc.exists() and (home / folder / "libcudart_static.a").exists():
                return nvcc, home / folder
    return None


def nvcc_command(nvcc: Path, source: Path, target: Path, *more: str) -> list[str]:
    """How one .cu becomes an object. These files see no torch header."""
    flags = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", *CUDA_TARGETS, *more]
    return [str(nvcc), "-c", *flags, "-o", str(target), str(source)]


def cuda_sources() -> list[Path]:
    """Every kernel file; their bindings are the csrc/ops_cuda_*.cpp."""
    return sorted((CSRC / "cuda").glob("*.cu"))


class BuildNative(build_ext):
    """Compiles the kernels first where there is a CUDA compiler; without them the library serves the CPU alone."""

    def build_extension(self, ext: Extension) -> None:
        """Adds the kernels to the extension, then builds it; a failure of theirs is no failure of its."""
        without = (ext.extra_objects, ext.define_macros, ext.library_dirs, ext.libraries, ext.extra_link_args)
        try:
            self._add_kernels(ext)
            super().build_extension(ext)
            return
        except (OSError, subprocess.CalledProcessError, CompileError, LinkError) as error:
            if ext.extra_objects is without[0] and not isinstance(error, (OSError, subprocess.CalledProcessError)):
                raise  # nothing was added that could be left out
            print(f"specblock: the CUDA kernels could not be built ({error}): native operations serve the CPU alone")
        ext.extra_objects, ext.define_macros, ext.library_dirs, ext.libraries, ext.extra_link_args = without
        super().build_extension(ext)

    def _add_kernels(self, ext: Extension) -> None:
        cuda, sources = find_cuda(), cuda_sources()
        if cuda is None or not sources:
            print("specblock: no CUDA compiler found: native operations serve the CPU alone")
            return
        nvcc, libraries = cuda
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = list(self._compiled(nvcc, sources, folder))
        ext.extra_objects = [*ext.extra_objects, *objects]
        ext.define_macros = [*ext.define_macros, ("SPECBLOCK_CUDA", "1")]
        ext.library_dirs = [*ext.library_dirs, str(libraries)]
        ext.libraries = [*ext.libraries, "cudart_static", "dl", "rt", "pthread"]
        # Its own copy of the CUDA runtime, private to it: torch has another. libtorch brings the CUDA half of torch,
        # where there is one, into the reach of the library's weak symbols.
        ext.extra_link_args = [*ext.extra_link_args, "-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"]

    @staticmethod
    def _compiled(nvcc: Path, sources: list[Path], folder: Path) -> Iterator[str]:
        for source in sources:
            target = folder / f"{source.stem}.o"
            command = nvcc_command(nvcc, source, target)
            print(" ".join(command))
            subprocess.run(command, check=True)
            yield str(target)


def native_library() -> list[Extension]:
    """The native operations, through PyTorch's stable interface. Without torch or a compiler the references serve.

    The result is loaded by ``torch.ops.load_library``, not imported, but an extension is what installers build.
    """
    try:
        import torch
    except ImportError:
        print("specblock: no torch at build time, native operations are left out")
        return []
    root = Path(torch.__file__).parent
    headers = [path for folder in (CSRC, CSRC / "cuda") for kind in ("*.h", "*.cuh") for path in folder.glob(kind)]
    return [
        Extension(
            "specblock.cuda_ext._C",
            sources=sorted(str(path) for path in CSRC.glob("*.cpp")),
            depends=sorted(str(path) for path in [*headers, *cuda_sources()]),
            include_dirs=[str(root / "include")],
            library_dirs=[str(root / "lib")],
            libraries=["torch_cpu", "c10"],
            # 2.10 is the oldest torch whose stable interface has everything used here.
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", "-Wno-psabi", "-g0"],
            language="c++",
            py_limited_api=True,
            optional=True,  # a failed build is a warning
        )
    ]


if __name__ == "__main__":
    setup(
        packages=list(PACKAGES),
        package_dir=PACKAGES,
        ext_modules=native_library(),
        cmdclass={"build_ext": BuildNative},
    )
