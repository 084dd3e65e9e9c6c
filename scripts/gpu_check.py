#!/usr/bin/env python3
"""Builds, tests and measures on a GPU: prints a table, writes JSON.

Needs torch, transformers, numpy, safetensors and pytest; nothing has to be installed: the packages are imported from
this checkout, without Ray, Redis or pydantic. Building needs setuptools, a C++ compiler, and nvcc for the CUDA kernels;
without them what was built before serves, or the references.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_common import ROOT, Row, device_is_missing, import_from_checkout, middle

if TYPE_CHECKING:
    from specblock.drafter.draft import BlockDrafter
    from specblock.drafter.model import SpecBlockModel
    from specblock.verifier.model import TargetModel

HEAVY = ("ray", "redis", "pydantic", "fastapi", "typer", "uvicorn")
NEW_TOKENS, TEMPERATURE, TOP_P = 64, 1.0, 0.95
ROWS = (1, 8, 16, 32, 64)


def run_tests(device: str) -> bool:
    """The tests of tests/gpu for ``device``."""
    import pytest

    marker = "gpu" if device == "cuda" else "not gpu"
    # Without pytest-timeout our settings have an unknown key, which must stay a warning.
    without_our_defaults = ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    without_our_defaults += ["--import-mode=importlib", "-q"]
    return pytest.main([str(ROOT / "tests" / "gpu"), "-m", marker, *without_our_defaults]) == 0


def timed_ms(action: Callable[[], Any], device: str, repeats: int) -> tuple[float, float]:
    """Median and interquartile range in ms."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for index in range(repeats + 3):
        wait()
        begin = time.perf_counter()
        action()
        wait()
        if index >= 3:  # warm-up
            times.append(1e3 * (time.perf_counter() - begin))
    return middle(times)


def forward_times(device: str, target: TargetModel, drafter: BlockDrafter) -> Iterator[Row]:
    """Forwards of the target over so many rows after 128 cached tokens, and one refresh of the drafter."""
    import torch

    from specblock.drafter.interface import NewPositions

    with torch.inference_mode():
        cache = target.new_cache(1, 512)
        slot = cache.allocate()
        target.forward(cache, [slot], torch.randint(0, target.vocab_size, (1, 128), device=device))
        cache.advance([slot], [128])
        for count in ROWS:
            tokens = torch.randint(0, target.vocab_size, (1, count), device=device)
            ms, spread = timed_ms(lambda tokens=tokens: target.forward(cache, [slot], tokens), device, 30)
            yield {"what": f"target forward, {count} rows", "ms": ms, "iqr_ms": spread}
        features = torch.randn(1, 2, target.feature_size, dtype=target.dtype, device=device)
        pairs = NewPositions(features, torch.randint(0, target.vocab_size, (1, 2), device=device), [2])
        own = drafter.new_cache(1, 512)

        def refresh() -> None:
            own.reset(0)
            drafter.refresh(own, [0], pairs)

        ms, spread = timed_ms(refresh, device, 30)
        yield {"what": "drafter refresh, 2 positions", "ms": ms, "iqr_ms": spread}


