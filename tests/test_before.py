"""What an earlier version has left goes on: a data set and a run of two ranks, made when modules had no common name.

tests/support/before holds them as they were written, but for the last checkpoint: its metrics go on to step 8.
"""

import shutil
from pathlib import Path

import pytest

from mikoshi.trainer.record.run_folder import read_jsonl

BEFORE = Path(__file__).parent / "support" / "before"


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_and_its_data_go_on(mikoshi, tmp_path, ranks):
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    then = [record for record in read_jsonl(tmp_path / "runs" / "before" / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in then] == list(range(1, 9))
    assert mikoshi("data", "verify", "run.toml")[0] == 0
    assert mikoshi("checkpoint", "verify", "runs/before")[0] == 0
    code, out, errors = mikoshi("train", "run.toml", "--ranks", ranks)
    assert (code, errors) == (0, [])
    assert "resumed after step 4" in out
    now = [record for record in read_jsonl(tmp_path / "runs" / "before" / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in now] == list(range(1, 9))
    for ours, theirs in zip(now, then, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
