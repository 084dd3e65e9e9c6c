"""EAGLE-3, parallel heads and prompt lookup: shapes, checkpoints, training, and what each costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.drafter.checkpoint import load_drafter, read_config, save_drafter
from specblock.drafter.config import DrafterConfig, DraftSettings, published_settings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.expand import expand_product
from specblock.drafter.interface import NewPositions
from specblock.drafter.kinds import loss_settings, new_network, training_blocks
from specblock.drafter.lookup import LookupDrafter, continuations
from specblock.drafter.plan import NO_SPECULATION, DraftPlan, PlannedLimits
from specblock.drafter.proposals import Proposals
from specblock.drafter.replay import replay
from specblock.drafter.train import TrainRun, TrainSettings
from specblock.drafter.weight_bytes import weight_bytes_per_cycle
from tests.drafter.helpers import KINDS, VOCAB, random_window, tiny_config, tiny_model

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "draft_vocab_size": 32000, "feature_layers": (1, 15, 28),
}  # fmt: skip
EAGLE_NAMES = {
    "fc.weight", "norm.weight", "lm_head.weight", "t2d", "d2t", "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight", "midlayer.post_attention_layernorm.weight",
    *(f"midlayer.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"midlayer.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
}  # fmt: skip


def weight_bytes_at_8b(kind: str, num_hidden_layers: int, num_slots: int, blocks: int) -> int:
    config = DrafterConfig(kind=kind, num_hidden_layers=num_hidden_layers, num_slots=num_slots, **LLAMA_8B)  # type: ignore[arg-type]
    with torch.device("meta"):
        network = new_network(config, torch.empty(config.vocab_size, config.hidden_size))
    return weight_bytes_per_cycle(network.to(torch.bfloat16), blocks)


def test_a_specblock_cycle_reads_less_than_half_of_an_eagle3_cycle() -> None:
    """Two forwards against eight at the Llama-3.1-8B shape; the method reference derives 0.445."""
    specblock = weight_bytes_at_8b("specblock", 2, 4, published_settings("specblock").blocks)
    eagle3 = weight_bytes_at_8b("eagle3", 1, 1, published_settings("eagle3").blocks)
    assert specblock == pytest.approx(2 * 1354.9e6, rel=1e-3)
    assert eagle3 == pytest.approx(2 * 3045.2e6, rel=1e-3)
    assert specblock / eagle3 == pytest.approx(0.445, abs=0.001)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_survive_a_round_trip(kind: str, tmp_path: Path) -> None:
    model = tiny_model(3, draft_vocab_size=40, **KINDS[kind])
    model.set_vocabulary(torch.randperm(VOCAB)[:40].sort().values)
    save_drafter(model, tmp_path, torch.float32)
    loaded = load_drafter(tmp_path, model.embedding, dtype=torch.float32)
    assert read_config(tmp_path) == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.draft_ids, model.draft_ids)


def test_eagle3_has_the_published_names_and_reads_a_published_config(tmp_path: Path) -> None:
    model = tiny_model(**KINDS["eagle3"])
    save_drafter(model, tmp_path, torch.float32)
    assert set(load_file(tmp_path / "model.safetensors")) == EAGLE_NAMES
    published = {
        "architectures": ["LlamaForCausalLMEagle3"], "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
        "torch_dtype": "float16", "vocab_size": VOCAB, "draft_vocab_size": VOCAB, "model_type": "llama",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, "rope_theta": 500000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = load_drafter(tmp_path, model.embedding, dtype=torch.float32).config
    assert (config.kind, config.num_slots, config.feature_layers) == ("eagle3", 1, (1, 2, 3))
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 500000)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    save_drafter(tiny_model(**KINDS["eagle3"]), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"architectures": ["LlamaForCausalLMSpecBlock"], "num_hidden_layers": 2}, "missing tensors"),
        ({"architectures": ["SomethingElse"]}, "not a drafter"),
        ({"num_hidden_layers": 2}, "one layer"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=message):
            load_drafter(tmp_path, torch.zeros(VOCAB, 32), dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")  # a pickle would be code to run
    with pytest.raises(ValueError, match="cannot be read"):
        load_drafter(tmp_path, torch.zeros(VOCAB, 32), dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str) -> None:
    """A few steps on the same conversations lower the loss, in every group of parameters that may move."""
    windows = [random_window(i, prompt_tokens=2) for i in range(4)]
    for group, patterns in BlockDrafter(tiny_model(**KINDS[kind]), DraftSettings()).parameter_groups().items():
        chosen = TrainSettings(
            steps=12, learning_rate=1e-2, warmup_steps=1, patterns=patterns, blocks=training_blocks(kind, 2),
            loss=loss_settings(kind, "acceptance", 1.0), autocast=False,
        )  # fmt: skip
        if group in ("statistics", "pairs"):
            continue  # counted, not trained: tests/drafter/test_token_bias.py, test_token_pairs.py
        run = TrainRun(tiny_model(**KINDS[kind]).train(), chosen)
        losses = [float(run.step(windows).total.detach()) for _ in range(12)]
        assert losses[-1] < losses[0], (group, losses)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_of_recorded_sizes(kind: str) -> None:
    """Cycles without speculation accept nothing and cost no drafting; what follows them is drafted as ever."""
    drafter = BlockDrafter(tiny_model(**KINDS[kind]), DraftSettings(blocks=2, leaf_cap=4, node_budget=16))
    window = random_window(4, generated=30)
    free = replay(drafter, [window])[0]
    plan = DraftPlan((4,) if drafter.num_blocks > 1 else (), 16)
    assert replay(drafter, [window], limits=PlannedLimits(plan))[0] == free
    off = [NO_SPECULATION.to_list()] * 3
    mixed = {**{f: getattr(window, f) for f in window.__dataclass_fields__}, "plans": tuple(map(tuple, off))}
    resumed = replay(drafter, [type(window)(**mixed)], recorded=True)[0]
    later = {**mixed, "plans": (), "prompt_tokens": window.prompt_tokens + 3}
    assert resumed.accepted == (0, 0, 0, *replay(drafter, [type(window)(**later)])[0].accepted)


def test_product_trees_hold_the_best_paths_of_independent_slots() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob = torch.log_softmax(torch.randn(1, 1, 3, 5, generator=generator), dim=-1).sort(dim=-1, descending=True)
    token = torch.arange(15).view(1, 1, 3, 5)
    proposals = Proposals(token, log_prob.values, torch.full((1, 1, 3), 5))
    candidates = expand_product(proposals, torch.tensor([True]), beam=25)
    paths = {}
    for index in range(candidates.token.shape[1]):
        path, at = [], index
        while at >= 0:
            path.append(int(candidates.token[0, at]))
            at = int(candidates.parent[0, at])
        paths[tuple(reversed(path))] = float(candidates.score[0, index])
        assert int(candidates.rank[0, index]) == path[0] % 5  # tokens are numbered by slot and rank
    p = log_prob.values[0, 0]
    for a in range(5):
        for b in range(5):
            for c in range(5):
                assert paths[(a, 5 + b, 10 + c)] == pytest.approx(float(p[0, a] + p[1, b] + p[2, c]), abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=3))
def test_lookup_finds_what_a_slow_search_finds(histories: list[list[int]]) -> None:
    width = max(map(len, histories))
    padded = torch.tensor([h + [9] * (width - len(h)) for h in histories])
    found = continuations(padded, torch.tensor([len(h) for h in histories]))
    for row, history in enumerate(histories):
        ends = []
        for end in range(len(history) - 1):
            size = 0
            while size < 3 and end >= size and history[end - size] == history[len(history) - 1 - size]:
                size += 1
            if size:
                ends.append((size, end))
        wanted = [history[end + 1 : end + 11] for _, end in sorted(ends, reverse=True)[:4]]
        count = found.token.shape[1] // 10
        chains = found.token[row].view(count, 10), found.valid[row].view(count, 10)
        got = [tokens[valid].tolist() for tokens, valid in zip(*chains, strict=True) if valid.any()]
        assert got == wanted
        for match, chain in enumerate(got):
            for at in range(len(chain)):
                rivals = sum(other[:at] == chain[:at] and len(other) > at for other in got[:match])
                assert int(found.rank[row].view(count, 10)[match, at]) == rivals


def test_lookup_drafts_a_tree_within_the_budget_and_forgets_a_slot() -> None:
    drafter = LookupDrafter(DraftSettings(node_budget=6), torch.device("cpu"), torch.float32)
    cache = drafter.new_cache(2, 50)
    text = [5, 6, 7, 8, 5, 6, 9, 4, 5, 6]
    new = NewPositions(torch.zeros(1, len(text), 3), torch.tensor([text]), [len(text)])
    sampling = SamplingBatch.of([SamplingParams(temperature=0)])
    tree = drafter.draft(cache, [1], new, torch.tensor([6]), sampling, None).tree
    tree.check()
    children = tree.token[0, 1:][tree.parent[0, 1:] == 0].tolist()
    assert sorted(children) == [7, 9] and int(tree.size[0]) == 7
    cache.reset(1)
    none = NewPositions(torch.zeros(1, 1, 3), torch.tensor([[6]]), [1])
    assert drafter.draft(cache, [1], none, torch.tensor([6]), sampling, None).tree.size.tolist() == [1]


def test_the_published_refresh_pairs_and_counts_as_the_published_code() -> None:
    """Method reference 9.1-9.3: later tokens, a twice-stored prompt end, an index that gains one too many."""
    model = tiny_model()
    drafter = BlockDrafter(model, DraftSettings(published_refresh=True, shared_noise=False))
    window = random_window(1, prompt_tokens=6, generated=30)
    cache, fed = drafter.new_cache(1, 40), []
    original = drafter.paired

    def spy(own: object, slots: list[int], new: NewPositions) -> torch.Tensor:
        fed.append((cache.rows[0], cache.rotary[0], new.tokens[0, : new.counts[0]].tolist()))
        return original(cache, slots, new)

    drafter.paired = spy  # type: ignore[method-assign,assignment]
    x, at = window.tokens.tolist(), 0
    for step in (5, 3, 1, 1, 2):
        new = NewPositions(window.features[None, at : at + step], window.tokens[None, at + 1 : at + step + 1].long(),
                           [step])  # fmt: skip
        drafter.draft(cache, [0], new, torch.tensor([x[at + step]]), SamplingBatch.of([window.sampling]), None)
        at += step
    assert fed == [
        (0, 0, [*x[1:6], x[5]]),  # the last pair twice
        (6, 6, [x[7], x[8], x[8]]),
        (8, 10, [x[9]]),  # nothing accepted: overwrites the last row, and the counter stands still
        (8, 10, [x[10]]),
        (9, 10, [x[12], x[12]]),
    ]
    assert cache.positions == [at]


def test_training_settings_of_the_kinds() -> None:
    assert [training_blocks(kind, 3) for kind in ("specblock", "eagle3", "parallel")] == [3, 7, 1]
    assert loss_settings("eagle3", "argmax", 0.5).block_decay == 0.8
    with pytest.raises(ValueError, match="kind must be one of"):
        tiny_config(kind="medusa")
