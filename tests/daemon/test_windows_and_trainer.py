"""Windows stay inside their budget; the trainer trains, scores and stores what the registry can serve again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specblock.bandit.actions import Focus
from specblock.bandit.config import Arm
from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.config import TrainerConfig
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.engine_host import EngineHost
from specblock.daemon.feedback import band, sampling_class
from specblock.daemon.messages import GenerationRequest
from specblock.daemon.registry import DrafterRegistry
from specblock.daemon.trainer import Trainer
from specblock.daemon.windows import WindowLimits, WindowStore
from specblock.drafter.checkpoint import save_drafter
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.kinds import new_network
from specblock.drafter.precision import NumberFormat
from specblock.drafter.token_bias import domain_key
from specblock.drafter.window import Window
from specblock.verifier.model import TargetModel
from tests.daemon.test_engine import SHAPE, Keep, drafter_of, random_requests, run, target_of
from tests.drafter.helpers import random_window, tiny_model
from tests.verifier.test_text import END, TOKENIZER


def store(budget_bytes: int, now: list[float], **limits: float) -> WindowStore:
    return WindowStore(WindowLimits(budget_bytes=budget_bytes, **limits), lambda: now[0])  # type: ignore[arg-type]


def named(seed: int, domain: str, time_s: float) -> Window:
    return replace(random_window(seed), conversation_id=f"{domain}-{seed}", domain=domain, time_s=time_s)


def test_budget_is_never_exceeded_and_drops_are_counted() -> None:
    one = random_window(0).num_bytes
    kept = store(5 * one, [0.0])
    for i in range(20):
        kept.add(named(i, "python", 0.0))
        assert kept.num_bytes <= 5 * one
    assert len(kept) == 5 and kept.dropped == 15
    assert [w.conversation_id for w in kept.pull()] == [f"python-{i}" for i in range(15, 20)]
    tiny = store(one - 1, [0.0])
    tiny.add(random_window(0))
    assert len(tiny) == 0 and tiny.dropped == 1


def test_a_busy_domain_cannot_push_another_out() -> None:
    one = random_window(0).num_bytes
    kept = store(10 * one, [0.0], per_domain_quota=0.5)
    for i in range(4):
        kept.add(named(i, "rare", 0.0))
    for i in range(50):
        kept.add(named(i, "busy", 0.0))
    assert sum(w.domain == "rare" for w in kept.pull()) == 4


def test_expired_windows_go() -> None:
    now = [0.0]
    kept = store(10**9, now, ttl_s=10.0)
    kept.add(named(1, "python", 0.0))
    now[0] = 11.0
    kept.add(named(2, "python", 11.0))
    assert [w.conversation_id for w in kept.pull()] == ["python-2"]


def test_expired_windows_go_without_new_ones() -> None:
    now = [0.0]
    kept = store(10**9, now, ttl_s=10.0)
    kept.add(named(1, "python", 0.0))
    kept.add(named(2, "python", 5.0))
    now[0] = 11.0
    assert [w.conversation_id for w in kept.pull()] == ["python-2"]
    now[0] = 16.0
    assert kept.summary() == () and len(kept) == 0 and kept.num_bytes == 0


def test_bytes_are_counted_by_domain_whatever_happens() -> None:
    """The sums that choose whom to drop are kept up to date, so they must survive every way in and out."""
    rng = Random(0)
    now = [0.0]
    kept = store(12 * random_window(0).num_bytes, now, ttl_s=40.0)
    for step in range(300):
        now[0] += 1.0
        kept.add(named(rng.randrange(30), rng.choice(["a", "b", "b", "c"]), now[0]))
        if step % 50 == 49:
            kept.forget(lambda w: w.domain != "c")
        windows = kept.pull()
        sizes = {d: sum(w.num_bytes for w in windows if w.domain == d) for d in {w.domain for w in windows}}
        assert kept._bytes_by_domain == sizes and kept.num_bytes == sum(sizes.values()) <= kept.limits.budget_bytes


def test_split_is_a_function_of_the_conversation_and_near_its_share() -> None:
    kept = store(10**9, [0.0], heldout_fraction=0.25)
    marks = [kept.is_heldout(f"c{i}") for i in range(2000)]
    assert marks == [kept.is_heldout(f"c{i}") for i in range(2000)]
    assert 0.2 < sum(marks) / 2000 < 0.3


def test_summary_forget_and_filters() -> None:
    kept = store(10**9, [0.0])
    for i in range(4):
        kept.add(named(i, "a" if i % 2 else "b", float(i)))
    assert [(c.domain, c.num_train, c.train_positions) for c in kept.summary()] == [("a", 2, 40), ("b", 2, 40)]
    assert [w.time_s for w in kept.pull(after_time_s=1.0)] == [2.0, 3.0]
    assert kept.forget(lambda w: w.domain == "a") == 2
    assert len(kept) == 2


def test_bands_and_classes() -> None:
    assert [band(n) for n in (0, 1, 2, 3, 64, 65)] == ["1", "1", "2", "4", "64", "128"]
    assert [sampling_class(t) for t in (0.0, 0.4, 0.8, 1.0, 1.5)] == [
        "greedy", "t0-0.5", "t0.5-0.9", "t0.9-1.1", "t1.1+",
    ]  # fmt: skip


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    model = tiny_model()
    save_drafter(model, tmp_path / "base")
    registry = DrafterRegistry(tmp_path / "state", lambda: 1.0)
    registry.import_base(tmp_path / "base")
    config = TrainerConfig(batch_windows=2, keep_versions=2)
    return Trainer(model.embedding.clone(), registry, DraftSettings(), NumberFormat(torch.float32), config)


FULL = Arm(name="full", patterns=("*",), steps=10, learning_rate=1e-3)


def test_micro_profile_then_rest_then_store_and_reload(trainer: Trainer) -> None:
    windows = [random_window(i) for i in range(4)]
    base = trainer.registry.serving()
    assert base is not None
    probe = trainer.train("d000001", FULL, base, 0.2, False, windows, {})
    rest = trainer.train("d000001", FULL, base, 1.0, True, windows, {})
    assert probe.candidate_version == rest.candidate_version
    assert rest.positions == 4 * probe.positions, "2 of 10 steps, then the other 8"
    assert probe.cutoff_time_s == max(w.time_s for w in windows)
    report = trainer.compare(base, rest.candidate_version, windows, 0.01)
    assert [r.conversation_id for r in report.rows] == [w.conversation_id for w in windows]
    version = trainer.store(rest.candidate_version, "d000001")
    stored, candidate = trainer.weights(version), trainer.weights(rest.candidate_version)
    assert all(torch.equal(stored[name], candidate[name]) for name in stored)
    trained = [stored[name] for name in stored if stored[name].is_floating_point()]
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in trained), "drafts as fast as its base"
    assert not all(torch.equal(stored[name], before) for name, before in trainer.weights(base).items())
    assert trainer.registry.show(version).metadata["decision_id"] == "d000001"


def test_a_blend_lies_between_the_start_and_what_was_trained(trainer: Trainer) -> None:
    windows, base = [random_window(i) for i in range(4)], trainer.registry.serving()
    assert base is not None
    found = {}
    for blend in (1.0, 0.25):
        arm = replace(FULL, patterns=("lm_head.*", "layers.0.*"), blend=blend)
        name = trainer.train("d000001", arm, base, 0.2, False, windows, {}).candidate_version
        name = trainer.train("d000001", arm, base, 1.0, True, windows, {}).candidate_version
        version = trainer.store(name, "d000001")
        found[blend] = trainer.weights(version)
        assert all(torch.equal(value, trainer.weights(name)[key]) for key, value in found[blend].items())
    before = trainer.weights(base)
    moved = {name for name in before if not torch.equal(before[name], found[1.0][name])}
    assert moved and all(name.startswith(("lm_head", "layers.0")) for name in moved)
    for name, old in before.items():
        expected = old.lerp(found[1.0][name], 0.25) if name in moved else old
        torch.testing.assert_close(found[0.25][name], expected, atol=2e-3, rtol=2e-2)


def test_an_arm_without_gradients_is_counted_stored_and_compared(trainer: Trainer) -> None:
    counted = Arm(name="statistics", patterns=("token_bias.*",), steps=4, learning_rate=1.0)
    windows, base = [random_window(2 * i) for i in range(8)], trainer.registry.serving()
    assert base is not None
    probe = trainer.train("d000001", counted, base, 0.25, False, windows, {})
    rest = trainer.train("d000001", counted, base, 1.0, True, windows, {})
    assert rest.positions == 3 * probe.positions and rest.candidate_version == probe.candidate_version
    assert len(trainer.compare(base, rest.candidate_version, windows, 0.01).rows) == 8
    before, after = trainer.weights(base), trainer.weights(trainer.store(rest.candidate_version, "d000001"))
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"token_bias.table", "token_bias.domains", "token_bias.stamps"}


def test_pairs_are_counted_alone_or_beside_what_is_trained(trainer: Trainer) -> None:
    windows, base = [random_window(2 * i) for i in range(8)], trainer.registry.serving()
    assert base is not None
    before, tables = trainer.weights(base), []
    for number, patterns in enumerate((("token_pairs.*",), ("lm_head.*", "token_pairs.*"), ("lm_head.*",))):
        arm = Arm(name="some", patterns=patterns, steps=4, learning_rate=1e-3)
        trainer.train(f"d{number}", arm, base, 0.5, False, windows, {})
        name = trainer.train(f"d{number}", arm, base, 1.0, True, windows, {}).candidate_version
        assert len(trainer.compare(base, name, windows, 0.01).rows) == 8
        after = trainer.weights(trainer.store(name, f"d{number}"))
        moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert moved == {pattern.split(".")[0] for pattern in patterns}
        tables.append(after["token_pairs.counts"])
    # Each conversation once, whatever part of the steps the trial took; sums are rounded at every step.
    assert torch.allclose(tables[0], tables[1], atol=len(windows))


def test_counting_leaves_kinds_of_text_alone_that_it_is_not_meant_for(trainer: Trainer) -> None:
    counted = Arm(name="statistics", patterns=("token_bias.*",), steps=2, learning_rate=1.0)
    windows, base = [random_window(i) for i in range(18)], trainer.registry.serving()
    assert base is not None and {w.domain for w in windows} == {"python", "cpp"}
    meant_for = {"cpp": Focus(weight=0.5), "python": Focus(weight=0.0)}
    name = trainer.train("d000001", counted, base, 1.0, False, windows, meant_for).candidate_version
    keys = trainer.weights(name)["token_bias.domains"]
    assert keys[keys != 0].tolist() == [domain_key("cpp")]
    for few in (windows[:14], [w for w in windows if w.domain == "python"]):
        with pytest.raises(ValueError, match="meant for"):
            trainer.train("d000002", counted, base, 1.0, False, few, meant_for)


def test_parity_of_a_version_with_itself_has_no_difference(trainer: Trainer) -> None:
    from specblock.drafter.replay import replay

    base = trainer.registry.serving()
    assert base is not None
    windows = [random_window(i) for i in range(4)]
    drafter_cycles = replay(trainer_drafter(trainer, base), windows)
    live = [replace(w, drafter_version=base, accepted=r.accepted) for w, r in zip(windows, drafter_cycles, strict=True)]
    assert all(r.live_cycles == r.replay_cycles for r in trainer.parity(base, live).rows)
    assert trainer.parity("another", live).rows == ()


def test_windows_that_the_new_version_served_are_compared_at_their_live_sizes(trainer: Trainer) -> None:
    from specblock.drafter.replay import replay

    base = trainer.registry.serving()
    assert base is not None
    sizes = [(0,), (0,), (1,), *[(24, 8)] * 20]
    drawn = [replace(random_window(i, generated=40), plans=tuple(sizes[i:])) for i in range(4)]
    cycles = replay(trainer_drafter(trainer, base), drawn, recorded=True)
    live = [replace(w, drafter_version=base, accepted=r.accepted) for w, r in zip(drawn, cycles, strict=True)]
    rows = trainer.compare(base, base, live, 0.01).rows
    assert all(r.cycles_new == r.live_cycles for r in rows)
    other = trainer.compare(base, base, [replace(w, drafter_version="older") for w in live], 0.01).rows
    assert [r.cycles_new for r in other] != [r.cycles_new for r in rows], "elsewhere the usual sizes count"


def test_what_the_old_version_served_live_is_not_replayed_again(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specblock.daemon import trainer as module
    from specblock.drafter.replay import replay

    base = trainer.registry.serving()
    assert base is not None
    drawn = [random_window(i, generated=40) for i in range(8)]
    cycles = replay(trainer_drafter(trainer, base), drawn)
    live = [replace(w, drafter_version=base, accepted=r.accepted) for w, r in zip(drawn, cycles, strict=True)]
    name = trainer.train("d000001", FULL, base, 1.0, False, drawn, {}).candidate_version
    expected = [(r.cycles_old, r.cycles_new) for r in trainer.compare(base, name, drawn, 0.01).rows]
    replayed: list[int] = []

    def counting(drafter, windows, **options):  # type: ignore[no-untyped-def]
        replayed.append(len(windows))
        return replay(drafter, windows, **options)

    def compared(windows: list[Window]) -> list[tuple[int, int]]:
        replayed.clear()
        return [(r.cycles_old, r.cycles_new) for r in trainer.compare(base, name, windows, 0.01).rows]

    monkeypatch.setattr(module, "replay", counting)
    assert compared(live) == expected and replayed == [4, 8], "four to be sure, and the candidate"
    assert compared([*live[:2], *drawn[2:]]) == expected and replayed == [2, 6, 8]
    compared([replace(w, plans=((24, 8),) * len(w.accepted)) for w in live[:3]] + live[3:])
    assert replayed[-1] == 8 and sum(replayed[:-1]) == 8, "live cycles with trees of other sizes say nothing"
    broken = [replace(w, accepted=(0,) * 40) for w in live]
    assert compared(broken) == expected and replayed == [4, 4, 8], "a fault of now speaks for no candidate"


def test_the_oldest_versions_make_room_and_what_is_left_can_be_restored(trainer: Trainer) -> None:
    windows, base = [random_window(i) for i in range(2)], trainer.registry.serving()
    assert base is not None and trainer.versions() == (base,)
    stored = []
    for number in range(4):
        name = trainer.train(f"d{number:06d}", FULL, base, 0.1, False, windows, {}).candidate_version
        stored.append(trainer.store(name, f"d{number:06d}"))
        trainer.registry.promote(stored[-1])
    assert trainer.versions() == (base, stored[3], stored[2], stored[1]), "it served before the newest was stored"


def trainer_drafter(trainer: Trainer, version: str):  # type: ignore[no-untyped-def]
    return BlockDrafter(trainer._serving(version).eval(), DraftSettings())


def test_unknown_resume_and_empty_windows_are_refused(trainer: Trainer) -> None:
    with pytest.raises(ValueError, match="not in memory"):
        trainer.train("d000009", FULL, "v000000-base", 1.0, True, [random_window(0)], {})
    with pytest.raises(ValueError, match="no training windows"):
        trainer.train("d000009", FULL, "v000000-base", 1.0, False, [], {})


def test_host_swaps_while_decoding_and_the_text_stays_the_same() -> None:
    target = target_of("llama", torch.float64)

    def texts(swap: bool) -> tuple[dict[str, list[int]], EngineHost]:
        drafter = drafter_of(target)
        engine = Engine(target, drafter, EngineSettings(slots=2, capacity_tokens=120), lambda: 0.0, drafter_version="a")
        host = EngineHost(engine, store(10**9, [0.0]), 0.0, 16)
        for i in range(4):
            sampling = SamplingParams(temperature=1.0, seed=i)
            host.submit(
                GenerationRequest(
                    request_id=str(i), prompt_tokens=(2, 3, 4), sampling=sampling, max_tokens=60, ignore_eos=True
                )
            )
        if swap:
            weights = {k: v.clone() for k, v in drafter.model.state_dict().items()}
            weights["lm_head.weight"] = torch.randn_like(weights["lm_head.weight"])
            weights["token_bias.table"] = torch.randn_like(weights["token_bias.table"])
            counted = deepcopy(drafter.model.token_pairs)
            counted.count([random_window(1)])
            weights |= {f"token_pairs.{name}": value for name, value in counted.state_dict().items()}
            assert host.swap("b", weights).rows_stay_valid and drafter.model.token_pairs.used
            weights["layers.0.mlp.up_proj.weight"] = weights["layers.0.mlp.up_proj.weight"] * 1.5
            assert not host.swap("c", weights).rows_stay_valid
            with pytest.raises(ValueError, match="missing tensors"):
                host.swap("d", {})
            assert engine.drafter_version == "c"
        tokens: dict[str, list[int]] = {str(i): [] for i in range(4)}
        finished = 0
        while finished < 4:
            for chunk in host.next_chunks(10.0):
                tokens[chunk.request_id].extend(chunk.tokens)
                finished += chunk.finish_reason is not None
        return tokens, host

    plain, first = texts(swap=False)
    swapped, second = texts(swap=True)
    assert plain == swapped
    assert second.status().swaps == 2 and second.status().finished == {"length": 4}
    first.close()
    second.close()


def test_host_answers_requests_that_do_not_fit() -> None:
    engine = Engine(target_of("llama", torch.float32), None, EngineSettings(slots=1, capacity_tokens=8), lambda: 0.0)
    host = EngineHost(engine, store(10**9, [0.0]), 0.0, 4)
    host.submit(GenerationRequest(request_id="x", prompt_tokens=(2,) * 9, sampling=SamplingParams(), max_tokens=1))
    [chunk] = host.next_chunks(10.0)
    assert chunk.finish_reason == "error" and chunk.error is not None and "context length" in chunk.error
    host.close()


def test_window_holds_features_and_laws_of_its_own_tokens() -> None:
    """Against one forward over the whole text: an offset by one trains the drafter on its neighbour's labels."""
    target = target_of("llama", torch.float64)
    _, keep = run(target, drafter_of(target), random_requests(16, seed=8), slots=5)
    assert any(max(w.accepted, default=0) > 1 for w in keep.windows.values()), "paths must be deep enough to matter"
    for window in keep.windows.values():
        tokens, cache = window.tokens.to(torch.int64), target.new_cache(1, 160)
        whole = target.forward(cache, [0], tokens[None])
        law = whole.logits[0, window.prompt_tokens - 1 : -1].log_softmax(-1).topk(8)
        assert torch.allclose(window.features, whole.features[0, :-1], atol=1e-4)
        assert torch.equal(window.top_ids.long(), law.indices)
        assert torch.allclose(window.top_log_probs.double(), law.values, atol=1e-2)


