"""What only a GPU can show of recovery: ranks on NCCL forked anew, saves from device memory, digests and probes made there."""

import json
import subprocess
import sys
import time

import pytest
import torch

from mikoshi.parallel.replicas import digest
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.saver import Saver
from mikoshi.trainer.checkpoint.storage.open import open_store
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.guard.straggler import Stragglers
from runs import run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_faults_on_cuda_end_as_promised(dataset, tmp_path):
    ranks = torch.cuda.device_count()
    config = run_config(
        dataset, tmp_path / "runs", train={"steps": 80, "global_batch": 8 * ranks}, checkpoint={"every": 5},
        engine={"device": "cuda", "compile": "off"}, log={"tensorboard": False}, eval={"batches": 1},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mikoshi", "chaos", "run.toml", "--ranks", str(ranks), "--faults", "6", "--json",
         "--kinds", "kill,stop,nan,preempt,launcher,corrupt"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert len(told["faults"]) == 6
    assert told["weights_equal"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_digest_is_the_same_wherever_it_is_made(dtype):
    values = torch.arange(1, 3_000_002).to(dtype)
    assert digest(values).item() == digest(values.cuda()).item()
    flipped = values.cuda()
    flipped.view(torch.uint8)[-1] ^= 1
    assert digest(flipped).item() != digest(values).item()


def test_a_save_from_device_memory_stalls_for_the_copy_alone(tmp_path):
    state = {f"model.{n}": torch.randn(1 << 24, device="cuda") for n in range(8)}
    store = open_store(tmp_path / "c", tmp_path / "scratch")
    saver = Saver(store, Keep(2), background=True)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    saver.begin(1, state, {"config": "", "data": {}})
    for tensor in state.values():
        tensor.zero_()  # the step goes on while it is written
    outcome = saver.conclude()
    assert outcome is not None
    assert outcome.error is None
    saved, manifest, _ = newest_valid(store)
    load(saved, manifest, state)
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_the_probe_of_a_devices_speed_tells_a_time():
    watch = Stragglers(torch.device("cuda", 0), [0, 0])
    deadline = time.monotonic() + 30
    while not watch.known:
        assert time.monotonic() < deadline
        watch.begin()
        torch.cuda.synchronize()
        watch.end()
    assert 0 < watch.known[0] < 1
