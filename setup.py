"""Maps the fixed top-level folders to the import package ``specblock``.

Plain top-level ``bandit`` and ``daemon`` would clobber two packages of those names
(the security linter and python-daemon), so the folders install as ``specblock.bandit`` and so on.
The list is computed because a static one forgets new subpackages in wheels.
"""

from setuptools import find_packages, setup

ROOTS = ("bandit", "cuda_ext", "daemon", "drafter", "verifier")
PACKAGES = {
    f"specblock.{name}": name.replace(".", "/")
    for root in ROOTS
    for name in [root, *(f"{root}.{sub}" for sub in find_packages(root))]
}

setup(packages=list(PACKAGES), package_dir=PACKAGES)