def test_stop_strings_cut_text_usage_and_window_alike_with_and_without_drafts() -> None:
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 270, "eos_token_id": END}))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    target = TargetModel.from_model(model.double().eval(), TOKENIZER)
    config = replace(drafter_of(target_of("llama", torch.float64)).model.config, vocab_size=270, draft_vocab_size=270)
    drafter = BlockDrafter(new_network(config, target.embedding).double().eval(), DraftSettings(noise_scale=4.0))
    rng = Random(1)
    requests = [
        GenerationRequest(
            request_id=str(i),
            prompt_tokens=tuple(rng.randrange(256) for _ in range(rng.choice([1, 2, 9]))),
            sampling=SamplingParams(temperature=rng.choice([0.0, 0.8, 1.2]), seed=i),
            max_tokens=40,
            stop=tuple(rng.sample(["a", "b", "!", "x", "ab"], 3)),
            include_stop_str_in_output=rng.random() < 0.5,
            ignore_eos=True,
        )
        for i in range(40)
    ]

    def ended(drafter: BlockDrafter | None, slots: int) -> tuple[dict[str, tuple[list[int], str, str, int]], Keep]:
        keep = Keep()
        settings = EngineSettings(slots=slots, capacity_tokens=60, prefill_chunk_tokens=7, top_k=8)
        engine = Engine(target, drafter, settings, lambda: 0.0, keep)
        for request in requests:
            engine.submit(request)
        tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
        texts = dict.fromkeys(tokens, "")
        found = {}
        while not engine.idle:
            for chunk in engine.step():
                name = chunk.request_id
                tokens[name].extend(chunk.tokens)
                texts[name] += chunk.text
                if chunk.finish_reason is not None:
                    assert chunk.stats is not None
                    found[name] = (tokens[name], texts[name], chunk.finish_reason, chunk.stats.completion_tokens)
        return found, keep

    plain, _ = ended(None, 1)
    drafted, keep = ended(drafter, 5)
    assert drafted == plain
    cut = 0
    for request in requests:
        tokens, text, reason, usage = drafted[request.request_id]
        state, window = keep.states[request.request_id], keep.windows[request.request_id]
        assert usage == len(tokens) == window.num_generated == window.top_ids.shape[0]
        assert window.features.shape[0] == window.tokens.shape[0] - 1
        assert any(s in text for s in request.stop) == (reason == "stop" and request.include_stop_str_in_output)
        cut += reason == "stop" and sum(state.accepted) + len(state.accepted) < len(tokens)
    assert cut > 1, "stop strings must have ended inside accepted paths"


