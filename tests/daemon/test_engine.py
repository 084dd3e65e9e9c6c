"""The decode loop: the text never depends on the drafter; replay of the live version equals what was accepted live."""

from __future__ import annotations

import itertools
from random import Random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.cost_curve import CostCurve, RowCurve
from specblock.daemon.engine import Engine, EngineSettings, Listener
from specblock.daemon.messages import GenerationRequest, TokenChunk
from specblock.daemon.planner_types import PlannerSettings
from specblock.daemon.request import RequestState
from specblock.daemon.speculation import GateSettings
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.config import DrafterConfig, DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.interface import AnyDrafter, NewPositions
from specblock.drafter.kinds import new_network
from specblock.drafter.kv_cache import DrafterCache
from specblock.drafter.lookup import LookupDrafter
from specblock.drafter.precision import NumberFormat
from specblock.drafter.replay import replay
from specblock.drafter.window import Window
from specblock.verifier.model import TargetModel

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def target_of(
    family: str, dtype: torch.dtype, head_dim: int = 8, native: bool = False, coarse: bool = False
) -> TargetModel:
    torch.manual_seed(5)
    shape = SHAPE | {"head_dim": head_dim}
    model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # peaked enough that drafts are accepted sometimes
    return TargetModel.from_model(model.to(dtype).eval(), native=native, coarse=coarse)


def drafter_of(target: TargetModel, kind: str = "specblock", **settings: object) -> BlockDrafter:
    torch.manual_seed(6)
    config = DrafterConfig(
        kind=kind, num_slots=1 if kind == "eagle3" else 4, num_hidden_layers=1 if kind == "eagle3" else 2,
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=target.config.head_dim, vocab_size=VOCAB, draft_vocab_size=VOCAB, feature_layers=target.feature_layers,
    )  # fmt: skip
    model = new_network(config, target.embedding).serve_in(NumberFormat(target.dtype, target.coarse)).eval()
    return BlockDrafter(model, DraftSettings(**{"node_budget": 24, "noise_scale": 4.0} | settings))  # type: ignore[arg-type]


def planner_of(drafter: AnyDrafter, seed: int = 0, **gate: object) -> TreePlanner:
    """A planner with made-up costs that explores a lot and changes its mind about speculation often."""
    curve = CostCurve(
        verify=RowCurve((1, 8, 32), (1.0, 1.2, 3.0)),
        first_block=RowCurve((1, 8), (0.2, 0.3)),
        later_block=RowCurve((1, 16), (0.1, 0.3)),
    )
    rng = Random(seed)
    gates = GateSettings(**{"min_cycles": 4, "probe_cycles": 3, "probe_share": 0.2} | gate)  # type: ignore[arg-type]
    settings = PlannerSettings(explore_share=0.3, plain_share=0.2, gate=gates)
    return TreePlanner(curve, drafter.settings, lambda c=itertools.count(): c.__next__() * rng.random(), rng, settings)


class Keep(Listener):
    def __init__(self) -> None:
        self.windows: dict[str, Window] = {}
        self.states: dict[str, RequestState] = {}
        self.segments: list[tuple[str, int, bool]] = []

    def segment(self, state: RequestState, last: bool) -> None:
        self.segments.append((state.request.request_id, state.segment.cycles, last))

    def finished(self, state: RequestState, reason: str) -> None:
        window = state.window(0.0, False, 1000)
        self.states[state.request.request_id] = state
        if window is not None:
            self.windows[state.request.request_id] = window


