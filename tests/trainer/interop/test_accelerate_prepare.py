"""prepare(): each of accelerate's silent downgrades is an error, in real processes of it, and the good cases train."""

import json
import os
import sys
from pathlib import Path

import pytest

from mikoshi.trainer.config.run import to_toml
from runs import TINY_MODEL, run_config
from whole import run_whole

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).parents[2] / "support" / "accelerated.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def train(dataset, tmp_path, case, how, **env):
    """What each process of a case says."""
    config = run_config(dataset, tmp_path, model=TINY_MODEL, train={"steps": 4})
    (tmp_path / "run.toml").write_text(to_toml(config))
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "FSDP_"))}
    (out := tmp_path / case).mkdir(exist_ok=True)
    done = run_whole(
        [sys.executable, *how, str(SCRIPT), case, str(tmp_path / "run.toml"), str(out)], cwd=tmp_path,
        env=plain | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HOME": str(tmp_path / "hf"),
                     "PYTHONPATH": str(Path(__file__).parents[3])} | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(path.read_text()) for path in sorted(out.iterdir())]


def two(dataset, tmp_path, case, **env):
    found = train(dataset, tmp_path, case, [*TORCHRUN, "2"], **env)
    assert len(found) in (1, 2)
    return found


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """The same script and the same rows in one process with no launcher."""
    (message,) = train(dataset, tmp_path_factory.mktemp("alone"), "ddp", [])
    assert message["model"] == "LlamaForCausalLM"
    return message["losses"]


@pytest.mark.slow
def test_ddp_of_two_trains_as_one_does(dataset, tmp_path, alone):
    found = two(dataset, tmp_path, "ddp")
    assert [message["model"] for message in found] == ["DistributedDataParallel"] * 2
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0]


@pytest.mark.slow
def test_a_model_that_accelerate_compiles_is_looked_into(dataset, tmp_path, alone):
    found = two(dataset, tmp_path, "ddp-compiled")
    assert [message["model"] for message in found] == ["OptimizedModule"] * 2
    assert found[0]["losses"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_deepspeed_of_two_trains_as_one_does(dataset, tmp_path, alone):
    found = two(dataset, tmp_path, "deepspeed")
    assert [message["model"] for message in found] == ["DeepSpeedEngine"] * 2
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "notice"),
    [
        (
            "deepspeed-cpu",
            "DeepSpeed was asked for, and accelerate's distributed_type is MULTI_CPU, of 2 processes: what would",
        ),
        ("fsdp2-cpu", "FSDP was asked for, and accelerate's distributed_type is MULTI_CPU, of 2 processes"),
        ("fsdp2", "2 processes were started, and accelerate's distributed_type is NO, of 1 processes"),
        ("fsdp2-gloo", "FSDP was asked for, and accelerate's distributed_type is NO, of 2 processes"),
        ("no-cpu-flag", "2 processes were started, and accelerate's distributed_type is NO, of 1 processes"),
        ("ddp-bf16", 'precision = "fp32": accelerate computes in mixed precision "bf16"'),
    ],
)
def test_a_silent_downgrade_is_an_error(dataset, tmp_path, case, notice):
    for message in two(dataset, tmp_path, case):
        assert message.get("error", "it trained").startswith(notice)


@pytest.mark.slow
def test_one_process_of_two_is_an_error(dataset, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    (message,) = train(dataset, tmp_path, "launched", launch)
    assert message["error"].startswith("accelerate launch: several processes were asked for, and this is the only one")


def test_ranks_that_nobody_started():
    from accelerate import Accelerator

    from mikoshi.trainer.errors import ConfigError
    from mikoshi.trainer.interop.accelerate.prepare import prepare

    with pytest.raises(ConfigError, match=r"ranks = 2: this is one process alone.*torchrun --nproc-per-node 2"):
        prepare(Accelerator(cpu=True), ranks=2)
