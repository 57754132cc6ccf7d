"""What only GPUs can show of clusters: ranks beside their GPUs, on NCCL, led by a head, and the doctor's look at them."""

import json
import subprocess
import sys

import pytest
import torch

from mikoshi.trainer.config.run import to_toml
from runs import run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def mikoshi(folder, *arguments):
    argv = [sys.executable, "-P", "-m", "mikoshi", *map(str, arguments)]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=500)


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "cluster.toml").write_text('kind = "local"\n')
    return tmp_path / "cluster.toml"


def test_a_submitted_run_trains_on_every_gpu(dataset, tmp_path, cluster):
    ranks = torch.cuda.device_count()
    config = run_config(
        dataset, "runs", train={"steps": 20, "global_batch": 8 * ranks}, engine={"device": "cuda", "compile": "off"},
        log={"tensorboard": False}, eval={"batches": 1},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))
    done = mikoshi(tmp_path, "submit", "run.toml", "--on", cluster)
    assert done.returncode == 0, done.stderr
    assert mikoshi(tmp_path, "logs", "runs/test", "-f").returncode == 0
    state = json.loads(mikoshi(tmp_path, "status", "runs/test", "--json").stdout)
    assert state["state"] == "done", state
    settings = json.loads((tmp_path / "runs/test/attempts/1/settings.json").read_text())
    assert {"NCCL_SOCKET_IFNAME", "NCCL_DEBUG"} <= {one["name"] for one in settings}


def test_the_doctor_sees_sound_gpus_and_measures_nccl(tmp_path, cluster):
    done = mikoshi(tmp_path, "doctor", "--on", cluster, "--json")
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["checks"]}
    assert done.returncode == 0, report
    assert str(torch.cuda.device_count()) in rows["GPUs"]["found"]
