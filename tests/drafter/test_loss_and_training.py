"""The loss against a slow definition; training that resumes bit for bit; checkpoints that refuse misfits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specblock.drafter.checkpoint import load_drafter, load_weights, save_drafter
from specblock.drafter.config import DraftSettings
from specblock.drafter.dataset import load_windows, save_windows
from specblock.drafter.labels import labelled_positions, later_positions
from specblock.drafter.loss import LossSettings, train_blocks, training_loss
from specblock.drafter.precision import NumberFormat
from specblock.drafter.train import TrainRun, TrainSettings, heldout_acceptance, train_to_deadline
from specblock.drafter.window import collate
from tests.drafter.helpers import VOCAB, random_window, tiny_model


def slow_draft_loss(model, windows, consumed, decay):  # type: ignore[no-untyped-def]
    """Method reference 6.3, written as loops over windows, positions and slots."""
    batch = collate(windows)
    hidden = train_blocks(model, batch, consumed)
    total, offset, width = 0.0, 0, model.config.num_slots
    for block, u in enumerate(hidden):
        offset = sum(consumed[:block])
        log_q = torch.log_softmax(model.lm_head(model.norm(u)), dim=-1)
        for k in range(width):
            numerator = denominator = 0.0
            for b, w in enumerate(windows):
                first, last = w.prompt_tokens - 2, w.prompt_tokens - 2 + w.num_generated
                for i in range(max(0, first), w.features.shape[0]):
                    if not first <= i < last:
                        continue
                    weight = 1.0
                    for j in range(k + 1):
                        label = i + offset + j
                        if not first <= label < last:
                            weight = 0.0
                            break
                        ids = w.top_ids[label - first].long()
                        if j < k:
                            weight *= float(log_q[b, i, j].argmax() == ids[0])
                    if weight:
                        label = i + offset + k - first
                        ids = w.top_ids[label].long()
                        p = torch.softmax(w.top_log_probs[label].float(), dim=-1)
                        numerator -= float((p * log_q[b, i, k][ids]).sum())
                        denominator += 1.0
            total += decay**k * (numerator / denominator if denominator else 0.0)
    return total


@pytest.mark.parametrize("consumed", [[], [2], [4, 1]])
@torch.no_grad()
def test_valid_prefix_loss_equals_the_definition(consumed: list[int]) -> None:
    model = tiny_model()
    windows = [random_window(1, 4, 9), random_window(2, 6, 12), random_window(3, 1, 5)]
    # Sharpen the head towards the labels, so that prefixes of every length occur.
    for w in windows:
        w.top_ids[:, 0] = 7
    model.lm_head.weight[7] += 0.3 * model.norm.weight
    report = training_loss(model, collate(windows), consumed, LossSettings(rank_weight=0.0))
    assert float(report.draft) == pytest.approx(slow_draft_loss(model, windows, consumed, 0.8), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "consumed"), [("specblock", []), ("specblock", [2, 4]), ("eagle3", [1, 1]), ("parallel", [])]
)
def test_u_of_wanted_positions_alone_is_that_of_all_and_so_are_gradients(kind: str, consumed: list[int]) -> None:
    shape = {"num_slots": 1, "num_hidden_layers": 1} if kind == "eagle3" else {}
    batch = collate([random_window(i, prompt_tokens=4 + 3 * i, generated=9 + i) for i in range(3)])
    wanted = labelled_positions(batch.valid)
    assert wanted.shape[1] == 11
    assert batch.valid.gather(1, wanted).sum() == batch.valid.sum()
    gradients = []
    for asked in (None, wanted):
        model = tiny_model(kind=kind, **shape)
        blocks = train_blocks(model, batch, consumed, wanted=asked)
        total = torch.zeros(())
        for u in blocks:
            rows = u if asked is not None else u.gather(1, wanted[:, :, None, None].expand(-1, -1, *u.shape[2:]))
            real = batch.valid.gather(1, wanted)
            total = total + (rows[real] * torch.linspace(-1, 1, rows[real].numel()).view_as(rows[real])).sum()
        total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=2e-4, rtol=1e-3)


def test_later_blocks_on_a_share_of_positions_equal_those_rows_of_all() -> None:
    model = tiny_model()
    batch = collate([random_window(i, prompt_tokens=5 + i) for i in range(3)])
    later = later_positions(batch.valid, 0.4, torch.Generator().manual_seed(3))
    assert later.shape[1] < batch.valid.shape[1] / 2 and batch.valid.gather(1, later).all()
    full, some = train_blocks(model, batch, [2, 4]), train_blocks(model, batch, [2, 4], later)
    for block in (1, 2):
        index = later[:, :, None, None].expand(-1, -1, *full[block].shape[2:])
        torch.testing.assert_close(some[block], full[block].gather(1, index), atol=1e-5, rtol=1e-5)


def test_loss_on_a_share_is_near_the_loss_on_all() -> None:
    """Only the draft term, and with a prefix that leaves every slot some weight: an empty slot counts as loss 0."""
    model = tiny_model()
    batch = collate([random_window(i) for i in range(8)])
    whole = training_loss(model, batch, [2], LossSettings(prefix="acceptance"))
    half = LossSettings(later_share=0.5, prefix="acceptance")
    parts = [training_loss(model, batch, [2], half, torch.Generator().manual_seed(s)) for s in range(20)]
    assert sum(float(p.draft) for p in parts) / len(parts) == pytest.approx(float(whole.draft), rel=0.02)


def test_rank_loss_sends_no_gradient_to_the_backbone() -> None:
    model = tiny_model()
    batch = collate([random_window(1), random_window(2)])
    report = training_loss(model, batch, [2], LossSettings())
    (report.total - _draft_part(model, batch)).backward()
    assert model.rank_head[0].weight.grad.abs().sum() > 0
    assert float(model.layers[0].mlp.up_proj.weight.grad.abs().max()) < 1e-5


def _draft_part(model, batch):  # type: ignore[no-untyped-def]
    return training_loss(model, batch, [2], LossSettings(rank_weight=0.0)).total


@pytest.mark.parametrize("prefix", ["argmax", "acceptance"])
def test_training_learns_a_predictable_stream(prefix: str) -> None:
    model = tiny_model()
    windows = []
    for seed in range(8):
        w = random_window(seed, 4, 24, temperature=0.0)
        w.tokens[:] = (torch.arange(28) * 3 + seed) % VOCAB
        w.features[:] = torch.nn.functional.one_hot(w.tokens[:-1].long(), 96).float()
        w.top_ids[:, 0] = w.tokens[4:]
        w.top_ids[:, 1:] = (w.tokens[4:, None] + 1 + torch.arange(7)) % VOCAB
        w.top_log_probs[:] = torch.tensor([-0.01] + [-8.0] * 7)
        windows.append(w)
    before = heldout_acceptance(model, windows, DraftSettings(), NumberFormat(torch.float32))
    run = TrainRun(
        model,
        TrainSettings(steps=150, batch_windows=4, learning_rate=3e-3, autocast=False, loss=LossSettings(prefix=prefix)),
    )
    for batch, _ in zip(run.batches(windows), range(150), strict=False):
        run.step(batch)
    after = heldout_acceptance(model, windows, DraftSettings(), NumberFormat(torch.float32))
    assert all(after[d] > before[d] + 1.5 for d in after), (before, after)


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    windows = [random_window(i) for i in range(8)]  # the save falls into the middle of an epoch
    settings = TrainSettings(steps=6, batch_windows=2, autocast=False)

    def steps(run: TrainRun, count: int) -> None:
        for batch, _ in zip(run.batches(windows), range(count), strict=False):
            run.step(batch)

    first = TrainRun(tiny_model(), settings)
    steps(first, 3)
    first.save(tmp_path)
    steps(first, 3)
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    second = TrainRun(model, settings)
    assert second.resume(tmp_path)
    steps(second, 3)
    for (name, a), (_, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        if name != "embedding":
            assert torch.equal(a, b), name
    other = TrainRun(tiny_model(), TrainSettings(steps=7))
    with pytest.raises(ValueError, match="other settings"):
        other.resume(tmp_path)


def test_deadline_stops_training_and_saves(tmp_path: Path) -> None:
    run = TrainRun(tiny_model(), TrainSettings(steps=1000, batch_windows=2, autocast=False))
    now = iter(range(100))
    lines: list[str] = []
    train_to_deadline(run, [random_window(i) for i in range(4)], tmp_path, 8.0, lines.append, lambda: float(next(now)))
    assert run.done < 10 and lines and (tmp_path / "run.json").exists()


def test_arms_move_only_their_parameters() -> None:
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = TrainRun(model, TrainSettings(steps=2, patterns=("lm_head.*", "norm.*"), autocast=False))
    run.step([random_window(1)])
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"lm_head.weight", "norm.weight"}
    with pytest.raises(ValueError, match="no drafter parameter"):
        TrainRun(model, TrainSettings(steps=1, patterns=("nothing",)))


def test_window_shards_round_trip(tmp_path: Path) -> None:
    windows = [random_window(i, 3 + i, 5 + i) for i in range(3)]
    save_windows(tmp_path / "a.safetensors", windows)
    for w, r in zip(windows, load_windows(tmp_path / "a.safetensors"), strict=True):
        assert (w.conversation_id, w.sampling, w.prompt_tokens) == (r.conversation_id, r.sampling, r.prompt_tokens)
        for name in ("tokens", "features", "top_ids", "top_log_probs"):
            assert torch.equal(getattr(w, name), getattr(r, name))


def test_checkpoint_round_trip_and_refusals(tmp_path: Path) -> None:
    model = tiny_model(target_fingerprint="abc")
    save_drafter(model, tmp_path / "d", torch.float32)
    loaded = load_drafter(tmp_path / "d", model.embedding, dtype=torch.float32, target_fingerprint="abc")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="trained on target abc"):
        load_drafter(tmp_path / "d", model.embedding, dtype=torch.float32, target_fingerprint="xyz")
    with pytest.raises(ValueError, match="does not fit"):
        load_drafter(tmp_path / "d", torch.zeros(VOCAB, 16), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_drafter(tmp_path / "none", model.embedding, dtype=torch.float32)
    with pytest.raises(ValueError, match="reads target layers"):
        load_drafter(tmp_path / "d", model.embedding, dtype=torch.float32, feature_layers=(0, 1, 3))
    weights = dict(model.state_dict())
    weights.pop("norm.weight")
    with pytest.raises(ValueError, match="missing tensors"):
        load_weights(model, weights, "x")
    blob = (tmp_path / "d" / "model.safetensors").read_bytes()
    (tmp_path / "d" / "model.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_drafter(tmp_path / "d", model.embedding, dtype=torch.float32)
    (tmp_path / "d" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_drafter(tmp_path / "d", model.embedding, dtype=torch.float32)


def test_published_config_keys_are_read() -> None:
    config = tiny_model().config
    data = json.loads(json.dumps(config.to_json()))
    assert data["diffspec_draft_token_num"] == 4
    assert type(config).from_json(data | {"unknown": 1}) == config
