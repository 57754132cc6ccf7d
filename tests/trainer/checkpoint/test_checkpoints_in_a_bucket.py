"""Checkpoints in a real S3 endpoint are as those in a folder: all or nothing, of any layout, refused by name when damaged."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faulty import Fault, faulty_s3
from mikoshi.trainer.checkpoint import restore
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.saver import Saver
from mikoshi.trainer.checkpoint.storage.bucket import open_remote_store
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.errors import CheckpointError
from runs import data_layout, loader_of, run_config

RECORD = {"config": "x = 1", "fingerprint": "f"}
ROOT = Path(__file__).parents[3]


@pytest.fixture
def s3():
    with faulty_s3({}) as server:
        yield server


@pytest.fixture
def place(s3, tmp_path):
    """An address of its own: the endpoint forgets nothing as long as this process lives."""
    return f"{s3.url}/{tmp_path.name}"


def opened(url, options, scratch):
    return open_remote_store(url, scratch, options, part=5 << 20)


def save(store, step, state, background=False):
    saver = Saver(store, Keep(2), background)
    saver.begin(step, state, RECORD)
    return saver.conclude()


def save_trained(config, zero, url, options, scratch):
    import torch.distributed as dist

    layout = data_layout(config, dist.get_world_size(), zero)
    engine = build_engine(config, layout, torch.device("cpu"))
    loader = loader_of(config, layout, dist.get_rank())
    for step in range(2):
        engine.step(loader.batch(step), 1e-2)
    outcome = save(opened(url, options, scratch), 2, engine.state(), background=True)
    assert outcome.error is None
    return whole(engine)


def restore_fresh(config, zero, url, options, scratch):
    import torch.distributed as dist

    store = opened(url, options, scratch)
    engine = build_engine(config, data_layout(config, dist.get_world_size(), zero), torch.device("cpu"))
    saved, manifest, _ = newest_valid(store)
    state = engine.state()
    load(saved, manifest, state)
    engine.load_state(state)
    return whole(engine)


def whole(engine):
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in engine.state().items()}


def test_saved_by_two_ranks_and_restored_by_any_number(ranks, dataset, tmp_path, s3, place):
    config = run_config(dataset, tmp_path)
    s3.plan_changes(Fault(status=503), None, Fault(lost=True))
    saved = ranks.run(save_trained, config, 3, place, s3.options, tmp_path / "scratch", world=2)[0]
    assert sum("rank-0000" in change for change in s3.changes) >= 2
    for world, zero in ((1, 0), (4, 2)):
        s3.forget()
        s3.plan(Fault(status=503), Fault(send=50, cut=True))
        scratch = tmp_path / f"{world}"  # another node
        for found in ranks.run(restore_fresh, config, zero, place, s3.options, scratch, world=world):
            assert found.keys() == saved.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, saved[name]), name
        requested = [name for name in s3.requests if name.endswith(".safetensors")]
        assert len(requested) <= len(set(requested)) + 2, "each file once for the node, and once more for each fault"


KILLED = """
import sys
from pathlib import Path
import torch
from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.saver import Saver
from mikoshi.trainer.checkpoint.storage.bucket import open_remote_store
url, endpoint, scratch = sys.argv[1:]
options = {"endpoint": endpoint, "region": "us-east-1", "access_key_id": "test", "secret_access_key": "test"}
saver = Saver(open_remote_store(url, Path(scratch), options, part=5 << 20), Keep(5), background=False)
for step in range(1, 100):
    saver.begin(step, {"w": torch.full((3 << 20,), float(step))}, {"config": ""})
    assert saver.conclude().error is None
    print(step, flush=True)
