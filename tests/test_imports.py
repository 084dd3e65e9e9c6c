"""The layers of the tree, enforced by reading import statements."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bandit", "cuda_ext", "daemon", "drafter", "verifier")
MODELS = {"torch", "numpy", "safetensors", "transformers"}
# What each package may import besides itself and the standard library; daemon may import anything.
MAY_IMPORT = {
    "cuda_ext": {"torch"},
    "drafter": MODELS | {"specblock.cuda_ext"},
    "verifier": MODELS | {"specblock.cuda_ext"},
    "bandit": {"numpy"},
}
REDIS_FILE = Path("bandit/stream.py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything a file imports, at any depth; own packages as ``specblock.<package>``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "specblock" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield node.lineno, ".".join(parts[:2]) if parts[0] == "specblock" else parts[0]


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package}/ holds no Python file"
    return found


def violations(package: str, path: Path) -> list[str]:
    allowed = MAY_IMPORT.get(package)
    relative = path.relative_to(ROOT)
    wrong = []
    for line, name in imports(path):
        known = name in sys.stdlib_module_names or name == f"specblock.{package}"
        permitted = (allowed is None or known or name in allowed) and name not in PACKAGES
        if name == "redis":
            permitted = relative == REDIS_FILE
        if not permitted:
            wrong.append(f"{relative}:{line}: {package} must not import {name}")
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_their_layer_allows(package: str) -> None:
    assert [line for path in files(package) for line in violations(package, path)] == []


def test_the_rules_catch_violations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    cases = {
        "cuda_ext": "import numpy",
        "drafter": "from specblock.verifier.model import TargetModel",
        "verifier": "from specblock import drafter",
        "bandit": "def f():\n    import torch",
        "daemon": "import redis.asyncio",
    }
    for package, text in cases.items():
        path = tmp_path / package / "stream.py"
        path.parent.mkdir()
        path.write_text(text)
        assert len(violations(package, path)) == 1, package
    (tmp_path / "bandit" / "stream.py").write_text("import redis\nimport numpy as np\nimport json\n")
    assert violations("bandit", tmp_path / "bandit" / "stream.py") == []
    for package in ("bandit", "cuda_ext", "drafter", "verifier"):
        path = tmp_path / package / "other.py"
        path.write_text("import ray\nfrom specblock.daemon.errors import ExitCode\nimport redis\nimport daemon\n")
        assert len(violations(package, path)) == 4
