"""`mikoshi checkpoint` says what is there and names what is damaged, in a folder and in a bucket; it removes what it may."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from faulty import faulty_s3
from manifests import resigned
from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.saver import Saver
from mikoshi.trainer.checkpoint.storage.bucket import open_remote_store
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.checkpoint.verify import step_folder
from mikoshi.trainer.config.run import to_toml
from runs import run_config

PARALLEL = {"tp": 2, "zero": 1}


def record(config):
    return {"config": to_toml(config), "data": {"state": {}}}


def save(store, config, *steps):
    saver = Saver(store, Keep(100), background=False)
    for step in steps:
        torch.manual_seed(step)
        saver.begin(step, {"model.w": torch.randn(40, 30), "model.b": torch.randn(7)}, record(config))
        assert saver.conclude().error is None


def make_run(tmp_path, folder="", **section):
    """A run folder with its config, and no checkpoint yet."""
    config = run_config(
        tmp_path, tmp_path / "runs", parallel=PARALLEL, checkpoint={"keep": 2, "folder": folder, **section}
    )  # fmt: skip
    config.run.path.mkdir(parents=True)
    (config.run.path / "config.toml").write_text(to_toml(config))
    return config, config.run.path


@pytest.fixture
def run(tmp_path):
    """A run folder with steps 10 to 50."""
    config, path = make_run(tmp_path, keep_every=20)
    save(LocalStore(path / "checkpoints"), config, 10, 20, 30, 40, 50)
    return path


def of(run, step):
    return step_folder(run / "checkpoints", step)


def steps(run):
    return LocalStore(run / "checkpoints").steps()


def flip(path, at=-1):
    body = bytearray(path.read_bytes())
    body[at] ^= 4
    path.write_bytes(body)


def shard(run, step):
    return next(path for path in of(run, step).iterdir() if path.suffix == ".safetensors")


def test_list(mikoshi, run):
    code, out, errors = mikoshi("checkpoint", "list", run)
    assert (code, errors) == (0, [])
    lines = out.splitlines()
    assert lines[0].split() == ["step", "written", "size", "files", "ranks", "layout", "by", "sizes", "kept"]
    rows = [line for line in lines if line.startswith((" ", "1", "2", "3", "4", "5")) and "kB" in line]
    assert [row.split()[0] for row in rows] == ["50", "40", "30", "20", "10"]
    assert all("tp 2, ZeRO 1" in row and "whole" in row for row in rows)
    kept = ["one of the newest 2"] * 2 + ["no: the next save removes it", "a multiple of 20", "no: the next save removes it"]
    assert [row.partition("whole")[2].strip() for row in rows] == kept
    assert f"in {run / 'checkpoints'}" in lines


def test_list_as_json(mikoshi, run):
    flip(of(run, 30) / "manifest.json", 100)
    with shard(run, 40).open("ab") as file:
        file.write(b"more")
    shard(run, 20).unlink()
    (of(run, 20) / "stray").mkdir()
    (run / "checkpoints" / "damaged-step-00000005").mkdir()
    (run / "checkpoints" / ".step-00000060.partial").mkdir()
    code, out, errors = mikoshi("checkpoint", "list", run, "--json")
    assert (code, errors) == (0, [])
    told = json.loads(out)
    assert told["place"] == str(run / "checkpoints")
    assert told["others"] == [".step-00000060.partial", "damaged-step-00000005"]
    by_step = {entry["step"]: entry for entry in told["checkpoints"]}
    assert list(by_step) == [50, 40, 30, 20, 10]
    whole = by_step[50]
    assert (whole["files"], whole["ranks"], whole["layout"], whole["problems"]) == (1, 1, "tp 2, ZeRO 1", [])
    assert whole["bytes"] == shard(run, 50).stat().st_size
    assert whole["written"] == (of(run, 50) / "manifest.json").stat().st_mtime
    assert by_step[10]["problems"] == []
    assert len(by_step[40]["problems"]) == 1
    assert f"{shard(run, 40)}: has " in by_step[40]["problems"][0]
    assert by_step[30]["problems"][0].startswith(f"{of(run, 30)}/manifest.json: ")
    assert sorted(problem.rpartition(": ")[2] for problem in by_step[20]["problems"]) == ["missing", "not in the manifest"]
    code, out, _ = mikoshi("checkpoint", "list", run)
    assert code == 0
    assert "damaged-step-00000005: refused and set aside" in out
    assert ".step-00000060.partial: unfinished" in out
    assert f"damaged: {of(run, 20)}/stray: not in the manifest" in out


def test_a_list_leaves_tensors_to_those_who_load_them(mikoshi, run, monkeypatch):
    def looked_at(*_args):
        raise ValueError("tensors: looked at")

    monkeypatch.setattr("mikoshi.trainer.checkpoint.manifest._check_tensor", looked_at)
    code, out, errors = mikoshi("checkpoint", "list", run, "--json")
    assert (code, errors) == (0, [])
    assert [entry["problems"] for entry in json.loads(out)["checkpoints"]] == [[]] * 5
    code, _, errors = mikoshi("checkpoint", "verify", run)
    assert code == 2 and len(errors) == 5


def test_nothing_there_yet(mikoshi, tmp_path):
    _, path = make_run(tmp_path)
    assert mikoshi("checkpoint", "list", path) == (0, f"{path}/checkpoints: there is no checkpoint yet\n", [])
    assert mikoshi("checkpoint", "prune", path)[:2] == (0, "0 removed, 0 kept\n")
    code, _, errors = mikoshi("checkpoint", "verify", path)
    assert (code, len(errors)) == (2, 1)
    assert "there is no checkpoint yet" in errors[0]
    code, _, errors = mikoshi("checkpoint", "list", tmp_path / "nowhere")
    assert code == 2
    assert "not a run folder" in errors[0]


def test_verify(mikoshi, run):
    code, out, errors = mikoshi("checkpoint", "verify", run)
    assert (code, errors) == (0, [])
    assert [line.partition(": ")[2].partition(",")[0] for line in out.splitlines()] == ["whole"] * 5
    flip(shard(run, 20))
    shard(run, 40).unlink()
    (of(run, 40) / "extra").write_text("x")
    code, out, errors = mikoshi("checkpoint", "verify", run)
    assert code == 2
    assert [line.partition(": ")[2].partition(",")[0] for line in out.splitlines()] == [
        "whole", "2 damaged", "whole", "1 damaged", "whole",
    ]  # fmt: skip
    assert errors == [
        f"error: {of(run, 40)}/extra: not in the manifest",
        f"error: {of(run, 40)}/rank-00000.safetensors: missing",
        f"error: {of(run, 20)}/rank-00000.safetensors: altered: its bytes do not match the manifest's SHA-256 and XXH3",
    ]
    assert steps(run) == [50, 40, 30, 20, 10], "looking changes nothing"


def test_verify_compares_both_digests(mikoshi, run):
    resigned(of(run, 20), digests={"sha256": "0" * 64})
    resigned(of(run, 40), digests={"xxh3": "0" * 32})
    code, _, errors = mikoshi("checkpoint", "verify", run)
    assert code == 2
    assert errors == [
        f"error: {shard(run, 40)}: altered: its bytes do not match the manifest's XXH3",
        f"error: {shard(run, 20)}: altered: its bytes do not match the manifest's SHA-256",
    ]


def test_verify_one_and_by_sizes(mikoshi, run):
    flip(shard(run, 20))
    assert mikoshi("checkpoint", "verify", run, "--step", 20)[0] == 2
    code, out, errors = mikoshi("checkpoint", "verify", run, "--step", 20, "--sizes")
    assert (code, errors) == (0, [])
    assert out == f"{of(run, 20)}: whole, by sizes\n"
    code, _, errors = mikoshi("checkpoint", "verify", run, "--step", 7)
    assert code == 2
    assert errors == [f"error: --step 7: {run / 'checkpoints'} has the steps 50, 40, 30, 20, 10"]


@pytest.mark.parametrize("what", ["link to a folder", "file", "fifo", "manifest of another step"])
def test_what_was_put_in_place_of_a_checkpoint_is_named(mikoshi, run, what, tmp_path):
    path = of(run, 50)
    if what == "manifest of another step":
        shutil.copy(of(run, 40) / "manifest.json", path / "manifest.json")
    elif what == "fifo":
        shard(run, 50).unlink()
        os.mkfifo(path / "rank-00000.safetensors")
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere") if what != "file" else path.write_text("x")
    code, _, errors = mikoshi("checkpoint", "verify", run)
    assert code == 2
    assert len(errors) == 1
    assert "step-00000050" in errors[0]
    assert mikoshi("checkpoint", "list", run)[0] == 0


def test_prune(mikoshi, run):
    code, out, errors = mikoshi("checkpoint", "prune", run, "--dry-run")
    assert (code, errors) == (0, [])
    assert out.splitlines() == [
        f"would remove {of(run, 30)}", f"would remove {of(run, 10)}",
        "2 to remove, 3 to keep; the newest valid one is of step 50",
    ]  # fmt: skip
    assert steps(run) == [50, 40, 30, 20, 10]
    code, out, _ = mikoshi("checkpoint", "prune", run)
    assert out.splitlines()[-1] == "2 removed, 3 kept; the newest valid one is of step 50"
    assert steps(run) == [50, 40, 20]
    assert mikoshi("checkpoint", "prune", run, "--last", 1, "--every", 0)[0] == 0
    assert steps(run) == [50]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000050"]


def test_what_going_back_needs_is_kept_and_said(mikoshi, tmp_path):
    config, path = make_run(tmp_path, every=10)
    config = config.model_copy(update={"guard": config.guard.model_copy(update={"spike": "rewind", "rewind": 15})})
    (path / "config.toml").write_text(to_toml(config))
    save(LocalStore(path / "checkpoints"), config, 10, 20, 30, 40, 45)
    _, out, _ = mikoshi("checkpoint", "list", path, "--json")
    told = {entry["step"]: entry["kept"] for entry in json.loads(out)["checkpoints"]}
    assert told == {45: "one of the newest 2", 40: "one of the newest 2", 30: "for going back", 20: "for going back", 10: ""}
    assert mikoshi("checkpoint", "prune", path, "--last", 1)[0] == 0
    assert steps(path) == [45, 40, 30, 20]


def test_prune_beside_a_live_run_is_refused(mikoshi, run):
    with subprocess.Popen(["flock", run / ".lock", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as training:
        training.stdin.write(b"held")
        training.stdin.flush()
        assert training.stdout.read(4) == b"held"
        code, _, errors = mikoshi("checkpoint", "prune", run)
        assert code == 2
        assert errors == [f"error: {run}: another process is training this run: wait for it, or stop it"]
        assert steps(run) == [50, 40, 30, 20, 10]
        assert mikoshi("checkpoint", "prune", run, "--dry-run")[0] == 0, "which only looks"
        training.stdin.close()
    assert mikoshi("checkpoint", "prune", run)[0] == 0
    assert steps(run) == [50, 40, 20]


def test_what_cannot_be_read_is_told_by_name_and_the_rest_is_read(mikoshi, run, monkeypatch):
    def local(store, step, name, sha256=None):
        if step == 50:
            raise OSError(errno.EIO, "Input/output error", str(shard(run, 50)))
        return real(store, step, name, sha256)

    real = LocalStore.local
    monkeypatch.setattr(LocalStore, "local", local)
    code, out, errors = mikoshi("checkpoint", "verify", run)
    assert (code, errors) == (2, [f"error: {shard(run, 50)}: cannot be read: Input/output error"])
    assert out.count("whole") == 4
    assert mikoshi("checkpoint", "prune", run)[1].endswith("; the newest valid one is of step 40\n")
    assert steps(run) == [50, 40, 20]


def test_prune_keeps_the_last_valid_one(mikoshi, run):
    for step in (50, 40, 30):
        flip(shard(run, step))  # which sizes do not tell
    code, out, errors = mikoshi("checkpoint", "prune", run, "--last", 2, "--every", 0)
    assert (code, errors) == (0, [])
    assert out.splitlines()[-1] == "2 removed, 3 kept; the newest valid one is of step 20"
    assert steps(run) == [50, 40, 20]
    flip(shard(run, 20))
    code, out, errors = mikoshi("checkpoint", "prune", run, "--last", 1, "--every", 0)
    assert code == 2
    assert steps(run) == [50, 40, 20]
    assert len(errors) == 4
    assert "no checkpoint is valid, so none is removed" in errors[-1]
    assert all(
        f"step-000000{step}/rank-00000.safetensors: altered" in told for step, told in zip((50, 40, 20), errors, strict=False)
    )


def test_checkpoints_in_a_bucket(mikoshi, tmp_path, monkeypatch):
    with faulty_s3({}) as s3:
        config, path = make_run(tmp_path, folder=f"{s3.url}/{tmp_path.name}")
        store = open_remote_store(config.checkpoint.folder, tmp_path / "scratch", s3.options)
        save(store, config, 1, 2, 3)
        names = {"AWS_ENDPOINT": s3.options["endpoint"], "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "test"}
        for name, value in (names | {"AWS_SECRET_ACCESS_KEY": "test", "TMPDIR": str(tmp_path)}).items():
            monkeypatch.setenv(name, value)
        code, out, errors = mikoshi("checkpoint", "list", path, "--json")
        assert (code, errors) == (0, [])
        told = json.loads(out)
        assert told["place"] == f"{s3.url}/{tmp_path.name}"
        assert [(entry["step"], entry["problems"]) for entry in told["checkpoints"]] == [(3, []), (2, []), (1, [])]
        body = bytearray(store.local(3, "rank-00000.safetensors").read_bytes())
        body[-1] ^= 1
        s3.put(f"{tmp_path.name}/step-00000003/rank-00000.safetensors", bytes(body))
        code, out, errors = mikoshi("checkpoint", "verify", path)
        assert code == 2
        assert len(errors) == 1
        assert errors[0].startswith(f"error: {s3.url}/{tmp_path.name}/step-00000003/rank-00000.safetensors: altered: ")
        assert mikoshi("checkpoint", "prune", path, "--last", 1)[0] == 0
        assert store.steps() == [3, 2]
        assert not list(tmp_path.glob("mikoshi-*")), "what was fetched is gone"


def test_the_help_of_export_promises_what_is_true(mikoshi):
    """transformers does not load our own names."""
    _, out, _ = mikoshi("checkpoint", "export", "--help")
    told = " ".join(out.split())
    assert "Mikoshi's own names" in told
    assert "transformers" not in told


@pytest.mark.parametrize("words", [["list"], ["prune", "--dry-run"], ["verify"]], ids=lambda words: words[0])
def test_what_looks_at_files_alone_starts_without_torch(run, words):
    program = (
        "import sys\nfrom mikoshi.launch.cli.main import command\n"
        "try:\n    command()\nexcept SystemExit as end:\n    print(end.code or 0, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "checkpoint", words[0], str(run), *words[1:]]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.splitlines()[-1] == "0 False", found.stderr