def run(
    target: TargetModel,
    drafter: AnyDrafter | None,
    requests: list[GenerationRequest],
    slots: int,
    planner: TreePlanner | None = None,
    segment_cycles: int = 32,
    speculation: bool = True,
    graphs: bool = False,
) -> tuple[dict[str, list[int]], Keep]:
    keep = Keep()
    settings = EngineSettings(
        slots=slots, capacity_tokens=160, prefill_chunk_tokens=7, top_k=8, segment_cycles=segment_cycles
    )
    engine = Engine(target, drafter, settings, lambda c=itertools.count(): float(next(c)), keep, "v0", planner)
    engine.speculation = speculation and drafter is not None
    if graphs:
        engine.use_graphs(ahead=False)
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    ended: dict[str, TokenChunk] = {}
    while not engine.idle:
        for chunk in engine.step():
            tokens[chunk.request_id].extend(chunk.tokens)
            if chunk.finish_reason:
                ended[chunk.request_id] = chunk
    assert ended.keys() == tokens.keys()
    for name, chunk in ended.items():
        assert chunk.stats is not None and chunk.stats.completion_tokens == len(tokens[name])
    return tokens, keep


def random_requests(count: int, seed: int) -> list[GenerationRequest]:
    rng = Random(seed)
    requests = []
    for i in range(count):
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 5]),
            min_p=rng.choice([0.0, 0.05]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            logit_bias=rng.choice([(), ((3, 2.0),)]),
            seed=rng.getrandbits(62),
        )
        requests.append(
            GenerationRequest(
                request_id=f"r{i}",
                prompt_tokens=tuple(rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 2, 9, 23]))),
                sampling=sampling,
                max_tokens=rng.choice([1, 5, 40]),
                stop_token_ids=rng.choice([(), (17, 23)]),
                ignore_eos=rng.random() < 0.5,
            )
        )
    return requests


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_text_is_the_same_with_and_without_drafter_alone_and_batched(family: str) -> None:
    target = target_of(family, torch.float64)
    requests = random_requests(40, seed=3)
    plain, _ = run(target, None, requests, slots=1)
    for slots, settings in (
        (1, {}), (7, {}), (7, {"shared_noise": False}), (7, {"blocks": 3, "leaf_cap": 3}), (7, {"blocks": 1}),
    ):  # fmt: skip
        drafted, keep = run(target, drafter_of(target, **settings), requests, slots)  # type: ignore[arg-type]
        assert drafted == plain
    accepted = sum(sum(s.accepted) for s in keep.states.values())
    assert accepted > 0, "the test must exercise accepted drafts"


@pytest.mark.parametrize("kind", ["specblock", "eagle3", "parallel", "prompt_lookup"])
def test_text_is_the_same_for_every_kind_and_for_any_choice_of_sizes(kind: str) -> None:
    """Fixed trees, the published refresh, and sizes chosen per cycle with pauses, probes and exploration."""
    target = target_of("llama", torch.float64)
    requests = random_requests(30, seed=5)
    plain, _ = run(target, None, requests, slots=1)

    def drafter(**settings: object) -> AnyDrafter:
        if kind == "prompt_lookup":
            return LookupDrafter(DraftSettings(**settings), torch.device("cpu"), torch.float64)  # type: ignore[arg-type]
        return drafter_of(target, kind, **settings)

    for settings in ({}, {"published_refresh": True}, {"rank_head": False, "merge": False}):
        assert run(target, drafter(**settings), requests, 5)[0] == plain
    for off_below in (0.5, 1.0, 5.0):  # never off, sometimes, always
        chosen = drafter(blocks=3, leaf_cap=6)
        planner = planner_of(chosen, off_below=off_below, on_above=off_below)
        drafted, keep = run(target, chosen, requests, 5, planner)
        assert drafted == plain
        plans = {plan for state in keep.states.values() for plan in state.plans}
        assert len(plans) > 3, "the test must exercise different sizes"
    assert (0,) in plans, "and pauses"