# --- the engine's thread ---


@pytest.fixture
def start() -> Iterator[Callable[..., EngineHost]]:
    """Starts hosts and closes them."""
    hosts: list[EngineHost] = []

    def begin(slots: int = 1, max_waiting: int = 4, drafter: bool = False) -> EngineHost:
        target = target_of("llama", torch.float32)
        settings = EngineSettings(slots=slots, capacity_tokens=64)
        engine = Engine(target, drafter_of(target) if drafter else None, settings, time.perf_counter)
        engine.drafter_version = "old"
        hosts.append(EngineHost(engine, store(10**9, [0.0]), 0.0, max_waiting))
        return hosts[-1]

    yield begin
    for host in hosts:
        host.close()


def short(name: str, prompt: tuple[int, ...] = (2, 3), **sampling: float) -> GenerationRequest:
    params = SamplingParams(temperature=0, **sampling)  # type: ignore[arg-type]
    return GenerationRequest(request_id=name, prompt_tokens=prompt, sampling=params, max_tokens=5, ignore_eos=True)


def ends(host: EngineHost, count: int) -> dict[str, str]:
    """Finish reasons of the next ``count`` requests that end."""
    found: dict[str, str] = {}
    begin = time.monotonic()
    while len(found) < count:
        assert time.monotonic() < begin + 20, f"only {found} ended"
        found |= {c.request_id: c.finish_reason for c in host.next_chunks(0.5) if c.finish_reason is not None}
    return found


