"""What all ranks' pieces add up to is told exactly, however large the pieces."""

import pytest
import torch

from mikoshi.parallel.sharding import sum_of_squares


def test_the_sum_of_squares_is_the_same_of_a_matrix_and_of_its_shards():
    torch.manual_seed(0)
    whole = torch.randn(8192, 256) * 1e-3  # the embedding of a small model: fp32 sums are off by 3e-5 here
    exact = float(whole.double().square().sum())
    assert float(sum_of_squares([whole], 1)) == pytest.approx(exact, rel=1e-12)
    shards = sum(float(sum_of_squares([shard], 1)) for shard in whole.chunk(3))
    assert shards == pytest.approx(exact, rel=1e-12)
