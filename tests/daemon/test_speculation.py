"""The gate by itself: when a kind of text goes off, is probed, and comes back."""

from __future__ import annotations

import numpy as np
import pytest

from specblock.daemon.speculation import GateSettings, Participant, SpeculationGate


def feed(gate: SpeculationGate, domain: str, tokens: float, cycles: int, request: str = "r") -> None:
    """Cycles of one request that commit ``tokens`` on average; a plain cycle takes 10 ms, a drafted one 20 ms."""
    owed = 0.0
    for _ in range(cycles):
        requests = [Participant(request, domain)]
        speculate = gate.decide(requests, lambda: (0.02, 0.01))
        owed += tokens if speculate[0] else 1.0
        cycle_s = 0.02 if speculate[0] else 0.01
        gate.record(requests, speculate, [int(owed)], cycle_s, cycle_s, 0.01)
        owed -= int(owed)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_hopeless_drafter_goes_off_early(batch: int) -> None:
    gate = SpeculationGate(GateSettings(min_cycles=24))
    cycles = 0
    while gate.is_on("x"):
        gate.record([Participant(f"r{b}", "x") for b in range(batch)], [True] * batch, [1] * batch, 0.02, 0.02, 0.01)
        cycles += 1
    assert cycles == {1: 33, 4: 4}[batch], "one request alone may just suit the drafter badly"


def test_one_stall_does_not_end_speculation_of_a_batch() -> None:
    gate, eight = SpeculationGate(), [Participant(f"r{b}", "x") for b in range(8)]
    for number in range(6):  # pays 1.3 times, but the first cycle takes twice as long, the most that is counted
        seconds = 0.0154 * (2 if number == 0 else 1)
        gate.record(eight, [True] * 8, [2] * 8, seconds, seconds, 0.01)
        assert gate.is_on("x")


@pytest.mark.parametrize(("acceptance", "speed"), [(1.6, 1.2), (2.2, 1.2), (3.0, 1.2), (3.0, 1.3)])
def test_what_pays_is_hardly_ever_taken_for_hopeless(acceptance: float, speed: float) -> None:
    wrong = 0
    for seed in range(200):
        draws, gate = np.random.default_rng(seed), SpeculationGate()
        for tokens in draws.geometric(1 / acceptance, size=23).tolist():
            gate.record([Participant("r", "x")], [True], [tokens], acceptance / speed, acceptance / speed, 1.0)
        wrong += not gate.is_on("x")
    assert wrong <= 8


def test_bad_luck_alone_does_not_end_speculation_early() -> None:
    gate = SpeculationGate(GateSettings(min_cycles=24))
    gate.record([Participant("r0", "x")], [True], [4], 0.02, 0.02, 0.01)
    for number in range(11):  # 2.0 tokens a cycle pay here; a dozen of cycles at 1.6 may be chance
        gate.record([Participant(f"r{number % 3}", "x")], [True], [2], 0.02, 0.02, 0.01)
        gate.record([Participant("r1", "x")], [True], [1], 0.02, 0.02, 0.01)
        assert gate.is_on("x")
    gate.record([Participant("r1", "x")], [True], [1], 0.02, 0.02, 0.01)
    gate.record([Participant("r1", "x")], [True], [1], 0.02, 0.02, 0.01)
    assert not gate.is_on("x")  # by now the estimate itself counts


def test_one_request_that_suits_the_drafter_badly_does_not_end_speculation() -> None:
    """It would have to win 1.9 tokens a cycle and wins 1.35; the others win 3."""
    gate, owed = SpeculationGate(), 0.0
    for name, tokens in (("first", 1.35), ("good", 3.0), ("bad", 1.35), ("good again", 3.0)):
        for _ in range(45):
            owed += tokens
            gate.record([Participant(name, "x")], [True], [int(owed)], 0.019, 0.019, 0.01)
            owed -= int(owed)
            assert gate.is_on("x"), name
    for number in range(200):
        gate.record([Participant(f"bad {number // 45}", "x")], [True], [1], 0.019, 0.019, 0.01)
    assert not gate.is_on("x"), "several of them do"