def hold(host: EngineHost) -> threading.Event:
    """Stops the decode thread until the event is set."""
    event = threading.Event()
    host._post(lambda: event.wait(20) and None)
    return event


def test_a_request_that_cannot_be_set_up_ends_alone(start: Callable[..., EngineHost]) -> None:
    host = start()
    host.submit(short("bad", prompt=(2, 999), repetition_penalty=1.2))  # no such token
    host.submit(short("good"))
    assert ends(host, 2) == {"bad": "error", "good": "length"}
    assert host.status().phase == "ready"


def test_a_failed_cycle_costs_its_requests_and_nothing_else(start: Callable[..., EngineHost]) -> None:
    host = start()
    cycle = host.engine._cycle

    def failing(_states: object) -> list[object]:
        host.engine._cycle = cycle  # type: ignore[method-assign]
        raise RuntimeError("once")

    host.engine._cycle = failing  # type: ignore[assignment, method-assign]
    event = hold(host)
    for name in "abc":
        host.submit(short(name))
    event.set()
    assert ends(host, 3) == {"a": "error", "b": "length", "c": "length"}, "the slot must come back"
    assert host.status().phase == "ready"


def test_an_engine_that_only_fails_says_so_and_refuses(start: Callable[..., EngineHost]) -> None:
    host = start()

    def failing(_states: object) -> list[object]:
        raise RuntimeError("always")

    host.engine._cycle = failing  # type: ignore[assignment, method-assign]
    event = hold(host)
    for name in "abcde":
        host.submit(short(name))
    event.set()
    assert set(ends(host, 5).values()) == {"error"}
    host.submit(short("late"))
    assert ends(host, 1) == {"late": "error"}
    assert (host.status().phase, host.status().detail) == ("failed", "RuntimeError: always")