def decoding_speeds(target: TargetModel, network: SpecBlockModel, num_prompts: int) -> Iterator[Row]:
    """Tokens per second of the demo models, one request at a time, python and cpp prompts."""
    from specblock.cuda_ext.sampling import SamplingParams
    from specblock.daemon.collect import read_prompts
    from specblock.daemon.oneshot import complete
    from specblock.drafter.config import DraftSettings
    from specblock.drafter.draft import BlockDrafter

    prompts = [p for kind in ("python", "cpp") for p in read_prompts(ROOT / f"models/demo-prompts/{kind}.jsonl")]
    chosen = prompts[:: max(1, len(prompts) // num_prompts)][:num_prompts]
    for name, settings in {
        "plain": None,
        "specblock 1 block, 7 nodes": DraftSettings(blocks=1, node_budget=7),
        "specblock 2 blocks, 31 nodes": DraftSettings(blocks=2, node_budget=31),
    }.items():
        drafter = settings and BlockDrafter(network, settings)
        answers = [
            complete(
                target,
                drafter,
                prompt.text,
                SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, seed=seed),
                NEW_TOKENS,
                ignore_eos=True,
                collect=True,
            )
            for seed, prompt in enumerate([chosen[0], *chosen])
        ][1:]  # the first is warm-up
        speeds = [len(answer.tokens) / answer.seconds for answer in answers]
        median, spread = middle(speeds)
        yield {
            "what": f"decoding, {name}",
            "tokens_per_s": median,
            "iqr_tokens_per_s": spread,
            "acceptance_length": sum(len(a.tokens) for a in answers) / sum(a.stats.cycles for a in answers),
        }


def build() -> None:
    """The native operations, if their sources are newer than the library. Whatever fails, the references are there."""
    library = ROOT / "cuda_ext" / "_C.abi3.so"
    sources = [path for path in (ROOT / "cuda_ext" / "csrc").rglob("*") if path.is_file()]
    if library.exists() and library.stat().st_mtime >= max(path.stat().st_mtime for path in sources):
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    begin = time.time()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if not library.exists() or library.stat().st_mtime < begin:  # a failed build ends well, but builds nothing
        print("gpu-check: the native operations could not be built: what was there before, or references, are measured")


def measure(device: str, num_prompts: int) -> Iterator[Row]:
    """Forwards and decoding speed of the demo models in the faster format; on CUDA kernels and the 8B shape too."""
    from specblock.daemon.models import load_pair, serving_dtype
    from specblock.drafter.config import DraftSettings

    models = ROOT / "models"
    dtype = serving_dtype("auto", device)
    target, drafter = load_pair(str(models / "demo-target"), models / "demo-drafter", dtype, device, DraftSettings())
    assert drafter is not None
    yield from forward_times(device, target, drafter)
    yield from decoding_speeds(target, drafter.model, num_prompts)
    if device == "cuda":
        import gpu_8b
        import gpu_attention
        import gpu_cycle

        yield from gpu_attention.rows(device)
        yield from gpu_cycle.rows(device)
        yield from gpu_8b.rows(device)


def show(row: Row) -> str:
    """One line of the table."""
    if "ms" in row:
        over = f", {row['over_floor']:.2f} times what reading takes" if "over_floor" in row else ""
        return f"{row['what']:<58}{row['ms']:9.2f} ms   (interquartile range {row['iqr_ms']:.2f}){over}"
    if "tokens_per_s" not in row:
        others = ", ".join(f"{name} {value}" for name, value in row.items() if name != "what")
        return f"{row['what']:<58}{others}"
    return (
        f"{row['what']:<58}{row['tokens_per_s']:9.1f} tokens/s (interquartile range "
        f"{row['iqr_tokens_per_s']:.1f}), acceptance length {row['acceptance_length']:.2f}"
    )


def main() -> int:
    """Runs everything; 0 when the tests pass, 4 without a device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu-check.json")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    options = parser.parse_args()
    if device_is_missing(options.device, "gpu-check"):
        return 4
    build()
    import_from_checkout()
    from specblock.daemon.facts import facts
    from specblock.daemon.models import serving_dtype

    passed = None if options.no_tests else run_tests(options.device)
    dtype = serving_dtype("auto", options.device)
    stated = facts(options.device, dtype=dtype, temperature=TEMPERATURE, top_p=TOP_P, new_tokens=NEW_TOKENS)
    print(json.dumps(stated), flush=True)
    measured = []
    for row in measure(options.device, options.prompts):
        measured.append(row)
        print(show(row), flush=True)
    loaded = [name for name in HEAVY if name in sys.modules]
    result = {"tests_passed": passed, "loaded_but_not_needed": loaded, "facts": stated, "rows": measured}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    said = {None: "not run", True: "passed", False: "FAILED"}[passed]
    print(f"tests {said}; {options.json}")
    return 1 if passed is False else 0


if __name__ == "__main__":
    sys.exit(main())
