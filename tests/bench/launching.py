"""How long a user waits: from submit to the first step, and from the loss of a node to the next step, on a real Slurm here.

    python -P tests/bench/launching.py [--rounds 3]

Three nodes, which are network namespaces of this machine and share its cores; one rank each. Needs root and Slurm's Debian
packages (tests/cluster/slurm-up installs them). Medians.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import clusterrun
import slurmcluster
from clusterrun import SLOW, ended, events, mikoshi, opened, step_of, until
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import make_dataset


def submit(slurm, folder, dataset, name, steps, *more):
    """Submit; when that began, and the run."""
    fields = {"gpus_per_node": 0, "time": "20", "patience": {"lost": 5.0}}
    cluster = clusterrun.write_cluster(folder, kind="slurm", **fields)
    file = clusterrun.write_run(folder, dataset, name, steps, model=SLOW, train={"global_batch": 12}, checkpoint={"every": 5})
    began = time.time()
    done = mikoshi(folder, "submit", file, "--on", cluster, *more, env=slurm.env)
    assert done.returncode == 0, done.stderr
    return began, opened(folder, name)


def first_step(slurm, folder, dataset, number):
    """Seconds from the command to the return of submit, to the job's start, and to the end of the first step."""
    began, run = submit(slurm, folder, dataset, f"first{number}", 3, "--nodes", 2)
    returned = time.time() - began
    until(lambda: step_of(run) >= 1, "the first step", 120, run)
    first = time.time() - began
    started = run.attempts[0].started
    ended(run)
    return returned, started.time - began, first


def lost_node(slurm, folder, dataset, number):
    """Seconds from a node's end to its notice, and to the end of the next step on the others."""
    _, run = submit(slurm, folder, dataset, f"lost{number}", 10_000, "--nodes", 3, "--min-nodes", 2)
    until(lambda: events(run, "save"), "a save", 120, run)
    struck = time.time()
    slurm.kill_node("n3")
    until(lambda: events(run, "resume") or len(events(run, "start")) > 1, "it goes on", 120, run)
    lines = len(read_jsonl(run.folder.metrics))
    until(lambda: len(read_jsonl(run.folder.metrics)) > lines, "the next step", 120, run)
    stepped, (fault, *_) = time.time() - struck, events(run, "fault")
    mikoshi(folder, "cancel", f"runs/lost{number}", "--now", env=slurm.env)
    return fault["time"] - struck, stepped


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if why := slurmcluster.missing():
        print(f"launching: left out: {why}")
        return
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:
        folder = Path(name)
        began = time.monotonic()
        slurm = slurmcluster.up(folder / "s")
        print(f"a Slurm of three nodes is up in {time.monotonic() - began:.1f} s")
        try:
            work = folder / "w"
            work.mkdir()
            dataset = make_dataset(work / "data")
            starts = [first_step(slurm, work, dataset, number) for number in range(rounds)]
            slurm.quiet()
            losses = []
            for number in range(rounds):
                losses.append(lost_node(slurm, work, dataset, number))
                slurm.quiet()
        finally:
            slurmcluster.down(slurm)
    returned, started, first = (statistics.median(column) for column in zip(*starts, strict=True))
    noticed, stepped = (statistics.median(column) for column in zip(*losses, strict=True))
    print(f"submit, 2 nodes: the command returns after {returned:.1f} s, the job starts after {started:.1f} s, "
          f"the first step ends after {first:.1f} s")  # fmt: skip
    print(f"a node's power is cut: noticed after {noticed:.1f} s, the next step on 2 of 3 nodes ends after {stepped:.1f} s")


if __name__ == "__main__":
    main()
