"""The order of samples: a bijection of any size that looks shuffled and costs the same anywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mikoshi.data.sampling.shuffle import permute


@given(st.integers(1, 5000), st.text(max_size=8))
def test_every_sample_comes_exactly_once(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(st.integers(1, 10**13), st.data())
def test_any_index_alone_is_what_it_is_in_company(n, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(index, n, "k")
    assert ((together >= 0) & (together < n)).all()
    assert [int(permute(np.array([i]), n, "k")[0]) for i in index] == together.tolist()


def chi_square_is_usual(counts, expected):
    """Within five standard deviations of the mean of a chi-square distribution."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = counts.size - 1
    return abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    "n", [1000, pytest.param(65_536, marks=pytest.mark.slow), pytest.param(99_991, marks=pytest.mark.slow)]
)
def test_samples_land_evenly_and_neighbours_part(n):
    keys, parts = 200, 10
    pairs, steps = np.zeros((parts, parts)), []
    for key in range(keys):
        out = permute(np.arange(n), n, f"{key}")
        where_from, where_to = np.arange(n) * parts // n, out * parts // n
        np.add.at(pairs, (where_from, where_to), 1)
        steps.append(np.corrcoef(out[:-1], out[1:])[0, 1])
    # A permutation fixes the margins, which takes degrees of freedom away: too even would show here as well.
    expected = pairs.sum() / parts**2
    statistic = ((pairs - expected) ** 2 / expected).sum()
    assert statistic < (parts - 1) ** 2 + 5 * np.sqrt(2 * (parts - 1) ** 2)
    assert abs(np.mean(steps)) < 5 / np.sqrt(keys * n)
    firsts = np.array([permute(np.array([0]), n, f"{key}")[0] * parts // n for key in range(3000)])
    assert chi_square_is_usual(np.bincount(firsts, minlength=parts), 300)


def test_another_key_is_another_order():
    a, b = permute(np.arange(10_000), 10_000, "1:epoch:0"), permute(np.arange(10_000), 10_000, "1:epoch:1")
    assert (a == b).sum() < 20
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
