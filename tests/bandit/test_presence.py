"""How long a kind of text is believed to stay."""

from __future__ import annotations

from dataclasses import replace

from specblock.bandit.actions import WindowSummary
from specblock.bandit.config import HorizonConfig
from specblock.bandit.context import build_context, watch_presence
from specblock.bandit.presence import Presence
from specblock.bandit.reach import targets
from specblock.bandit.state import BanditState
from tests.bandit.test_context import CONFIG, feed

HORIZON = HorizonConfig(hazard_prior_changes=0.5, hazard_prior_s=7200.0, cap_s=28_800.0)


def seen(*spans: tuple[float, float]) -> Presence:
    """Presence after (share, seconds) one after another, looked at every ten seconds."""
    found = Presence()
    for share, seconds in spans:
        for _ in range(int(seconds / 10)):
            found = found.watched(share, 10.0)
    return found


def test_what_stayed_is_believed_to_stay() -> None:
    fresh, old = seen((1.0, 60.0)), seen((1.0, 36_000.0))
    assert fresh.there and (fresh.ends, fresh.returns) == (0, 0)
    assert 0.3 * HORIZON.cap_s < fresh.lasting_s(1.0, HORIZON) < old.lasting_s(1.0, HORIZON) < HORIZON.cap_s


def test_bursts_are_worth_their_share_of_the_horizon() -> None:
    bursts = seen(*[(1.0, 300.0), (0.0, 1500.0)] * 20, (1.0, 100.0))
    assert bursts.there and bursts.ends == 20 and bursts.returns == 20
    # A sixth of the time is the truth; twenty bursts have not yet outweighed the prior of long stays.
    assert HORIZON.cap_s / 6 < bursts.lasting_s(1.0, HORIZON) < 0.6 * seen((1.0, 60.0)).lasting_s(1.0, HORIZON)
    away = seen(*[(1.0, 300.0), (0.0, 1500.0)] * 20)
    assert not away.there and 0 < away.lasting_s(0.0, HORIZON) < bursts.lasting_s(1.0, HORIZON)


def test_what_went_away_and_stays_away_is_worth_less_and_less() -> None:
    soon, late = (seen((1.0, 3600.0), (0.0, away_s)).lasting_s(0.0, HORIZON) for away_s in (600.0, 80_000.0))
    assert 0 < late < 0.5 * soon


def test_noise_of_a_small_share_is_no_coming_and_going() -> None:
    noisy = seen(*[(0.06, 50.0), (0.04, 50.0)] * 200)
    assert noisy.there and noisy.ends == 0


def test_nothing_is_learned_while_nothing_flows_and_the_context_holds_what_was() -> None:
    state = BanditState()
    for _ in range(40):
        feed(state, 10, 30)
        watch_presence(state, 1000.0 + state.learned, CONFIG)
    before = state.presence["default"]
    assert before.there and before.there_s > 300.0
    watch_presence(state, 9000.0, CONFIG)
    assert state.presence["default"] == before
    row = replace(build_context(state, WindowSummary(), "v1", 1400.0, CONFIG).domains[0], num_train=9)
    context = replace(build_context(state, WindowSummary(), "v1", 1400.0, CONFIG), domains=(row,))
    short, long = (
        targets(context, replace(CONFIG, horizon=replace(HORIZON, cap_s=cap_s)))[0].lasting_s for cap_s in (10.0, 1e4)
    )
    assert short is not None and long is not None and short < 10.0 < long, "another policy may have another horizon"