@pytest.mark.parametrize("kind", ["specblock", "eagle3", "parallel"])
def test_replay_equals_live_when_sizes_were_chosen_per_cycle(kind: str) -> None:
    target = target_of("llama", torch.float64)
    drafter = drafter_of(target, kind, blocks=3, leaf_cap=6)
    _, keep = run(target, drafter, random_requests(24, seed=8), 5, planner_of(drafter, off_below=1.0, on_above=1.0))
    windows = list(keep.windows.values())
    accepted = [a for w in windows for a in w.accepted]
    assert len(accepted) > 50 and sum(accepted) > 0
    for window, replayed in zip(windows, replay(drafter, windows, batch_windows=6, recorded=True), strict=True):
        assert replayed.accepted == window.accepted, window.conversation_id


def test_a_wrong_acceptance_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from specblock.verifier import accept as module

    target = target_of("llama", torch.float64)
    requests = random_requests(12, seed=4)
    plain, _ = run(target, None, requests, slots=4)

    def first_child_always(tree, row, token):  # type: ignore[no-untyped-def]
        match = (tree.parent == row[:, None]) & (tree.depth > 0)
        found, index = match.max(dim=1)
        return torch.where(found, index, -1)

    monkeypatch.setattr(module, "find_child", first_child_always)
    drafted, _ = run(target, drafter_of(target), requests, slots=4)
    assert drafted != plain


class Pauses:
    """A planner of fixed sizes in which one request drafts always and the others only after a while."""

    def __init__(self, until: int) -> None:
        self.until, self.cycles = until, 0
        self.clock = lambda: 0.0

    def absorbed(self, domain: str, seconds: float, batch: int) -> None:
        assert seconds == 0 and batch > 0

    def begin(self, participants, new_positions):  # type: ignore[no-untyped-def]
        self.cycles += 1
        return tuple(p.request_id == "always" or self.cycles > self.until for p in participants)

    def more(self, block: int) -> bool:
        return True

    def leaves(self, block: int, score: torch.Tensor) -> int:
        return 4

    def nodes(self, score: torch.Tensor) -> int:
        return 12

    def record(self, result: object) -> None:
        """Learns nothing."""

    def speculates(self, domain: str) -> bool:
        return True


@pytest.mark.parametrize("kind", ["specblock", "eagle3", "parallel", "lookup"])
def test_a_request_catches_up_beside_one_whose_slot_is_nearly_full(kind: str) -> None:
    target = target_of("llama", torch.float64)
    drafter: AnyDrafter = LookupDrafter(DraftSettings(blocks=1, node_budget=12), target.device, target.dtype)
    if kind != "lookup":
        drafter = drafter_of(target, kind, blocks=2, leaf_cap=4)
    requests = [
        GenerationRequest(
            request_id=name,
            prompt_tokens=tuple(range(2, 2 + prompt)),
            sampling=SamplingParams(temperature=1.0, seed=prompt),
            max_tokens=160 - prompt,
            ignore_eos=True,
        )
        for name, prompt in (("always", 60), ("later", 3))
    ]
    plain, _ = run(target, None, requests, slots=1)
    for until in (5, 40, 60):
        drafted, keep = run(target, drafter, requests, 2, Pauses(until))  # type: ignore[arg-type]
        assert drafted == plain
        windows = list(keep.windows.values())
        for window, replayed in zip(windows, replay(drafter, windows, recorded=True), strict=True):
            assert replayed.accepted == window.accepted, window.conversation_id


