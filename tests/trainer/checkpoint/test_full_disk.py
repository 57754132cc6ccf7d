"""A disk that is really full while a run saves: training goes on, nothing half-written stays, and the next save works."""

import pytest

from datarun import command, events, finish, records, wait_for_step, write_run
from disks import small_disk
from mikoshi.trainer.checkpoint.restore import newest_valid

STEPS = 200


def fill(place):
    """Leave no byte free."""
    with (place / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while ballast.write(bytes(size)):
                    pass
            except OSError:
                continue
    return place / "ballast"


def weights(run_folder):
    _, manifest, _ = newest_valid(run_folder / "checkpoints")
    assert manifest.step == STEPS
    return {file: stamp["sha256"] for file, stamp in manifest.files.items()}


@pytest.mark.slow
def test_training_goes_on_and_the_next_save_works_once_there_is_room(dataset, tmp_path):
    with small_disk(tmp_path / "small", 8 << 20) as disk:
        run_out_of_room(dataset, tmp_path, disk)


def run_out_of_room(dataset, tmp_path, disk):
    requested = {
        "steps": STEPS,
        "train": {"global_batch": 8},
        "checkpoint": {"every": 20, "keep": 1},
        "eval": {"every": 0, "batches": 1},
    }
    here = write_run(tmp_path / "quiet", dataset, **requested)
    quiet = command(here, "train", "run.name=r", ranks=2)
    there = write_run(disk, dataset, **requested)
    finish(quiet)
    process = command(there, "train", "run.name=r", ranks=2)
    wait_for_step(process, there, "r", 22)
    ballast = fill(disk)
    notice = ""
    while "training goes on" not in notice:
        line = process.stdout.readline()
        assert line, notice
        notice += line
    assert "No space left on device" in notice
    left = [p for p in (disk / "runs" / "r" / "checkpoints").iterdir() if "partial" in p.name]
    at = [r["step"] for r in records(there, "r")]
    ballast.unlink()
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0, notice + rest
    assert "Traceback" not in notice + rest
    assert not left or not any(p.exists() for p in left), "the partial is removed"
    assert at[-1] < STEPS
    assert [e["step"] for e in events(there, "r", "save")][-1] == STEPS
    assert [r["step"] for r in records(there, "r")] == list(range(1, STEPS + 1)), "lines that found no room came later"
    assert weights(disk / "runs" / "r") == weights(tmp_path / "quiet" / "runs" / "r")
    assert not [p for p in (disk / "runs" / "r" / "checkpoints").iterdir() if "partial" in p.name]