"""


@pytest.mark.parametrize(
    "moment",
    [
        "PUT manifest.json",
        *(pytest.param(f"{verb} rank-00000.safetensors", marks=pytest.mark.slow) for verb in ("POST", "PUT")),
    ],
)
def test_killed_before_the_manifest_is_there_it_does_not_exist(tmp_path, s3, place, moment):
    """Every request of the second save of that kind is held up until its process has been killed: none is answered."""
    killed, real = [], s3.changing

    def changing(method, path):
        if (f"{method} {path.partition('?')[0].rpartition('/')[2]}" == moment and "step-00000002" in path) or killed:
            if not killed:
                killed.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            return Fault(status=503)
        return real(method, path)

    s3.changing = changing
    command = [sys.executable, "-c", KILLED, place, s3.options["endpoint"], str(tmp_path / "scratch")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert out.split() == ["1"]
    s3.changing = real
    store = opened(place, s3.options, tmp_path / "scratch")
    _, manifest, refused = newest_valid(store)
    assert (manifest.step, refused) == (1, [])
    found = {"w": torch.zeros(3 << 20)}
    load(store, manifest, found)
    assert found["w"].unique().tolist() == [1.0]
    assert save(store, 2, {"w": torch.full((3 << 20,), 5.0)}).error is None
    assert (store.steps(), store.leftovers()) == ([2, 1], [])
    assert newest_valid(store)[1].step == 2


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "swap", "stray", "manifest"])
def test_a_damaged_object_is_refused_by_name_and_the_older_step_used(tmp_path, s3, place, how):
    store = opened(place, s3.options, tmp_path / "scratch")
    for step in (1, 2):
        assert save(store, step, {"w": torch.full((1000,), float(step))}).error is None
    folder, name = f"{tmp_path.name}/step-00000002", "rank-00000.safetensors"
    body = store.local(2, name).read_bytes()
    if how == "flip":
        s3.put(f"{folder}/{name}", body[:-1] + bytes([body[-1] ^ 1]))
    elif how == "truncate":
        s3.put(f"{folder}/{name}", body[:-8])
    elif how == "delete":
        s3.remove(f"{folder}/{name}")
    elif how == "swap":
        s3.put(f"{folder}/{name}", store.local(1, name).read_bytes())
    elif how == "stray":
        s3.put(f"{folder}/{(name := 'rank-00007.safetensors')}", body)
    else:
        s3.put(f"{folder}/{(name := 'manifest.json')}", store.manifest(2).replace(b"float32", b"float64"))
    _, manifest, refused = newest_valid(store)
    assert manifest.step == 1
    assert len(refused) == 1
    assert f"{s3.url}/{folder}/{name}" in refused[0]
    assert (store.steps(), store.leftovers()) == ([1], ["step-00000002/damaged-manifest.json"])
    found = {"w": torch.zeros(1000)}
    load(store, manifest, found)
    assert found["w"].unique().tolist() == [1.0]


def test_by_sizes_alone_what_is_altered_is_refused_all_the_same(tmp_path, s3, place):
    store, name = opened(place, s3.options, tmp_path / "scratch"), "rank-00000.safetensors"
    assert save(store, 1, {"w": torch.ones(1000)}).error is None
    body = store.local(1, name).read_bytes()
    store.release()
    s3.put(f"{tmp_path.name}/step-00000001/{name}", body[:-1] + bytes([body[-1] ^ 1]))
    saved, manifest, refused = newest_valid(store, digests=False)
    assert (saved.step, refused) == (1, [])
    found = {"w": torch.zeros(1000)}
    with pytest.raises(CheckpointError, match=rf"{place}/step-00000001/{name}: altered: .*SHA-256"):
        load(saved, manifest, found)
    assert not found["w"].any()


def test_a_store_that_is_away_condemns_nothing_and_a_save_fails_by_name(tmp_path, s3, place, monkeypatch):
    store = open_remote_store(place, tmp_path / "scratch", s3.options, retries=1)
    assert save(store, 1, {"w": torch.ones(1000)}).error is None
    s3.always(lambda _: Fault(status=503))
    monkeypatch.setattr(restore, "_PAUSES", (0.0,))
    with pytest.raises(OSError, match=rf"{place}/.*: failed 2 times"):
        newest_valid(store)
    outcome = save(store, 2, {"w": torch.ones(1000)})
    assert f"{place}/" in outcome.error
    assert "503" in outcome.error
    s3.forget()
    assert (store.steps(), store.leftovers()) == ([1], [])
    assert save(store, 2, {"w": torch.ones(1000)}).error is None
    assert newest_valid(store)[1].step == 2