def test_hysteresis_needs_a_clear_gain_to_come_back() -> None:
    gate = SpeculationGate(GateSettings(on_above=1.2))
    feed(gate, "d", 1.5, 200)
    assert not gate.is_on("d")
    feed(gate, "d", 2.2, 8000)  # 1.1 times plain: enough to stay on, too little to come back
    assert not gate.is_on("d") and gate.probes > 0
    feed(gate, "d", 3.0, 8000)
    assert gate.is_on("d")
    feed(gate, "d", 2.2, 1000)
    assert gate.is_on("d")


def test_a_probe_is_one_request_in_consecutive_cycles() -> None:
    gate = SpeculationGate(GateSettings(probe_cycles=5))
    feed(gate, "d", 0.0, 100)
    gate.drafter_changed()
    requests = [Participant(name, "d") for name in "abc"]
    chosen = []
    for _ in range(5):
        speculate = gate.decide(requests, lambda: (0.02, 0.01))
        assert sum(speculate) == 1 and gate.is_probe(requests, speculate)
        chosen.append(speculate.index(True))
        gate.record(requests, speculate, [1, 1, 1], 0.02, 0.02, 0.01)
    assert len(set(chosen)) == 1
    assert gate.decide(requests, lambda: (0.02, 0.01)) == (False, False, False)


def test_an_ended_request_hands_its_probe_on() -> None:
    gate = SpeculationGate(GateSettings(probe_cycles=4))
    feed(gate, "d", 0.0, 100)
    gate.drafter_changed()
    for name in "aabb":
        requests = [Participant(name, "d")]
        speculate = gate.decide(requests, lambda: (0.02, 0.01))
        assert speculate == (True,)
        gate.record(requests, speculate, [4], 0.02, 0.02, 0.01)
    assert gate.is_on("d")


@pytest.mark.parametrize(("tokens", "comes_back"), [(1, False), (3, True)])
def test_a_domain_that_is_off_is_probed_beside_one_that_is_on(tokens: int, comes_back: bool) -> None:
    """Busy servers always decode something that speculates: an off domain must not have to wait for a quiet moment."""
    gate = SpeculationGate()
    feed(gate, "off", 0.0, 100)
    assert not gate.is_on("off")
    for cycle in range(8000):
        crowd = [Participant("a", "on"), Participant(f"b{cycle // 7}", "off")]
        speculate = gate.decide(crowd, lambda: (0.02, 0.01))
        assert speculate[0] and not (speculate[1] and gate.is_probe(crowd, speculate)), "the others are not probed"
        gate.record(crowd, speculate, [3, tokens if speculate[1] else 1], 0.02, 0.02, 0.0125)
        if gate.is_on("off"):
            break
    assert gate.is_on("off") == comes_back and gate.is_on("on")
    assert gate.probes > 0 and gate.lost_share <= 1.05 * GateSettings().probe_share


def test_after_a_swap_an_off_domain_is_probed_at_once_beside_others() -> None:
    gate = SpeculationGate(GateSettings(probe_cycles=4))
    feed(gate, "off", 0.0, 100)
    gate.drafter_changed()
    crowd = [Participant("a", "on"), Participant("b", "off")]
    for _ in range(4):
        assert gate.decide(crowd, lambda: (0.02, 0.01)) == (True, True)
        gate.record(crowd, (True, True), [3, 3], 0.02, 0.02, 0.0125)
    assert gate.is_on("off")


def test_speculating_requests_are_charged_for_holding_up_the_others() -> None:
    """Two tokens a cycle of 15 ms instead of 10 ms: worth it alone, not with three who wait."""
    gate = SpeculationGate()
    alone, crowd = [Participant("a", "alone")], [Participant("a", "crowd"), *[Participant(n, "other") for n in "xyz"]]
    for _ in range(100):
        gate.record(alone, (True,), [2], 0.015, 0.015, 0.01)
        gate.record(crowd, (True, False, False, False), [2, 1, 1, 1], 0.015, 0.015, 0.01)
    assert gate.is_on("alone") and not gate.is_on("crowd")


