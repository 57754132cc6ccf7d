"""Every command of docs/accelerate.md is run as written, on a small run."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from mikoshi.trainer.config.run import to_toml
from runs import run_config
from whole import run_whole

pytest.importorskip("accelerate")

TEXT = (Path(__file__).parents[3] / "docs" / "accelerate.md").read_text()


@pytest.mark.slow
def test_its_commands_run_as_written(dataset, tmp_path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = run_config(dataset, Path("runs"), run={"name": "run"}, train={"steps": 2}, engine={"device": "cpu"})
    (tmp_path / "plain.toml").write_text(to_toml(config))
    (tmp_path / "run.toml").write_text('base = ["plain.toml", "layout.toml"]\n')
    (tmp_path / "fine-tune.toml").write_text('base = "plain.toml"\n[run]\nname = "fine-tune"\n[recovery]\nrestarts = 0\n')
    ClusterConfig(
        compute_environment="LOCAL_MACHINE", distributed_type="MULTI_CPU", mixed_precision="no", use_cpu=True, debug=False,
        num_processes=2,
    ).to_yaml_file(tmp_path / "default_config.yaml")  # fmt: skip
    (launch,) = re.findall(r"```\n(accelerate launch .*)\n```", TEXT)
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 5
    lines.insert(2, launch)
    for line in lines:
        words, _, target = line.partition(" > ")
        program, *arguments = shlex.split(words)
        module = {"mikoshi": "mikoshi", "accelerate": "accelerate.commands.accelerate_cli"}[program]
        if program == "accelerate":  # a port that is free
            arguments[1:1] = ["--main_process_port", "0"]
        done = run_whole([sys.executable, "-P", "-m", module, *arguments], cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if target:
            (tmp_path / target).write_text(done.stdout)
    assert (tmp_path / "runs/fine-tune/checkpoints/step-00000002").is_dir()
    assert (tmp_path / "weights/model.safetensors").exists() or (tmp_path / "weights/model.safetensors.index.json").exists()
