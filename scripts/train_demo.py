#!/usr/bin/env python3
"""Data for the demo drafters, made on a GPU in a minute or two; ``specblockd train --data`` goes on from there.

    train_demo.py answers --target DIR --prompts FILE... --rounds 6 --out answers.npz   what the target says
    train_demo.py windows --target DIR --answers answers.npz --out DATA/train           shards that training reads
    train_demo.py score --target DIR --drafter DIR --prompts FILE... --out WORK         held-out acceptance, on the CPU

The same kind of conversations as ``specblockd train`` makes with the serving engine, through transformers' own batched
generation: on a GPU a small model costs little more for 1,024 requests than for one. Needs torch, transformers, numpy
and safetensors; nothing has to be installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_common import import_from_checkout

TEMPERATURES, TOP_P, TOP_K = (1.0, 1.0, 1.0, 0.7, 0.3), 0.95, 32
BATCH, SHARD = 1024, 128


def open_target(path: str, device: str) -> tuple[Any, Any]:
    """Model in float32, which is what the CPU serves, and tokenizer padding on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def answers(options: argparse.Namespace) -> None:
    """Answers every prompt once per round at a drawn temperature."""
    from specblock.daemon.collect import read_prompts

    torch.manual_seed(options.seed)
    model, tokenizer = open_target(options.target, options.device)
    prompts = [p for path in options.prompts for p in read_prompts(path)]
    draw = Random(options.seed)
    temperature = options.temperatures
    jobs = [(p, draw.choice(temperature)) for _ in range(options.rounds) for p in prompts]
    # Like lengths together, so that little is padded.
    jobs.sort(key=lambda job: (job[1], len(job[0].text)))
    tokens, facts, begin = [], [], time.perf_counter()
    for kind in sorted(set(temperature)):
        alike = [prompt for prompt, t in jobs if t == kind]
        for start in range(0, len(alike), BATCH):
            chunk = alike[start : start + BATCH]
            given = tokenizer([p.text for p in chunk], return_tensors="pt", padding=True).to(options.device)
            given.pop("token_type_ids", None)
            said = model.generate(
                **given,
                max_new_tokens=options.tokens,
                do_sample=True,
                temperature=kind,
                top_p=TOP_P,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            ).cpu()
            width = given["input_ids"].shape[1]
            lengths = given["attention_mask"].sum(dim=1).tolist()
            for prompt, row, length in zip(chunk, said, lengths, strict=True):
                ended = (row[width:] == tokenizer.eos_token_id).nonzero()
                count = int(ended[0]) + 1 if len(ended) else row.shape[0] - width
                tokens.append(row[width - length : width + count].numpy().astype(np.int32))
                facts.append((prompt.domain, length, length + count, kind))
    generated = sum(total - length for _, length, total, _ in facts)
    seconds = time.perf_counter() - begin
    print(f"{len(facts)} conversations, {generated} tokens, {generated / seconds:.0f}/s", flush=True)
    np.savez_compressed(options.out, tokens=np.concatenate(tokens), facts=json.dumps(facts))


@torch.inference_mode()
def windows(options: argparse.Namespace) -> None:
    """Features and the target's laws of recorded answers, in shards of shuffled conversations."""
    from specblock.drafter.dataset import save_windows

    model, _ = open_target(options.target, options.device)
    rows = [row for path in options.answers for row in read_answers(path)]
    Random(options.seed).shuffle(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    part, parts = options.part
    for number, start in list(enumerate(range(0, len(rows), SHARD)))[part::parts]:
        made = label(model, rows[start : start + SHARD], start, options.device, options.heldout)
        save_windows(options.out / f"shard-{number:04d}.safetensors", [window.to("cpu") for window in made])
    print(f"{len(rows)} conversations in {time.perf_counter() - begin:.0f} s", flush=True)


def read_answers(path: Path) -> Iterator[tuple[str, int, float, np.ndarray[Any, Any]]]:
    """Domain, prompt tokens, temperature and tokens of every conversation."""
    with np.load(path) as stored:
        tokens, at = stored["tokens"], 0
        for domain, length, total, temperature in json.loads(str(stored["facts"])):
            yield domain, length, temperature, tokens[at : at + total]
            at += total


def label(model: Any, rows: Sequence[Any], first: int, device: str, heldout: bool) -> list[Any]:
    """Windows of some conversations by one forward, on the device; prompts are labelled too unless held out."""
    from specblock.cuda_ext.sampling import SamplingParams
    from specblock.drafter.window import Window
    from specblock.verifier.model import default_feature_layers
    from specblock.verifier.result import topk_log_probs

    longest = max(len(tokens) for *_, tokens in rows)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, (*_, tokens) in enumerate(rows):
        padded[i, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    # Padding stands behind every token and so is seen by none.
    output = model.model(input_ids=padded.to(device), use_cache=False, output_hidden_states=True)
    layers = default_feature_layers(model.config.num_hidden_layers)
    features = torch.cat([output.hidden_states[layer + 1] for layer in layers], dim=-1).to(torch.bfloat16)
    top = topk_log_probs(model.lm_head(output.last_hidden_state), TOP_K)
    ids, log_probs = top.ids, top.log_probs.to(torch.float16)
    padded = padded.to(torch.int32).to(device)
    made = []
    for i, (domain, length, temperature, tokens) in enumerate(rows):
        total, prompt = len(tokens), length if heldout else 1
        made.append(
            Window(
                conversation_id=f"{domain}-{first + i}",
                domain=domain,
                time_s=0.0,
                drafter_version="",
                heldout=heldout,
                tokens=padded[i, :total].clone(),
                prompt_tokens=prompt,
                features=features[i, : total - 1].clone(),
                top_ids=ids[i, prompt - 1 : total - 1].clone(),
                top_log_probs=log_probs[i, prompt - 1 : total - 1].clone(),
                sampling=SamplingParams(temperature=temperature, top_p=TOP_P),
            )
        )
    return made


def score(options: argparse.Namespace) -> None:
    """Held-out acceptance per kind of text as ``specblockd train --heldout`` prints it, of any finished drafter."""
    from specblock.daemon.models import load_network, load_target
    from specblock.daemon.train_command import heldout_windows
    from specblock.drafter.config import DraftSettings
    from specblock.drafter.precision import NumberFormat
    from specblock.drafter.train import heldout_acceptance

    target = load_target(options.target, NumberFormat(torch.float32), "cpu")
    held = heldout_windows(target, options.prompts, options.out, options.seed)
    model = load_network(target, options.drafter)
    found = heldout_acceptance(model, held, DraftSettings(), NumberFormat(torch.float32))
    print(options.drafter, json.dumps({domain: round(length, 3) for domain, length in found.items()}), flush=True)


def main() -> int:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["answers", "windows", "score"])
    parser.add_argument("--target", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=1, help="answers per prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per answer")
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--answers", nargs="+", type=Path)
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth shard from I on"
    )
    parser.add_argument("--heldout", action="store_true", help="label the answers only")
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import_from_checkout()
    {"answers": answers, "windows": windows, "score": score}[options.stage](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