def test_the_number_of_domains_is_bounded() -> None:
    gate = SpeculationGate(GateSettings(max_domains=3))
    for index in range(50):
        gate.record([Participant("r", f"d{index}")], (True,), [1], 0.02, 0.02, 0.01)
    assert len(gate.speeds()) <= 4


def test_a_domain_not_seen_for_long_gives_its_place_to_a_new_one() -> None:
    gate = SpeculationGate(GateSettings(max_domains=3, forget_cycles=10))
    for name in ("a", "b", "c", "d"):
        gate.is_on(name)
    assert set(gate.speeds()) == {"a", "b", "c", ""}
    for _ in range(12):
        gate.record([Participant("r", "b")], [True], [2], 1.0, 1.0, 1.0)
    gate.is_on("d")
    assert {"b", "d"} <= set(gate.speeds()) and len(gate.speeds()) == 4


def test_a_domain_pays_for_the_prompts_its_drafter_absorbs() -> None:
    """3 % faster cycles, but ten plain cycles of absorbing for every 60 that are made."""
    request = [Participant("r", "x")]
    for prompt_cycles, stays_on in ((0.0, True), (10.0, False)):
        gate = SpeculationGate(GateSettings(min_cycles=24))
        for cycle in range(600):
            if cycle % 60 == 0:
                gate.absorbed("x", prompt_cycles)
            gate.record(request, [gate.is_on("x")], [2 if gate.is_on("x") else 1], 2 / 1.03, 2 / 1.03, 1.0)
        assert gate.is_on("x") == stays_on
        if not stays_on:  # and a probe, which absorbs nothing by itself, does not forget it
            gate._state("x").budget.grant()
            for _ in range(gate.settings.probe_cycles):
                assert gate.decide(request, lambda: (0.01, 0.01)) == (True,)
                gate.record(request, [True], [2], 2 / 1.06, 2 / 1.06, 1.0)
            assert not gate.is_on("x")


@pytest.mark.parametrize("length", [50, 200])
def test_probes_that_lose_little_do_not_spend_what_others_save_for(length: int) -> None:
    gate = SpeculationGate()
    for number in range(6):
        feed(gate, "near", 1.8, 80, f"a{number}")
        feed(gate, "far", 1.0, 80, f"b{number}")
    assert not gate.is_on("near") and not gate.is_on("far")
    for number in range(40_000 // length):
        feed(gate, "near", 1.9, length, f"c{number}")
        feed(gate, "far", 3.2, length, f"d{number}")
    assert gate.is_on("far") and gate.probes > 4


def test_where_drafts_nearly_pay_there_are_many_probes_whatever_others_lose() -> None:
    gate, probes = SpeculationGate(), {"near": 0, "far": 0}
    for number in range(6):
        feed(gate, "near", 1.8, 80, f"a{number}")
        feed(gate, "far", 1.0, 80, f"b{number}")
    for number in range(200):
        for domain, tokens in (("near", 1.9), ("far", 1.0)):
            before = gate.probes
            feed(gate, domain, tokens, 200, f"{domain}{number}")
            probes[domain] += gate.probes - before
    assert probes["near"] > 3 * probes["far"] > 0
    assert not gate.is_on("near") and not gate.is_on("far")


def test_probes_of_short_requests_add_up() -> None:
    gate = SpeculationGate()
    for number in range(6):
        feed(gate, "short", 1.0, 80, f"a{number}")
    assert not gate.is_on("short")
    gate.is_on("other")
    for number in range(3000):
        feed(gate, "short", 3.0, 9, f"b{number}")
        feed(gate, "other", 4.0, 5, f"c{number}")
    assert gate.is_on("short")


def test_one_dear_prompt_is_not_charged_to_probes_for_ever() -> None:
    gate = SpeculationGate()
    gate.absorbed("x", 100.0)
    feed(gate, "x", 1.0, 60, "first")
    assert not gate.is_on("x")
    gate.drafter_changed()
    for number in range(400):
        feed(gate, "x", 4.0, 50, f"r{number}")
    assert gate.is_on("x")
