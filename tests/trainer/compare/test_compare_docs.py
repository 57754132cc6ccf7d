"""Every command of docs/compare.md is run as written, on a small run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mikoshi.trainer.compare.text import COLUMNS
from mikoshi.trainer.config.run import to_toml
from runs import run_config

TEXT = (Path(__file__).parents[3] / "docs" / "compare.md").read_text()


def test_the_docs_explain_every_column():
    table = TEXT.partition("| column |")[2].partition("\n\n")[0]
    named = " ".join(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE))
    for column in COLUMNS[2:]:
        if column not in ("", "middle half of steps", "in the rounds"):  # told beside what they are of
            assert column.removesuffix(" (relative)") in named, column


@pytest.mark.slow
def test_the_docs_commands_run_as_written(dataset, tmp_path):
    runs = tmp_path / "configs" / "runs"
    runs.mkdir(parents=True)
    config = run_config(dataset, "runs", run={"name": "quickstart"}, train={"steps": 40})
    (runs / "quickstart.toml").write_text(to_toml(config))
    commands = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 3
    for line in commands:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mikoshi", *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "NOT COMPLETE" not in done.stdout
    assert (tmp_path / "runs" / "compare-quickstart" / "compare.html").exists()