@pytest.mark.parametrize(("slots", "max_waiting"), [(3, 0), (2, 2)])
def test_free_slots_count_while_a_burst_waits_for_the_next_cycle(
    start: Callable[..., EngineHost], slots: int, max_waiting: int
) -> None:
    host = start(slots, max_waiting)
    event = hold(host)
    for i in range(slots + max_waiting + 1):
        host.submit(short(str(i)))
    event.set()
    reasons = list(ends(host, slots + max_waiting + 1).values())
    assert (reasons.count("length"), reasons.count("error")) == (slots + max_waiting, 1)


def test_a_swap_given_up_never_happens_and_two_at_once_both_do(start: Callable[..., EngineHost]) -> None:
    host = start(drafter=True)
    assert host.engine.drafter is not None
    weights = {name: value.clone() for name, value in host.engine.drafter.model.state_dict().items()}
    event = hold(host)
    with pytest.raises(TimeoutError):
        host.swap("late", weights, timeout_s=0.05)
    served: list[str] = []
    threads = [threading.Thread(target=lambda v=v: served.append(host.swap(v, weights, 20).version)) for v in "xy"]
    for thread in threads:
        thread.start()
    event.set()
    for thread in threads:
        thread.join(20)
    assert sorted(served) == ["x", "y"] and host.engine.drafter_version in served
    assert host.status().swaps == 2


def test_a_swap_that_breaks_is_its_callers_error(start: Callable[..., EngineHost]) -> None:
    host = start(drafter=True)
    assert host.engine.drafter is not None
    host.submit(short("a"))
    with pytest.raises(AttributeError):
        host.swap("none", dict.fromkeys(host.engine.drafter.model.state_dict()), 20)  # type: ignore[arg-type]
    assert ends(host, 1) == {"a": "length"}
    assert host.status().drafter_version == "old"