@pytest.mark.parametrize("settings", [{}, {"shared_noise": False}, {"published_refresh": True}])
def test_replay_of_the_serving_version_equals_live_cycle_by_cycle(settings: dict[str, object]) -> None:
    target = target_of("llama", torch.float64)
    drafter = drafter_of(target, **settings)
    _, keep = run(target, drafter, random_requests(24, seed=8), slots=5)
    windows = list(keep.windows.values())
    assert sum(len(w.accepted) for w in windows) > 50
    for window, replayed in zip(windows, replay(drafter, windows, batch_windows=6), strict=True):
        assert replayed.accepted == window.accepted, window.conversation_id


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
@pytest.mark.parametrize("kind", ["specblock", "eagle3"])
@pytest.mark.parametrize("settings", [{}, {"published_refresh": True}])
@pytest.mark.parametrize("coarse", [False, True])
def test_whole_native_layers_keep_the_text_and_replay_equals_live(
    kind: str, settings: dict[str, object], coarse: bool
) -> None:
    target = target_of("qwen3", torch.float32, head_dim=16, native=True, coarse=coarse)
    drafter = drafter_of(target, kind, **settings)
    assert target.by_slot is not None and drafter.by_slot is not None and drafter.by_slot.whole_layers
    requests = random_requests(24, seed=9)
    texts, keep = run(target, drafter, requests, slots=5)
    assert texts == run(target, None, requests, slots=5)[0]
    windows = list(keep.windows.values())
    assert sum(len(w.accepted) for w in windows) > 50
    for window, replayed in zip(windows, replay(drafter, windows, batch_windows=6), strict=True):
        assert replayed.accepted == window.accepted, window.conversation_id


def test_replay_notices_a_desynchronised_live_cache() -> None:
    """The planted fault: live positions shifted by one. Replay of the same weights no longer agrees."""
    target = target_of("llama", torch.float64)
    drafter = drafter_of(target, shared_noise=False)
    healthy = drafter.paired

    def shifted(cache: DrafterCache, slots: list[int], new: NewPositions) -> NewPositions:
        return NewPositions(new.features, (new.tokens + 1) % VOCAB, new.counts)

    drafter.paired = shifted  # type: ignore[method-assign]
    _, keep = run(target, drafter, random_requests(24, seed=8), slots=5)
    drafter.paired = healthy  # type: ignore[method-assign]
    windows = [w for w in keep.windows.values() if w.accepted]
    replays = replay(drafter, windows)
    assert [r.accepted for r in replays] != [w.accepted for w in windows]


def test_segments_cover_every_cycle_once() -> None:
    target = target_of("llama", torch.float64)
    _, keep = run(target, drafter_of(target), random_requests(6, seed=1), slots=3, segment_cycles=3)
    assert len(keep.segments) > len(keep.states)
    for name, state in keep.states.items():
        own = [(cycles, last) for n, cycles, last in keep.segments if n == name]
        assert sum(cycles for cycles, _ in own) == state.total.cycles == sum(state.total.histogram)
        assert [last for _, last in own].count(True) == 1 and own[-1][1]


def test_replay_equals_live_while_speculation_is_switched_off() -> None:
    target = target_of("llama", torch.float64)
    drafter = drafter_of(target)
    _, keep = run(target, drafter, random_requests(6, seed=2), slots=3, speculation=False)
    windows = list(keep.windows.values())
    assert sum(len(w.accepted) for w in windows) > 20
    for window, replayed in zip(windows, replay(drafter, windows, recorded=True), strict=True):
        assert replayed.accepted == window.accepted and set(replayed.accepted) <= {0}


def test_a_listener_that_raises_leaves_the_slot_free() -> None:
    class Broken(Listener):
        def finished(self, state: RequestState, reason: str) -> None:
            raise RuntimeError("full")

    target = target_of("llama", torch.float32)
    engine = Engine(target, None, EngineSettings(slots=1, capacity_tokens=16), lambda: 0.0, Broken())
    for name in ("a", "b"):
        engine.submit(GenerationRequest(request_id=name, prompt_tokens=(2, 3), sampling=SamplingParams(), max_tokens=1))
    with pytest.raises(RuntimeError, match="full"):
        for _ in range(3):
            engine.step()
    with pytest.raises(RuntimeError, match="full"):
        engine.step()
    assert not engine.running and not engine.waiting


