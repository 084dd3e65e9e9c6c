"""Maps the fixed top-level folders to the import package ``specblock``.

Plain top-level ``bandit`` and ``daemon`` would clobber two packages of those names
(the security linter and python-daemon), so the folders install as ``specblock.bandit`` and so on.
The list is computed because a static one forgets new subpackages in wheels.
"""

from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOTS = ("bandit", "cuda_ext", "daemon", "drafter", "verifier")
PACKAGES = {
    f"specblock.{name}": name.replace(".", "/")
    for root in ROOTS
    for name in [root, *(f"{root}.{sub}" for sub in find_packages(root))]
}


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
    return [
        Extension(
            "specblock.cuda_ext._C",
            sources=sorted(str(path) for path in Path("cuda_ext/csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("cuda_ext/csrc").glob("*.h")),
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


setup(packages=list(PACKAGES), package_dir=PACKAGES, ext_modules=native_library())
