"""What the launcher makes of its ranks' ends."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from launch.local import _outcome


def end(rank, code):
    return SimpleNamespace(exitcode=code, timestamp=rank, local_rank=rank, message=f"rank {rank} says")


def ends(*codes):
    return [end(rank, code) for rank, code in enumerate(codes) if code]


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [
        ((), 0), ((75, 75), 75), ((75, -signal.SIGTERM), 75), ((-signal.SIGTERM, -signal.SIGTERM), 75),
        ((2, -signal.SIGTERM), 2), ((1, -signal.SIGTERM), 1), ((-signal.SIGKILL, -signal.SIGTERM), 1), ((130, -15), 1),
    ],
)  # fmt: skip
def test_the_runs_exit_code(codes, outcome):
    assert _outcome(ends(*codes)) == outcome


def test_a_users_mistake_on_another_rank_is_said(capsys):
    assert _outcome(ends(0, 2)) == 2
    assert capsys.readouterr().err == "error: rank 1 says\n"


def test_a_stop_that_comes_before_the_ranks_do_is_not_lost(tmp_path):
    """The signal arrives while the agent still sets up; the ranks must nevertheless end, and nothing is left."""
    program = tmp_path / "early.py"
    program.write_text(
        "import os, signal, sys\n"
        "from launch import local\n"
        "whole = local.elastic_launch\n"
        "def late(config, entry):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    import time; time.sleep(0.5)\n"
        "    return lambda *_: whole(config, entry)('-c', 'import time; time.sleep(60)')\n"
        "local.elastic_launch = late\n"
        "sys.exit(local.run_ranks(2, ['train', 'nowhere.toml']))\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - begun < 45


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_the_first_step_loses_nothing_and_says_so(number):
    program = (
        "import os, sys, time, trainer.config as c\n"
        f"c.load_config = lambda *_: (os.kill(os.getpid(), {int(number)}), time.sleep(20))\n"
        "import trainer.cli as cli\n"
        "sys.argv = ['mikoshi', 'train', 'x.toml']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert done.stderr == "stopped outside of a step: nothing is lost, the same command goes on\n"