def test_requests_that_do_not_fit_are_refused() -> None:
    target = target_of("llama", torch.float32)
    engine = Engine(target, None, EngineSettings(slots=1, capacity_tokens=16), lambda: 0.0)
    with pytest.raises(ValueError, match="over the context length"):
        engine.submit(
            GenerationRequest(request_id="a", prompt_tokens=(2,) * 10, sampling=SamplingParams(), max_tokens=9)
        )
    with pytest.raises(ValueError, match="must not be empty"):
        engine.submit(GenerationRequest(request_id="a", prompt_tokens=(), sampling=SamplingParams(), max_tokens=9))
    for prompt, most, message in (((2, VOCAB), 3, "token ids"), ((-1,), 3, "token ids"), ((2,), 0, "max_tokens")):
        with pytest.raises(ValueError, match=message):
            engine.submit(
                GenerationRequest(request_id="a", prompt_tokens=prompt, sampling=SamplingParams(), max_tokens=most)
            )


def test_cancel_frees_the_slot_and_reports_abort() -> None:
    target = target_of("llama", torch.float32)
    engine = Engine(target, None, EngineSettings(slots=1, capacity_tokens=64), lambda: 0.0)
    for name in ("a", "b"):
        engine.submit(
            GenerationRequest(
                request_id=name, prompt_tokens=(2, 3), sampling=SamplingParams(), max_tokens=30, ignore_eos=True
            )
        )
    engine.step()
    chunk = engine.cancel("a")
    assert chunk is not None and chunk.finish_reason == "abort"
    assert engine.cancel("nobody") is None
    engine.step()
    assert [s.request.request_id for s in engine.running] == ["b"]


def test_swap_happens_between_cycles_and_flags_running_requests() -> None:
    target = target_of("llama", torch.float64)
    drafter = drafter_of(target)
    engine = Engine(target, drafter, EngineSettings(slots=2, capacity_tokens=64), lambda: 0.0, drafter_version="v0")
    engine.submit(
        GenerationRequest(
            request_id="a", prompt_tokens=(2, 3), sampling=SamplingParams(), max_tokens=30, ignore_eos=True
        )
    )
    engine.step()

    def apply() -> bool:
        engine.drafter_version = "v1"
        return False

    engine.swap_between_cycles(apply)
    assert engine.running[0].versions == ["v0"]
    engine.step()
    assert engine.running[0].versions == ["v0", "v1"] and engine.running[0].flagged


def test_a_refused_swap_changes_nothing() -> None:
    target = target_of("llama", torch.float64)
    drafter, keep = drafter_of(target), Keep()
    planner = planner_of(drafter)
    settings = EngineSettings(slots=1, capacity_tokens=60)
    engine = Engine(target, drafter, settings, lambda c=itertools.count(): float(next(c)), keep, "v0", planner)
    request = GenerationRequest(
        request_id="r", prompt_tokens=(2, 3, 4), sampling=SamplingParams(seed=1), max_tokens=40, ignore_eos=True
    )
    engine.submit(request)
    for _ in range(4):
        engine.step()
    seen = planner.survival.snapshot()
    engine.swap_between_cycles(lambda: True)
    engine._apply_swap()
    assert planner.survival.snapshot() == seen
    while not engine.idle:
        engine.step()
    assert keep.windows["r"].drafter_version == "v0"


def test_what_a_request_keeps_is_its_own_and_no_part_of_the_batch() -> None:
    target = target_of("llama", torch.float32)
    drafter = drafter_of(target)
    settings = EngineSettings(slots=4, capacity_tokens=80)
    engine = Engine(target, drafter, settings, lambda: 0.0, planner=Pauses(1000))  # type: ignore[arg-type]
    for i in range(4):
        engine.submit(
            GenerationRequest(
                request_id="always" if i == 0 else str(i),
                prompt_tokens=(2, 3, 4),
                sampling=SamplingParams(seed=i),
                max_tokens=70,
                ignore_eos=True,
            )
        )
    for _ in range(10):
        engine.step()
    for state in engine.running:
        assert sum(p.shape[0] for p in state.pending) == engine._drafting.num_pending(state) > 0
        for kept in (*state.pending[1:], *state._features[1:]):  # the first is the prompt's, a batch of one
            assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
