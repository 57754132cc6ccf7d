"""The table of GPUs: whole names as drivers print them, dense figures, and nothing for what is not in it."""

import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch

from mikoshi.trainer import hardware
from mikoshi.trainer.hardware import gpu_named, table
from mikoshi.trainer.record.metrics import peak_flops

ROOT = Path(__file__).parents[2]
BF16 = {
    "NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362,
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989,
    "NVIDIA GH200 480GB": 989, "NVIDIA B200": 2250, "NVIDIA B300": 2250, "NVIDIA B300 SXM6 AC": 2250, "NVIDIA GB200": 2500,
    "NVIDIA GB300": 2500, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA A30": 165, "NVIDIA A40": 149.7, "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 6000 Ada Generation": 364.2, "NVIDIA GeForce RTX 3090": 71, "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5, "Tesla V100-SXM2-16GB": None, "Tesla V100-SXM2-32GB": None, "Tesla T4": None,
    "NVIDIA H800": 989, "NVIDIA H800 PCIe": 756, "NVIDIA H20": 148, "NVIDIA H20-3e": 148, "NVIDIA L20": 119.5,
    "NVIDIA RTX A5000": 111.1, "NVIDIA RTX A4000": 76.7, "NVIDIA GeForce RTX 3080": 59.5, "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 4080": 97.5, "NVIDIA GeForce RTX 5080": 112.6, "A100-SXM-80GB": 312, "Quadro RTX 8000": None,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8, "Tesla V100S-PCIE-32GB": None,
    "NVIDIA GeForce RTX 2080 Ti": None, "AMD Instinct MI300A": 980.6, "AMD Instinct MI350X": 2300,
    "AMD Instinct MI250X": 191.5, "AMD Instinct MI300X": 1307, "AMD Instinct MI325X": 1307, "AMD Instinct MI355X": 2500,
}  # fmt: skip
UNKNOWN = [
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA L400", "NVIDIA L", "H100", "",
    "NVIDIA A100X", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA RTX A60001", "B200",
    "NVIDIA Graphics Device", "AMD Radeon RX 7900 XTX", "NVIDIA H200 HYPOTHETICAL",
]  # fmt: skip


def shown(monkeypatch, name, precision):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    return peak_flops(torch.device("cuda", 0), precision)


@pytest.mark.parametrize(("name", "tera"), BF16.items())
def test_the_peak_of_a_name_that_drivers_print(monkeypatch, name, tera):
    assert shown(monkeypatch, name, "bf16") == (None if tera is None else pytest.approx(tera * 1e12))


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_name_that_is_not_listed_is_unknown(monkeypatch, name):
    assert gpu_named(name) is None
    assert shown(monkeypatch, name, "bf16") is None


def test_what_has_no_bf16_has_fp16(monkeypatch):
    assert shown(monkeypatch, "Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert shown(monkeypatch, "Tesla T4", "fp16") == 65e12
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_every_row_is_dense_and_whole():
    rows = tomllib.loads((ROOT / "configs/hardware/gpus.toml").read_text())["gpu"]
    names = Counter(name for row in rows for name in row["names"])
    assert max(names.values()) == 1
    assert names.keys() == table().keys()
    for gpu in table().values():
        assert gpu.source
        assert 10e9 <= gpu.memory < 400e9
        assert 0.1e12 < gpu.bandwidth < 10e12
        assert gpu.peak.keys() <= {"bf16", "fp16", "fp8", "tf32"}
        half = gpu.peak["fp16"]
        assert gpu.peak.get("bf16", half) == half
        assert gpu.peak.get("fp8", 2 * half) == pytest.approx(2 * half, rel=0.02), gpu.name
        assert gpu.peak.get("tf32", half / 2) == pytest.approx(half / 2, rel=0.02), gpu.name


def test_the_table_is_installed_with_the_package():
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert files["share/mikoshi/hardware"] == ["configs/hardware/*.toml"]
    assert hardware._PLACES[1].parts[-3:] == ("share", "mikoshi", "hardware")
