"""A rank that dies while its peers wait for it, in any layout, ends the run with its name and its traceback: no hang."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from layouts import BASE, degrees
from runs import run_config
from trainer.config import to_toml

# What Python runs first in every process, when its folder is on the path: rank 3 breaks at its second step.
BREAK = """
import os
if os.environ.get("RANK") == "3":
    from parallel.pipeline import Pipeline
    step, calls = Pipeline.step, []
    def broken(self, micro_batches):
        calls.append(1)
        if len(calls) == 2:
            {how}
        return step(self, micro_batches)
    Pipeline.step = broken
"""


@pytest.mark.parametrize("layout", ["tp=2 pp=2", pytest.param("tp=2 zero=3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "raise RuntimeError('the fault of rank three')",
            ["rank 3 failed:", "Traceback", "the fault of rank three", "error: rank 3 ended with exit code 1"],
        ),
        ("os.kill(os.getpid(), 9)", ["error: rank 3 ended with SIGKILL"]),
    ],
    ids=["raises", "killed"],
)  # fmt: skip
def test_the_run_ends_and_says_who(dataset, tmp_path, layout, how, said):
    config = run_config(
        dataset, tmp_path / "runs", model=BASE, parallel=degrees(layout), train={"global_batch": 16, "steps": 50},
        log={"tensorboard": False},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(BREAK.format(how=how))
    env = os.environ | {"PYTHONPATH": str(tmp_path / "first")}
    command = [sys.executable, "-P", "-m", "trainer.cli", "train", str(tmp_path / "run.toml"), "--ranks", "4"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - begun < 120
    for text in said:
        assert text in done.stderr
    assert done.stderr.count("Traceback") <= 1, "the peers that lost it say so in a line"
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "run.toml") in (p.info["cmdline"] or [])]
    assert not left, "no rank is left behind"
