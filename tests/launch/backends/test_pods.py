"""The commands of a JobSet's pods, exactly as they stand in it, run together in namespaces of their own."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mikoshi.launch.backends.kubernetes.manifests import jobset
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.launch.runs.record import Request, SubmittedRun, new_spec
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from runs import TINY_MODEL

ROOT = Path(__file__).parents[3]


def namespaces_work():
    layer = "mount -t overlay -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w none /etc"
    try_it = f"mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w && {layer}"
    argv = ["unshare", "--mount", "--net", "--pid", "--fork", "bash", "-c", f"{try_it} && ip link set lo up"]
    try:
        return subprocess.run(argv, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
def test_the_pods_of_a_jobset_train_together(tmp_path, dataset):
    if os.geteuid() or not namespaces_work():
        pytest.skip("needs root, the right to mount an overlay, and iproute2")
    work = tmp_path / "workspace"
    work.mkdir()
    small = [*(f"model.{key}={value}" for key, value in TINY_MODEL.items()), "train.steps=6", "train.context=64"]
    small += ["train.global_batch=4", "optim.schedule.warmup=1", f"data.path={dataset}", "checkpoint.every=2", "eval.batches=1"]
    config = load_config(ROOT / "configs/runs/quickstart.toml", [*small, "log.tensorboard=false"])
    cluster = KubernetesCluster(
        kind="kubernetes", image="m:1", claim="runs", python=sys.executable, setup="export OMP_NUM_THREADS=1"
    )
    run = SubmittedRun(RunFolder(tmp_path / "record"), new_spec(config, cluster, work))
    leader, files, _ = jobset(run, Request(nodes=2, min_nodes=1, time=time.time()))
    head, node = (
        job["template"]["spec"]["template"]["spec"]["containers"][0]["command"] for job in leader["spec"]["replicatedJobs"]
    )
    for name, text in files["data"].items():
        (tmp_path / name).write_text(text)
    names = files["data"]["nodes"].split()
    script = "\n".join([
        "set -eu; mount -t tmpfs none /mnt; mkdir /mnt/u /mnt/w; ip link set lo up",
        "mount -t overlay -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w none /etc; mkdir /etc/mikoshi /etc/mikoshi-secret",
        f"cp {shlex.join(str(tmp_path / name) for name in files['data'])} /etc/mikoshi",
        "umask 077; printf %064d 7 > /etc/mikoshi-secret/token",
        f"printf '127.0.0.1 localhost {names[0]}\\n127.0.0.2 {names[1]}\\n' > /etc/hosts",
        f"cd {shlex.quote(str(work))}",
        f"{shlex.join(node)} > {shlex.quote(str(tmp_path / 'node.txt'))} 2>&1 &",
        "pod=$!",
        f"code=0; {shlex.join(head)} || code=$?; kill $pod; ended=0; wait $pod || ended=$?",
        "echo ended $code $ended",
    ])  # fmt: skip
    argv = ["unshare", "--mount", "--net", "--pid", "--mount-proc", "--fork", "--kill-child", "bash", "-c", script]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240)
    told = done.stdout + done.stderr + (tmp_path / "node.txt").read_text()
    assert done.stdout.splitlines()[-1] == "ended 0 143", told
    there = work / "runs/quickstart"
    steps = [record["step"] for record in read_jsonl(there / "metrics.jsonl")]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6], told
    assert (there / "attempts/1/result.json").is_file() and (there / "attempts/1/rank-1.log").is_file()
    assert '"done"' in (there / "attempts/1/result.json").read_text()
