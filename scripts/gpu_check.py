#!/usr/bin/env python3
"""Tests and measurements on a GPU: prints a table, writes JSON. Needs torch, transformers, numpy, safetensors, pytest.

Nothing has to be installed: the packages are imported from this checkout, without Ray, Redis or pydantic.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("ray", "redis", "pydantic", "fastapi", "typer", "uvicorn")
NEW_TOKENS, TEMPERATURE, TOP_P = 64, 1.0, 0.95
ROWS = (1, 8, 16, 32, 64)


def import_from_checkout() -> None:
    """Makes ``specblock.*`` importable from the top-level folders."""
    package = types.ModuleType("specblock")
    package.__path__ = [str(ROOT)]
    sys.modules["specblock"] = package
    sys.path.insert(0, str(ROOT))


def run_tests(device: str) -> bool:
    """The tests of tests/gpu for ``device``."""
    import pytest

    chosen = [
        "-m",
        "gpu" if device == "cuda" else "not gpu",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        "-q",
    ]
    return pytest.main([str(ROOT / "tests" / "gpu"), *chosen]) == 0


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
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), quarters[2] - quarters[0]


def measure(device: str, num_prompts: int) -> list[dict[str, Any]]:
    """Forward times of target and drafter, and decoding speed of the demo models in bfloat16."""
    import torch

    from specblock.cuda_ext.sampling import SamplingParams
    from specblock.daemon.collect import read_prompts
    from specblock.daemon.engine import Engine, EngineSettings
    from specblock.daemon.messages import GenerationRequest
    from specblock.drafter.checkpoint import load_drafter
    from specblock.drafter.config import DraftSettings
    from specblock.drafter.draft import NewPositions, SpecBlockDrafter
    from specblock.verifier.model import TargetModel

    target = TargetModel.load(str(ROOT / "models" / "demo-target"), dtype=torch.bfloat16, device=device)
    network = load_drafter(
        ROOT / "models" / "demo-drafter",
        target.embedding,
        dtype=torch.bfloat16,
        device=device,
        target_fingerprint=target.fingerprint,
        feature_layers=target.feature_layers,
    ).eval()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        cache = target.new_cache(1, 512)
        slot = cache.allocate()
        target.forward(cache, [slot], torch.randint(0, 4096, (1, 128), device=device))
        cache.advance([slot], [128])
        for count in ROWS:
            tokens = torch.randint(0, 4096, (1, count), device=device)
            ms, spread = timed_ms(lambda tokens=tokens: target.forward(cache, [slot], tokens), device, 30)
            rows.append({"what": f"target forward, {count} rows", "ms": ms, "iqr_ms": spread})
        drafter = SpecBlockDrafter(network, DraftSettings())
        features = torch.randn(1, 2, target.feature_size, dtype=torch.bfloat16, device=device)
        pairs = NewPositions(features, torch.randint(0, 4096, (1, 2), device=device), [2])
        own = drafter.new_cache(1, 512)

        def refresh() -> None:
            own.reset(0)
            drafter.absorb(own, [0], pairs)

        ms, spread = timed_ms(refresh, device, 30)
        rows.append({"what": "drafter refresh, 2 positions", "ms": ms, "iqr_ms": spread})
    prompts = [p for kind in ("python", "cpp") for p in read_prompts(ROOT / f"models/demo-prompts/{kind}.jsonl")]
    chosen = prompts[:: max(1, len(prompts) // num_prompts)][:num_prompts]
    shapes = {"plain": None, "specblock 1 block, 7 nodes": (1, 7), "specblock 2 blocks, 31 nodes": (2, 31)}
    for name, shape in shapes.items():
        made = (
            None if shape is None else SpecBlockDrafter(network, DraftSettings(blocks=shape[0], node_budget=shape[1]))
        )
        speeds, cycles, tokens_out = [], 0, 0
        for index, prompt in enumerate([chosen[0], *chosen]):
            ids = tuple(target.tokenizer.encode(prompt.text, add_special_tokens=False))
            engine = Engine(
                target, made, EngineSettings(slots=1, capacity_tokens=len(ids) + NEW_TOKENS), time.perf_counter
            )
            engine.submit(
                GenerationRequest(
                    request_id="check",
                    prompt_tokens=ids,
                    sampling=SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, seed=index),
                    max_tokens=NEW_TOKENS,
                    ignore_eos=True,
                )
            )
            begin = time.perf_counter()
            stats = None
            while stats is None:
                stats = next((c.stats for c in engine.step() if c.stats is not None), None)
            if index:  # the first is warm-up
                speeds.append(NEW_TOKENS / (time.perf_counter() - begin))
                cycles, tokens_out = cycles + stats.cycles, tokens_out + stats.completion_tokens
        quarters = statistics.quantiles(speeds, n=4)
        rows.append(
            {
                "what": f"decoding, {name}",
                "tokens_per_s": statistics.median(speeds),
                "iqr_tokens_per_s": quarters[2] - quarters[0],
                "acceptance_length": tokens_out / cycles,
            }
        )
    return rows


def facts(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "new_tokens": NEW_TOKENS,
    }


def main() -> int:
    """Runs everything; 0 when the tests pass, 4 without a device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu-check.json")
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no CUDA device (torch.cuda.is_available() is False); --device cpu tries the script itself")
        return 4
    import_from_checkout()
    passed = run_tests(options.device)
    rows = measure(options.device, options.prompts)
    loaded = [name for name in HEAVY if name in sys.modules]
    result = {"facts": facts(options.device), "tests_passed": passed, "loaded_but_not_needed": loaded, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["facts"]))
    for row in rows:
        if "ms" in row:
            print(f"{row['what']:<42}{row['ms']:9.2f} ms   (interquartile range {row['iqr_ms']:.2f})")
        else:
            print(
                f"{row['what']:<42}{row['tokens_per_s']:9.1f} tokens/s (interquartile range "
                f"{row['iqr_tokens_per_s']:.1f}), acceptance length {row['acceptance_length']:.2f}"
            )
    print(f"tests {'passed' if passed else 'FAILED'}; {options.json}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
