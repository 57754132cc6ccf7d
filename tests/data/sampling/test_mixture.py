"""After any number of samples every source has had its share to within one, whatever the weights and their changes."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.data.errors import DataError
from mikoshi.data.sampling.curriculum import MixtureRequest, check_skips, new_history, read_history
from mikoshi.data.sampling.mixture import FINEST, FOREVER, MixtureStage, make_mixture, whole_weights

WEIGHTS = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@st.composite
def mixtures(draw):
    first = draw(WEIGHTS)
    sources = len(first)
    later = draw(
        st.dictionaries(
            st.integers(1, 300), st.lists(st.integers(0, 9), min_size=sources, max_size=sources).filter(any), max_size=3
        )
    )
    stages = [MixtureStage(0, tuple(first)), *(MixtureStage(start, tuple(w)) for start, w in sorted(later.items()))]
    caps = draw(st.lists(st.none() | st.integers(0, 150), min_size=sources, max_size=sources))
    return make_mixture([f"s{k}" for k in range(sources)], stages, caps), caps


def walked(mixture, length):
    """The order sample by sample, with nothing of the tables: each source's count beside its share."""
    source, draw = mixture.locate(np.arange(length, dtype=np.int64))
    counts = np.zeros(len(mixture.names), dtype=int)
    for position in range(length):
        assert draw[position] == counts[source[position]]
        counts[source[position]] += 1
        yield position + 1, counts


@given(mixtures())
@settings(max_examples=50, deadline=None)
def test_every_count_is_within_one_of_its_share_at_every_position(made):
    mixture, caps = made
    for position, counts in walked(mixture, min(mixture.end, 500)):
        due = mixture.shares(position)
        assert sum(due) == position
        assert max(abs(Fraction(int(c)) - d) for c, d in zip(counts, due, strict=True)) < 1
        assert all(cap is None or c <= cap for c, cap in zip(counts, caps, strict=True))
        if position % 41 == 0:
            assert (mixture.counts(position) == counts).all()


@given(mixtures(), st.data())
@settings(max_examples=60, deadline=None)
def test_entering_anywhere_gives_what_walking_there_gives(made, data):
    mixture, _ = made
    length = min(mixture.end, 800)
    if not length:
        return
    walked_source, walked_draw = mixture.locate(np.arange(length, dtype=np.int64))
    places = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20)), dtype=np.int64)
    source, draw = make_mixture(mixture.names, mixture.stages, [None] * len(mixture.names)).locate(places)
    assert (source == walked_source[places]).all()
    assert (draw == walked_draw[places]).all()


def test_a_trillion_samples_in_the_counts_are_exact():
    mixture = make_mixture(["a", "b", "c"], [MixtureStage(0, (5, 3, 2)), MixtureStage(10**9 + 7, (1, 1, 1))], [None] * 3)
    at = 10**12 + 12345
    assert max(abs(c - d) for c, d in zip(mixture.counts(at).tolist(), mixture.shares(at), strict=True)) < 1
    source, draw = mixture.locate(np.array([at]))
    assert draw[0] == mixture.counts(at)[source[0]]


def test_a_source_that_is_spent_leaves_its_part_to_the_others():
    mixture = make_mixture(["a", "b"], [MixtureStage(0, (1, 1))], [10, None])
    source, _ = mixture.locate(np.arange(100, dtype=np.int64))
    assert (source[:20] == 0).sum() == 10
    assert (source[20:] == 1).all()
    assert mixture.end == FOREVER


def test_the_end_is_where_all_are_spent():
    mixture = make_mixture(["a", "b"], [MixtureStage(0, (3, 1))], [30, 20])
    assert 48 <= mixture.end <= 50
    assert (mixture.counts(mixture.end) <= [30, 20]).all()


def test_weights_become_whole_numbers_exactly_or_to_the_finest():
    assert whole_weights({"a": 0.5, "b": 0.3, "c": 0.2}) == {"a": 5, "b": 3, "c": 2}
    assert whole_weights({"a": 3, "b": 1}) == {"a": 3, "b": 1}
    odd = whole_weights({"a": 1234567891, "b": 987654321})
    assert abs(odd["a"] / sum(odd.values()) - 1234567891 / (1234567891 + 987654321)) <= 1 / FINEST
    for wrong, message in [
        ({"a": -1.0}, "not negative"),
        ({"a": 0.0, "b": 0.0}, "every weight is 0"),
        ({"a": 1.0, "b": 1e-9}, "raise it"),
    ]:
        with pytest.raises(DataError, match=message):
            whole_weights(wrong)


def asked(weights, caps=None):
    return MixtureRequest(((0, weights),), {name: (caps or {}).get(name) for name in weights})


def test_a_change_on_the_way_keeps_the_past_and_every_share():
    history = new_history(asked({"a": 3.0, "b": 1.0}, {"a": 40}))
    changed = history.with_change(asked({"b": 1.0, "c": 2.0}), 75).with_change(asked({"b": 1.0, "c": 1.0}), 130)
    again = read_history(changed.record())
    assert again == changed
    old, new = ([h.names[k] for k in h.locate(np.arange(300, dtype=np.int64))[0].tolist()] for h in (history, again))
    assert old[:75] == new[:75]
    assert set(new[75:]) == {"b", "c"}
    assert abs(new[75:130].count("c") - 55 * 2 / 3) < 1
    assert abs(new[130:].count("c") - 85) < 1
    assert again.weights(74) == {"a": 0, "b": 1}, "a had given its 40"
    assert again.weights(100) == {"b": 1, "c": 2}
    seen = {name: [] for name in again.names}
    for name, draw in zip(new, again.locate(np.arange(300, dtype=np.int64))[1].tolist(), strict=True):
        seen[name].append(draw)
    assert all(draws == list(range(len(draws))) for draws in seen.values()), "no sample is repeated or left out"
    assert again.counts(300) == {name: len(draws) for name, draws in seen.items()}


def test_only_what_is_to_come_can_be_left_out():
    check_skips([(5, 9)], ((5, 9), (20, 30)), 20)
    for old, new in [([], ((5, 9),)), ([(5, 9)], ()), ([(5, 9)], ((5, 12),))]:
        with pytest.raises(DataError, match="consumed already"):
            check_skips(old, new, 20)
