"""``specblockd train``: conversations by the target, then offline training, resumable at every point."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from specblock.daemon.collect import CollectSettings, Prompt, read_prompts
from specblock.daemon.models import load_target, serving_dtype
from specblock.daemon.train_curve import CurvePoint, append_point, plot_curve, read_points
from specblock.daemon.train_data import generate_shards
from specblock.drafter.checkpoint import load_drafter, save_drafter
from specblock.drafter.config import KINDS, DraftSettings
from specblock.drafter.dataset import load_windows
from specblock.drafter.initialise import config_for_target, frequent_tokens, initialise_from_target
from specblock.drafter.kinds import loss_settings, new_network, training_blocks
from specblock.drafter.network import DraftNetwork
from specblock.drafter.precision import NumberFormat, number_format
from specblock.drafter.train import TrainRun, TrainSettings, heldout_acceptance, train_to_deadline
from specblock.drafter.window import Window
from specblock.verifier.model import TargetModel

_HELDOUT_TOKENS = 64


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="specblockd train", description=__doc__)
    made.add_argument("--target", required=True, help="target model: directory or hub id")
    made.add_argument("--prompts", required=True, nargs="+", type=Path, help="JSON lines with domain and prompt")
    made.add_argument("--heldout", nargs="+", type=Path, default=[], help="prompts for held-out acceptance")
    made.add_argument("--out", required=True, type=Path, help="directory of the finished drafter")
    made.add_argument("--work", required=True, type=Path, help="directory of data and checkpoints; resumes from it")
    made.add_argument("--data", type=Path, help="directory of the conversations, to share them (default: WORK)")
    made.add_argument("--kind", choices=list(KINDS), default="specblock", help="drafter family")
    made.add_argument("--start", type=Path, help="directory of a drafter to go on from (default: new weights)")
    made.add_argument(
        "--pairs-only",
        action="store_true",
        help="count token pairs for the drafter of --start and train nothing; weights are stored as bfloat16",
    )
    made.add_argument("--minutes", type=float, default=60.0, help="time limit of the training loop")
    made.add_argument("--steps", type=int, default=2000, help="optimiser steps over which the rate decays")
    made.add_argument("--learning-rate", type=float, default=8e-4)
    made.add_argument("--matrix-rate", type=float, default=0.02, help="Muon's rate for hidden matrices; 0: AdamW")
    made.add_argument("--batch-windows", type=int, default=8, help="conversations per step")
    made.add_argument("--blocks", type=int, default=3, help="blocks per step (specblock)")
    made.add_argument(
        "--later-share", type=float, default=0.25, help="share of positions that blocks after the first train on"
    )
    made.add_argument("--tokens", type=int, default=96, help="tokens generated per prompt")
    made.add_argument(
        "--temperatures", type=float, nargs="+", default=[1.0, 1.0, 1.0, 0.7, 0.3], help="drawn with equal weight"
    )
    made.add_argument("--rounds", type=int, default=1, help="answers per prompt, each with other random numbers")
    made.add_argument("--most-prompts", type=int, default=0, help="use this many prompts at most (0: all)")
    made.add_argument("--draft-vocab", type=int, default=0, help="size of the draft vocabulary (0: the target's)")
    made.add_argument("--prefix", choices=["argmax", "acceptance"], default="acceptance", help="see LossSettings")
    made.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="number format of the target; auto: the faster",
    )
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seed", type=int, default=1)
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parser().parse_args(list(argv))
    if options.start and options.draft_vocab:
        raise SystemExit("--start: the drafter there has its vocabulary already; leave --draft-vocab out")
    if options.pairs_only and not options.start:
        raise SystemExit("--pairs-only: name a drafter with --start, whose pairs are to be counted")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    name = serving_dtype(options.dtype, options.device)
    numbers = number_format(name, options.device)
    _say(f"target in {name}")
    target = load_target(options.target, numbers, options.device)
    train, heldout = _conversations(target, options)
    train = _near(train, options.device)
    model = _started(options.start, target, options.kind) if options.start else _new(target, train, options)
    if options.pairs_only:
        return _count_pairs(model, train, heldout, options, numbers)
    settings = TrainSettings(
        steps=options.steps,
        learning_rate=options.learning_rate,
        matrix_rate=options.matrix_rate,
        batch_windows=options.batch_windows,
        blocks=training_blocks(options.kind, options.blocks),
        warmup_steps=max(1, options.steps // 20),
        loss=loss_settings(options.kind, options.prefix, options.later_share),
        seed=options.seed,
    )
    run = TrainRun(model.to(options.device), settings)
    if run.resume(options.work / "run"):
        _say(f"resumed at step {run.done}")
    begin, curve = time.monotonic(), options.work / "heldout.jsonl"

    def evaluate() -> dict[str, float]:
        found = heldout_acceptance(model, heldout, DraftSettings(), numbers) if heldout else {}
        append_point(curve, CurvePoint(step=run.done, positions=run.positions, acceptance_length=found))
        return found

    deadline = begin + 60 * options.minutes
    train_to_deadline(run, train, options.work / "run", deadline, _say, evaluate=evaluate)
    if model.has_chains:
        model.token_pairs.count(train)
    save_drafter(model, options.out)
    facts = {
        "steps": run.done,
        "positions": run.positions,
        "training_s": round(time.monotonic() - begin, 1),
        "heldout_acceptance_length": {d: round(a, 3) for d, a in evaluate().items()},
    }
    if heldout:
        plot_curve(read_points(curve), options.out / "training.svg", f"{options.kind}, {run.done} steps")
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    _say(json.dumps(facts))
    return 0


def _count_pairs(
    model: DraftNetwork, train: list[Window], heldout: list[Window], options: argparse.Namespace, numbers: NumberFormat
) -> int:
    """Counts token pairs of the conversations for a drafter, and says what it accepts before and after."""
    if not model.has_chains:
        raise SystemExit(f"--pairs-only: a drafter of kind {model.config.kind} predicts no slot behind another")
    settings = DraftSettings()
    before = heldout_acceptance(model, heldout, replace(settings, pair_weight=0.0), numbers) if heldout else {}
    model.token_pairs.count(train)
    save_drafter(model, options.out)
    after = heldout_acceptance(model, heldout, settings, numbers) if heldout else {}
    for domain, accepted in after.items():
        _say(f"{domain}: acceptance length {before[domain]:.3f} without pairs, {accepted:.3f} with them")
    _say(f"{len(train)} conversations counted, {int(model.token_pairs.starts[-1])} pairs kept")
    return 0


def _new(target: TargetModel, train: list[Window], options: argparse.Namespace) -> DraftNetwork:
    vocab = options.draft_vocab or target.vocab_size
    config = config_for_target(target.config, target.fingerprint, target.feature_layers, vocab, options.kind)
    model = new_network(config, target.embedding.float().cpu())
    if vocab < target.vocab_size:
        model.set_vocabulary(frequent_tokens(train, target.vocab_size, vocab))
    initialise_from_target(model, target.output_head.cpu(), target.final_norm.cpu())
    return model


def _started(directory: Path, target: TargetModel, kind: str) -> DraftNetwork:
    embedding, layers = target.embedding.float().cpu(), target.feature_layers
    try:
        model = load_drafter(
            directory,
            embedding,
            dtype=torch.float32,
            target_fingerprint=target.fingerprint,
            feature_layers=layers,
        )
    except ValueError as error:
        raise SystemExit(f"--start: {error}") from None
    if model.config.kind != kind:
        raise SystemExit(f"--start: {directory} is a drafter of kind {model.config.kind}, not {kind}")
    return model


def _conversations(target: TargetModel, options: argparse.Namespace) -> tuple[list[Window], list[Window]]:
    prompts: list[Prompt] = [p for path in options.prompts for p in read_prompts(path)]
    if options.most_prompts:
        prompts = prompts[:: max(1, len(prompts) // options.most_prompts)][: options.most_prompts]
    prompts = prompts * options.rounds
    settings = CollectSettings(
        max_tokens=options.tokens, temperatures=tuple(options.temperatures), slots=64, seed=options.seed
    )
    data = options.data or options.work
    shards = generate_shards(target, prompts, data / "train", settings, _say)
    held = heldout_windows(target, options.heldout, data, options.seed)
    return [w for shard in shards for w in load_windows(shard)], held


def heldout_windows(target: TargetModel, prompts: Sequence[Path], data: Path, seed: int) -> list[Window]:
    """Conversations to judge drafters by, up to 48 of each file of ``prompts``; made once and kept under ``data``."""
    held: list[Window] = []
    for path in prompts:
        own = CollectSettings(max_tokens=_HELDOUT_TOKENS, slots=48, seed=seed + 1, heldout=True)
        made = generate_shards(target, read_prompts(path)[:48], data / f"heldout-{path.stem}", own, _say)
        held.extend(w for shard in made for w in load_windows(shard))
    return held


def _near(windows: list[Window], device: str) -> list[Window]:
    """The windows on a GPU if half of its free memory holds them: copying a batch there takes as long as its step."""
    if not device.startswith("cuda") or sum(w.num_bytes for w in windows) > torch.cuda.mem_get_info(device)[0] // 2:
        return windows
    return [w.to(device) for w in windows]


def _say(line: str) -> None:
    print(line, flush=True)
