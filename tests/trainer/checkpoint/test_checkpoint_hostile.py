"""A checkpoint that somebody made to hurt: nothing of it runs, nothing outside its folder is opened, and nothing is waited
for. Watched by the interpreter's own audit events, in a process of its own."""

import json
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
from pathlib import Path

import pytest
import torch

from forked import forked
from manifests import resigned
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.saver import save
from mikoshi.trainer.checkpoint.verify import step_folder
from mikoshi.trainer.errors import CheckpointError

RUNNING = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "marshal.loads",
    "ctypes.dlopen",
)  # fmt: skip


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


PICKLE = pickle.dumps(Payload())
"""Runs a command when it is unpickled."""


def tensors():
    return {"model.w": torch.arange(12.0).view(4, 3), "model.b": torch.ones(5)}


def header(table):
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


def pickled(path, _):
    """The file is a pickle, and the manifest vouches for it."""
    (path / "rank-00000.safetensors").write_bytes(PICKLE * 20)
    resigned(path)


def torch_saved(path, _):
    torch.save(Payload(), path / "rank-00000.safetensors")
    resigned(path)


def dcp_metadata(path, _):
    (path / ".metadata").write_bytes(PICKLE)


def dcp_metadata_listed(path, _):
    (path / ".metadata").write_bytes(PICKLE)
    resigned(path)


def pickle_for_a_manifest(path, _):
    (path / "manifest.json").write_bytes(PICKLE)


def swollen_header(path, _):
    (path / "rank-00000.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + bytes(200))
    resigned(path)


def header_with_other_shapes(path, _):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    (path / "rank-00000.safetensors").write_bytes(header({"model.w@0,0": entry, "model.b@0": entry}) + bytes(200))
    resigned(path)


def header_of_another_type(path, _):
    table = {
        "model.w@0,0": {"dtype": "I32", "shape": [4, 3], "data_offsets": [0, 48]},
        "model.b@0": {"dtype": "F32", "shape": [5], "data_offsets": [48, 68]},
    }
    (path / "rank-00000.safetensors").write_bytes(header(table) + bytes(68))
    resigned(path)


def header_without_the_piece(path, _):
    (path / "rank-00000.safetensors").write_bytes(header({}) + bytes(200))
    resigned(path)


def linked(path, secret):
    (path / "rank-00000.safetensors").unlink()
    (path / "rank-00000.safetensors").symlink_to(secret)
    resigned(path, {"rank-00000.safetensors": secret})


def linked_manifest(path, secret):
    shutil.copy(path / "manifest.json", secret)
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to(secret)


def linked_folder(path, secret):
    path.rename(secret.parent / "moved")
    path.symlink_to(secret.parent / "moved")


def listed_outside(path, secret):
    resigned(path, {f"../../outside/{secret.name}": secret})


def listed_absolute(path, secret):
    resigned(path, {str(secret): secret})


def fifo(path, _):
    (path / "rank-00000.safetensors").unlink()
    os.mkfifo(path / "rank-00000.safetensors")


def fifo_for_a_manifest(path, _):
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def a_socket(path, _):
    (path / "rank-00000.safetensors").unlink()
    before = Path.cwd()
    os.chdir(path)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("rank-00000.safetensors")
    finally:
        os.chdir(before)


def a_folder(path, _):
    (path / "rank-00000.safetensors").unlink()
    (path / "rank-00000.safetensors").mkdir()


def a_device(path, _):
    (path / "rank-00000.safetensors").unlink()
    try:
        os.mknod(path / "rank-00000.safetensors", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("making a device needs root")


ATTACKS = [
    pickled, torch_saved, dcp_metadata, dcp_metadata_listed, pickle_for_a_manifest, swollen_header, header_with_other_shapes,
    header_of_another_type, header_without_the_piece, linked, linked_manifest, linked_folder, listed_outside, listed_absolute,
    fifo, fifo_for_a_manifest, a_socket, a_folder, a_device,
]  # fmt: skip


def looked_at(folder):
    """Restore from a folder under watch: how that ended, what was run, and what was opened."""
    ran, opened = [], []

    def hook(event, arguments):
        if event in RUNNING:
            ran.append(f"{event} {arguments!r:.100}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            opened.append(os.fsdecode(arguments[0]))

    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors().items()}
    signal.alarm(20)  # whatever waits for a FIFO or a device does not wait for long
    sys.addaudithook(hook)
    try:
        saved, manifest, rejected = newest_valid(folder)
        load(saved, manifest, state)
        ended = ("loaded", manifest.step, rejected)
    except CheckpointError as error:
        ended = ("refused", None, [str(error)])
    return ended, all(torch.equal(state[name], tensor) for name, tensor in tensors().items()), ran, opened


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_runs_and_nothing_outside_is_opened(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").mkdir()
    secret = tmp_path / "outside" / "secret.bin"
    secret.write_bytes(bytes(200))
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(folder, step, tensors(), {"config": ""}, keep=5)
    load(*newest_valid(folder)[:2], tensors())  # what torch imports at its first call is there then
    attack(step_folder(folder, 2), secret)
    (ended, whole, ran, opened), killed_by = forked(looked_at, folder)
    assert killed_by is None
    how, step, reasons = ended
    assert reasons
    assert "step-00000002" in reasons[0]
    if how == "loaded":
        assert step == 1
        assert whole
    else:  # its digests are those of its bytes: it is refused when its pieces are
        assert "cannot be loaded" in reasons[0]
        assert "rank-00000.safetensors" in reasons[0]
    assert not ran
    assert not [name for name in opened if "outside" in name and not name.startswith(str(folder))]
    assert not (tmp_path / "executed").exists()


def test_the_watch_sees_what_it_watches_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def careless():
        ran = []
        sys.addaudithook(lambda event, _: ran.append(event) if event in RUNNING else None)
        pickle.loads(PICKLE)
        return ran

    ran, _ = forked(careless)
    assert "os.system" in ran
    assert (tmp_path / "executed").exists()
