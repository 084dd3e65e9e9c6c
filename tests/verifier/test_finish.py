"""Where a run of chosen tokens ends."""

from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.verifier.finish import Ending, truncate_at_end


def test_goes_on_without_a_reason_to_stop():
    assert truncate_at_end([5, 6, 7], tokens_left=4, eos_token_ids={1}) == Ending(3, 3, None)


def test_end_of_text_inside_an_accepted_path_counts_but_is_not_shown():
    assert truncate_at_end([5, 1, 7], tokens_left=9, eos_token_ids={1}) == Ending(2, 1, "stop")


def test_ignored_end_of_text_does_not_silence_stop_tokens():
    kwargs = {"tokens_left": 9, "eos_token_ids": {1}, "stop_token_ids": {7}, "ignore_eos": True}
    assert truncate_at_end([1, 7, 5], **kwargs) == Ending(2, 1, "stop")
    assert truncate_at_end([1, 5], **kwargs) == Ending(2, 2, None)


def test_a_token_that_is_both_end_of_text_and_stop_token_stops_although_ignored():
    assert truncate_at_end([1], tokens_left=9, eos_token_ids={1}, stop_token_ids={1}, ignore_eos=True).num_kept == 1


def test_the_limit_cuts_a_path():
    assert truncate_at_end([5, 6, 7], tokens_left=2) == Ending(2, 2, "length")
    assert truncate_at_end([5, 6], tokens_left=2) == Ending(2, 2, "length")


def test_a_terminator_as_last_allowed_token_is_a_stop_and_behind_the_limit_is_not_seen():
    assert truncate_at_end([5, 1], tokens_left=2, eos_token_ids={1}) == Ending(2, 1, "stop")
    assert truncate_at_end([5, 6, 1], tokens_left=2, eos_token_ids={1}) == Ending(2, 2, "length")


@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 12), max_size=12),
    limit=st.integers(1, 12),
    eos=st.sets(st.integers(0, 5), max_size=2),
)
@settings(max_examples=200, deadline=None)
def test_the_cut_does_not_depend_on_how_tokens_arrive(tokens, cuts, limit, eos):
    whole = truncate_at_end(tokens, tokens_left=limit, eos_token_ids=eos)
    kept, reason, rest = 0, None, list(tokens)
    for size in [*cuts, len(tokens)]:
        if reason is None and rest:
            part, rest = rest[:size], rest[size:]
            ending = truncate_at_end(part, tokens_left=limit - kept, eos_token_ids=eos)
            kept, reason = kept + ending.num_kept, ending.finish_reason
    assert (kept, reason) == (whole.num_kept, whole.finish_reason)
