import os
import signal
import sys
from pathlib import Path

# One thread a process keeps ranks, and tests that run at the same time, out of each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# What a script starts with `&` ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


FIRST = (
    "test_house",
    "trainer/config",
    "trainer/model",
    "data",
    "launch/config",
    "launch/host",
    "launch/operate",
    "launch/runs",
)
LAST = ("trainer/engines", "trainer/train", "trainer/compare", "parallel/test_parity", "parallel/test_any_layout",
        "parallel/test_resume", "launch/controller", "launch/cli", "cluster", "test_readme", "test_wheel", "gpu")  # fmt: skip
TESTS = str(Path(__file__).parent) + os.sep


def pytest_collection_modifyitems(items):
    """From the quick and general to the slow, so that a broken change fails in the first minute. pytest-xdist gives each of its
    two workers one half of the list: every other file goes to the second half, and both begin with the quick ones."""
    by_file = {}
    for item in items:
        by_file.setdefault(str(item.path).removeprefix(TESTS), []).append(item)
    ordered = sorted(by_file, key=lambda file: 1 - file.startswith(FIRST) + file.startswith(LAST))
    items[:] = [item for file in ordered[::2] + ordered[1::2] for item in by_file[file]]


@pytest.fixture(scope="session")
def ranks(request):
    from ranks import RankPool

    pool = RankPool(engines=any("engines" in item.nodeid for item in request.session.items))
    yield pool
    pool.end()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    from runs import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    from runs import make_conversations

    return make_conversations(tmp_path_factory.mktemp("conversations") / "made")


@pytest.fixture
def mikoshi(tmp_path, monkeypatch, capfd):
    """Call the command line in this process: returns its exit code, what it printed and its error lines."""
    from mikoshi.launch.cli import main as cli

    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mikoshi", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("error: ")]

    return call
