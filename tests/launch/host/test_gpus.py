"""GPUs are counted as CUDA shows them to a process, without loading it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mikoshi.launch.host.gpus import count_shown, count_visible_gpus

UUIDS = ["GPU-aa11-1", "GPU-aa22-2", "GPU-bb33-3"]
LISTS = [
    None, "", " ", "-1", "-1,0", "0,-1,1", "0,1,-1", "1", "0,1", "2,0", "0,1,2", "0,1,2,3", "3", "3,0", "0,3,1", "0,0", "1,0,1",
    "0,-1,0", "0,0,-1", "0, 1", "+1", "1gpu,2x", "0,x,1", "none", "NoDevFiles", ",0", "0,,1",
    "GPU-aa11-1", "GPU-bb33-3,GPU-aa11-1", "GPU-aa11", "GPU-aa", "GPU-zz", "GPU-aa11-1,GPU-zz,GPU-bb33-3",
    "GPU-aa11-1,GPU-aa11-1", "GPU-aa11-1,0", "GPU-aa11-1,-1",
]  # fmt: skip


@pytest.mark.parametrize("visible", LISTS)
def test_a_list_leaves_what_torch_finds(monkeypatch, visible):
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 3)
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: UUIDS)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    theirs = 3 if visible is None else torch.cuda._device_count_nvml()
    assert count_shown(3, visible, UUIDS) == theirs


@pytest.mark.parametrize(
    ("there", "visible", "count"),
    [
        (1, "-1", 0), (8, "-1,0", 0), (8, "0,-1,1", 1), (8, "0,1", 2), (8, "", 0), (8, None, 8), (2, "5", 0), (0, "0", 0),
        (8, "GPU-1,GPU-2", 2), (8, "MIG-1", 1), (8, "MIG-1,MIG-2", 1), (8, "MIG-GPU-aa/1/0", 1), (0, "MIG-1", 0),
    ],
)  # fmt: skip
def test_a_list_by_hand(there, visible, count):
    assert count_shown(there, visible) == count


@pytest.fixture
def nvidia(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    for number, uuid in enumerate(UUIDS[:2]):
        folder = tmp_path / f"proc/driver/nvidia/gpus/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t NVIDIA H200\nGPU UUID: \t {uuid}\nBus Location: \t x\n")
    return tmp_path


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("1", 1), ("0,1,2", 2), ("-1", 0), ("GPU-aa22", 1), ("GPU-zz", 0)])
def test_this_machines(nvidia, visible, count):
    assert count_visible_gpus(nvidia, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({}, 4), ({"HIP_VISIBLE_DEVICES": "-1"}, 0), ({"HIP_VISIBLE_DEVICES": "0,2"}, 2), ({"ROCR_VISIBLE_DEVICES": "1,3"}, 2),
        ({"ROCR_VISIBLE_DEVICES": "1,3", "HIP_VISIBLE_DEVICES": "1"}, 1), ({"CUDA_VISIBLE_DEVICES": "0"}, 1),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "0"}, 1), ({"ROCR_VISIBLE_DEVICES": ""}, 0),
    ],
)  # fmt: skip
def test_amds(tmp_path, env, count):
    for node, number in enumerate(("0", "0", "51234", "51235", "51236", "51237")):  # two sockets of CPU, four GPUs
        folder = tmp_path / "sys/class/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        (folder / "gpu_id").write_text(f"{number}\n")
    assert count_visible_gpus(tmp_path, env) == count


def test_makefile_counts_with_it_on_plain_python():
    """`make train` runs it before anything is installed."""
    root = Path(__file__).parents[3]
    (line,) = [line for line in (root / "Makefile").read_text().splitlines() if line.startswith("RANKS")]
    code = line.partition("-c '")[2].rpartition("'")[0]
    assert "count_visible_gpus()" in code
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) in (1, 2, 4, 8, 16)
