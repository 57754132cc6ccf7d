"""A rank that dies while its peers wait for it, in any layout, ends the run with its name and its traceback: no hang."""

import os
import subprocess
import sys
import time

import pytest

from layouts import BASE, degrees
from left import left_by
from mikoshi.trainer.config.run import to_toml
from runs import run_config

# Starts the ranks as `mikoshi train` does, with no restart, for a run one of whose ranks suffers a fault.
RUN = """
import sys
from pathlib import Path
from mikoshi.launch.controller.supervisor import Job, supervise
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.chaos.plan import Fault, FaultPlan
from mikoshi.trainer.train.rank import train_supervised
from mikoshi.trainer.record.run_folder import RunFolder
run = load_config(Path("run.toml"))
RunFolder(run.run.path).make()
plan = FaultPlan((Fault(sys.argv[1], 2, "forward", 3),))
sys.exit(supervise(Job(4, train_supervised, (run, plan), RunFolder(run.run.path), run.recovery)))
"""
MARK = "MIKOSHI_TEST_MARK"


@pytest.mark.parametrize("layout", ["tp=2 pp=2", pytest.param("tp=2 zero=3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param(
            "raise",
            ["rank 3 failed:", "Traceback", "an error on purpose in step 2", "error: rank 3 ended with exit code 1"],
            marks=pytest.mark.slow,
        ),
        ("kill", ["error: rank 3 was killed (SIGKILL)", "at step 2, in forward"]),
    ],
)
def test_the_run_ends_and_says_who(dataset, tmp_path, layout, kind, said):
    config = run_config(
        dataset, tmp_path / "runs", model=BASE, parallel=degrees(layout), train={"global_batch": 16, "steps": 50},
        log={"tensorboard": False}, recovery={"restarts": 0},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, kind], capture_output=True, text=True, timeout=150, cwd=tmp_path,
        env=os.environ | {MARK: str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - begun < 120
    for text in said:
        assert text in done.stderr
    assert done.stderr.count("Traceback") <= 1, "the peers that lost it say so in a line"
    assert not left_by(MARK, str(tmp_path)), "no rank is left behind"
