import os
import signal
import sys

# One thread a process keeps ranks, and tests that run at the same time, out of each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# What a script starts with `&` ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
