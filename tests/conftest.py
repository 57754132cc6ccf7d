import os

# Two cores: one thread a process keeps the ranks of a multi-rank test out of each other's way.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def ranks():
    from ranks import RankPool

    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    from runs import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data"))
