"""What would be sent to Kubernetes, held against the official schemas and models and against what they do not check."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mikoshi.launch.backends.kubernetes.kubernetes import KubernetesSite
from mikoshi.launch.backends.kubernetes.manifests import job_name, jobset, node_names, pytorchjob, to_yaml, trainjob
from mikoshi.launch.backends.skypilot import skypilot
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.launch.runs.record import Attempt, Request, SubmittedRun, new_spec
from mikoshi.trainer.config.run import load_config, to_toml
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from runs import TINY_MODEL

kubernetes_validate = pytest.importorskip("kubernetes_validate")
models = pytest.importorskip("kubeflow_trainer_api.models")

ROOT = Path(__file__).parents[3]
LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
FULL = {
    "image": "example.com/m:1", "claim": "runs", "workdir": "/workspace", "gpus_per_node": 8, "cpus": "64", "memory": "512Gi",
    "queue": "team", "host_network": True, "network": {"hca": "mlx5_0"}, "node_selector": {"gpu": "h100"}, "setup": "ulimit -l",
    "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": "60"}],
    "secret_refs": ["bucket"], "service_account": "trainer", "env": {"A": "b c"},
}  # fmt: skip
PLAIN = {"image": "example.com/m:1", "claim": "runs", "workdir": "/workspace"}


def submitted(tmp_path, cluster=PLAIN, *overrides, name="quickstart"):
    config = load_config(ROOT / "configs/runs/quickstart.toml", [f"run.name={name}", *overrides])
    workdir = Path(cluster.get("workdir", "/workspace"))
    return SubmittedRun(RunFolder(tmp_path), new_spec(config, KubernetesCluster(kind="kubernetes", **cluster), workdir))


def asked(nodes=3, exclude=()):
    return Request(nodes=nodes, min_nodes=1, exclude=list(exclude), time=time.time())


def strict(thing):
    kubernetes_validate.validate(thing, "1.37", strict=True)


def round_trip(model, thing):
    """Models drop what they do not know: a typo shows by its absence."""
    assert json.loads(model.from_dict(thing).to_json()) == thing


@pytest.mark.parametrize("nodes", [1, 2, 64])
@pytest.mark.parametrize("cluster", [PLAIN, FULL], ids=["plain", "full"])
def test_a_jobset_and_what_is_in_it_pass_the_official_schemas(tmp_path, cluster, nodes):
    run = submitted(tmp_path, cluster)
    leader, config, secret = jobset(run, asked(nodes, ["bad-1"]), 2)
    round_trip(models.JobsetV1alpha2JobSet, leader)
    for thing in (config, secret):
        strict(thing)
    jobs = leader["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["head", "nodes"][: min(nodes, 2)]
    for job in jobs:
        strict({"apiVersion": "batch/v1", "kind": "Job", "metadata": leader["metadata"], "spec": job["template"]["spec"]})
    assert sum(job["template"]["spec"]["parallelism"] for job in jobs) == nodes
    for thing in (leader, config, secret):
        assert thing["metadata"]["name"] == job_name(run, 2)


def test_only_the_head_decides_and_only_a_users_mistake_is_final(tmp_path):
    leader = jobset(submitted(tmp_path), asked())[0]["spec"]
    assert leader["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["head"]}
    assert leader["failurePolicy"]["maxRestarts"] == 20
    (rule,) = leader["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    head, nodes = (job["template"]["spec"] for job in leader["replicatedJobs"])
    assert head["backoffLimit"] == 0, "a head that ends is the JobSet's to start again, with all pods"
    assert nodes["backoffLimit"] == 2**31 - 1, "a node that is lost is the head's to do without, and comes again"
    for job in (head, nodes):
        assert job["template"]["spec"]["restartPolicy"] == "Never", "a policy by exit code asks for it"
        assert [rule["action"] for rule in job["podFailurePolicy"]["rules"]] == ["FailJob", "Ignore"]
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]


@pytest.mark.parametrize("make", [lambda *a: jobset(*a)[0], lambda *a: pytorchjob(*a)[-1], lambda *a: trainjob(*a)[1]])
def test_no_pod_is_root_or_may_become_it_and_none_knows_the_api(tmp_path, make):
    for cluster, capabilities in ((PLAIN, {"drop": ["ALL"]}), (FULL, {"drop": ["ALL"], "add": ["IPC_LOCK"]})):
        pods = list(pods_in(make(submitted(tmp_path, cluster), asked())))
        assert pods
        for pod in pods:
            outer, (container,) = pod["securityContext"], pod["containers"]
            assert outer["runAsNonRoot"] is True and outer["runAsUser"] == 1000
            assert outer["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": capabilities}
            assert pod["automountServiceAccountToken"] is False
            assert pod["terminationGracePeriodSeconds"] > 120, "recovery.grace, and time to end"
            assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}


def pods_in(thing):
    """Specs of pods, however deep."""
    if isinstance(thing, dict):
        if "containers" in thing:
            yield thing
        for value in thing.values():
            yield from pods_in(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from pods_in(value)


def test_what_the_cluster_file_says_arrives(tmp_path):
    leader, config, _ = jobset(submitted(tmp_path, FULL), asked(2, ["bad-1", "bad-2"]))
    pod = next(pods_in(leader))
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "512Gi"}
    assert container["resources"]["requests"]["cpu"] == "64"
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    assert pod["tolerations"][0]["tolerationSeconds"] == 60
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["nodeSelector"] == {"gpu": "h100"} and pod["serviceAccountName"] == "trainer"
    assert avoided(pod) == ["bad-1", "bad-2"]
    assert leader["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert config["data"]["setup.sh"] == "ulimit -l\n"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}


def avoided(pod):
    """The nodes that a pod may not go to."""
    affinity = pod["affinity"].get("nodeAffinity")
    if affinity is None:
        return []
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term.keys() == {"matchFields"}
    for never in term["matchFields"]:
        assert (never["key"], never["operator"]) == ("metadata.name", "NotIn")
        assert len(never["values"]) == 1, "the API server takes one name in each"
    return [never["values"][0] for never in term["matchFields"]]


def test_nodes_are_avoided_by_the_names_that_pods_are_told_and_what_is_no_node_is_left_out(tmp_path):
    run = submitted(tmp_path)
    for pod in pods_in(jobset(run, asked())[0]):
        told = {entry["name"]: entry.get("valueFrom") for entry in pod["containers"][0]["env"]}
        assert told["MIKOSHI_NODE_NAME"] == {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}
    real = ["gpu-7", "ip-10-0-0-1.eu-west-1.compute.internal", f"{'n' * 63}.{'m' * 60}.example.com"]
    assert len(real[-1]) > 63, "more than a label may have"
    for make in (lambda exclude: jobset(run, asked(3, exclude), 2)[0], lambda exclude: pytorchjob(run, asked(3, exclude))[-1]):
        for pod in pods_in(make([real[0], *node_names(run, asked(), 1), "Node_1", "fe80::1", *real])):
            assert avoided(pod) == real
            strict({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod})
        assert next(avoided(pod) for pod in pods_in(make([*node_names(run, asked(), 1), "Node_1"]))) == []


@pytest.mark.parametrize("kind", [PLAIN, FULL], ids=["plain", "full"])
def test_nodes_listen_where_the_head_calls_them_and_another_run_elsewhere(tmp_path, kind):
    run, other = (submitted(tmp_path, kind) for _ in range(2))
    run = replace(run, spec=run.spec.model_copy(update={"id": "a" * 32}))
    other = replace(other, spec=other.spec.model_copy(update={"id": "b" * 32}))
    leader, config, _ = jobset(run, asked(2))
    (tmp_path / "nodes").write_text(config["data"]["nodes"])
    site = KubernetesSite(run.spec.cluster, run, Attempt(tmp_path / "attempts" / "1"), tmp_path, tmp_path)
    called = site.command(site.nodes()[1])
    container = list(pods_in(leader))[1]["containers"][0]
    port = container["command"][container["command"].index("--port") + 1]
    assert called[called.index("--port") + 1] == port == str(container["ports"][0]["containerPort"])
    assert port not in list(pods_in(jobset(other, asked(2))[0]))[1]["containers"][0]["command"]


def test_lines_of_set_up_see_nothing_of_the_command_and_share_no_pipe_with_it(tmp_path):
    setup = 'export SEEN="$#:$*"\necho noise\nread -r line\nexport LINE="[$line]"\nset -- other arguments'
    leader, config, _ = jobset(submitted(tmp_path, PLAIN | {"setup": setup}), asked())
    (tmp_path / "setup.sh").write_text(config["data"]["setup.sh"])
    show = [
        sys.executable,
        "-c",
        "import os, sys; print(os.environ['SEEN'], os.environ['LINE'], sys.argv[1:], sys.stdin.read())",
    ]
    for pod in pods_in(leader):
        argv = pod["containers"][0]["command"]
        at = argv.index("/etc/mikoshi/setup.sh")
        full = [*argv[:at], str(tmp_path / "setup.sh"), *show, "a b"]
        done = subprocess.run(full, input="for the command", capture_output=True, text=True, check=True)
        assert done.stdout == "0: [] ['a b'] for the command\n"
        assert done.stderr == "noise\n"
    (tmp_path / "setup.sh").write_text("no_such_command_of_yours\n")
    failed = subprocess.run(full, capture_output=True, text=True)
    assert failed.returncode != 0 and failed.stdout == "" and "no_such_command_of_yours" in failed.stderr


@pytest.mark.parametrize("setup", ["export A='it''s'; B=\"$(echo x)\"", ""])
def test_lines_of_set_up_run_before_the_command_whose_arguments_stay_as_they_are(tmp_path, setup):
    leader, config, _ = jobset(submitted(tmp_path, PLAIN | {"setup": setup, "python": "/a b/$(python)"}), asked())
    argv = next(pods_in(leader))["containers"][0]["command"]
    if not setup:
        assert argv[0] == "/a b/$(python)"
        return
    (tmp_path / "setup.sh").write_text(config["data"]["setup.sh"])
    at = argv.index("/etc/mikoshi/setup.sh")
    show = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    done = subprocess.run([*argv[:at], str(tmp_path / "setup.sh"), *show, *argv[at + 1 :]], capture_output=True, check=True)
    assert json.loads(done.stdout) == argv[at + 1 :]


NAMES = ["a", "A", "a.", "a_", "a-", "0", "9.9", "x" * 80, "x" * 81, "Run_1.0", "run-1-0", "ünï", "__" + "q"]


def test_every_name_of_a_run_becomes_a_dns_label_of_its_own(tmp_path):
    made = set()
    for name in NAMES:
        try:
            run = submitted(tmp_path, name=name)
        except ValueError:
            continue
        for number in (1, 99999):
            longest = f"{job_name(run, number)}-nodes-0-99999-abcde"
            assert LABEL.fullmatch(longest), longest
            made.add(job_name(run, number))
        made.add(job_name(submitted(tmp_path, name=name), 1))  # another run of that name
    assert len(made) % 3 == 0 and len(made) >= 27
    run = submitted(tmp_path)
    assert node_names(run, asked(3), 1)[1:] == [f"{job_name(run, 1)}-nodes-0-{i}.{job_name(run, 1)}" for i in (0, 1)]
    spec = jobset(run, asked(3))[0]["spec"]
    assert spec["network"]["subdomain"] == node_names(run, asked(3), 1)[0].partition(".")[2]


def test_secrets_stand_in_the_secret_alone(tmp_path):
    run = submitted(tmp_path, PLAIN | {"secrets": ["API_KEY"]})
    leader, config, secret = jobset(run, asked(), 1, {"token": "t0ken", "API_KEY": "k3y"})
    assert secret["stringData"] == {"token": "t0ken", "API_KEY": "k3y"}
    for text in (json.dumps(leader), json.dumps(config)):
        assert "t0ken" not in text and "k3y" not in text
    env = next(pods_in(leader))["containers"][0]["env"]
    assert {"name": "API_KEY", "valueFrom": {"secretKeyRef": {"name": job_name(run, 1), "key": "API_KEY"}}} in env
    assert "k3y" not in to_yaml(jobset(run, asked()))
    for export in (pytorchjob, trainjob, skypilot):
        with pytest.raises(LaunchError, match="API_KEY"):
            export(run, asked())


@pytest.mark.parametrize("change, told", [
    ({"image": ""}, "image: missing"),
    ({"claim": ""}, "set claim in the cluster file, or checkpoint.folder"),
    ({"claim": "Runs"}, "claim = 'Runs'"),
    ({"namespace": "a_b"}, "namespace = 'a_b'"),
    ({"secret_refs": ["ok", "not ok"[:3] + "@"]}, "secret_refs = 'not@'"),
    ({"memory": "512GB"}, "memory = '512GB'"),
    ({"cpus": "many"}, "cpus = 'many'"),
    ({"shared_memory": ""}, "shared_memory"),
    ({"workdir": "here"}, "workdir = 'here'"),
])  # fmt: skip
def test_what_kubernetes_would_refuse_or_lose_is_refused_by_the_key_of_the_cluster_file(tmp_path, change, told):
    with pytest.raises(LaunchError, match=re.escape(told)) as refused:
        jobset(submitted(tmp_path, PLAIN | change), asked())
    assert "\n" not in str(refused.value)


def test_without_a_claim_checkpoints_go_to_a_bucket_and_run_folders_are_scratch(tmp_path):
    run = submitted(tmp_path, PLAIN | {"claim": ""}, "checkpoint.folder=s3://bucket/x")
    pod = next(pods_in(jobset(run, asked())[0]))
    assert {"name": "runs", "emptyDir": {}} in pod["volumes"]
    assert {"name": "runs", "mountPath": "/workspace/runs"} in pod["containers"][0]["volumeMounts"]
    with pytest.raises(LaunchError, match="not on the claim"):
        jobset(submitted(tmp_path, PLAIN, "run.folder=/elsewhere"), asked())


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_exports_pass_what_schemas_and_models_there_are(tmp_path, nodes):
    run = submitted(tmp_path, FULL)
    config, job = pytorchjob(run, asked(nodes))
    strict(config)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(replica["replicas"] for replica in replicas.values()) == nodes
    for replica in replicas.values():
        assert replica["template"]["spec"]["containers"][0]["name"] == "pytorch", "the operator looks for this one"
        strict({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": replica["template"]["spec"]})
    config, runtime, train = trainjob(run, asked(nodes))
    strict(config)
    round_trip(models.TrainerV1alpha1TrainingRuntime, runtime)
    round_trip(models.TrainerV1alpha1TrainJob, train)
    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    strict(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": given_restarts(job["template"]["spec"])}
    )
    assert list(config["data"]) == ["quickstart.toml", "setup.sh"]


def given_restarts(spec):
    """As the JobSet's own defaults complete it."""
    spec = json.loads(json.dumps(spec))
    spec["template"]["spec"]["restartPolicy"] = "OnFailure"
    return spec


def test_yaml_says_what_the_objects_do(tmp_path):
    objects = jobset(submitted(tmp_path, FULL), asked())
    text = to_yaml(objects)
    assert list(yaml.safe_load_all(text)) == objects
    assert not re.search(r"[&*]id\d", text)


def test_a_skypilot_task_carries_the_config_exactly_and_starts_torchrun(tmp_path):
    nasty = {"env": {"A": "$(touch hurt); 'q' \"d\"\n`x`"}, "setup": "echo set up"}
    run = submitted(tmp_path, PLAIN | nasty, "log.wandb=it's $(touch hurt) `x` EOF")
    task = yaml.safe_load(to_yaml(skypilot(run, asked(2))))
    assert set(task) <= {"name", "num_nodes", "resources", "envs", "setup", "run"}
    assert task["num_nodes"] == 2 and task["envs"]["A"] == nasty["env"]["A"]
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python"
    fake.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "import json,sys; print(json.dumps(sys.argv[1:]))" "$@"\n'
    )
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "SKYPILOT_NODE_RANK": "1"}
    env |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    done = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    words, *argv = done.stdout.splitlines()
    assert words == "set up"
    argv = json.loads("\n".join(argv))
    told = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    assert told == {"nnodes": "2", "node-rank": "1", "nproc-per-node": "1", "master-addr": "10.0.0.1", "master-port": "29500"}
    assert Path(argv[-1]).read_text() == to_toml(run.spec.config)
    assert not list(tmp_path.rglob("hurt"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob", "skypilot"])
def test_what_is_exported_really_trains_on_two_nodes_once_it_is_told_its_place(tmp_path, dataset, kind):
    """The command of the export itself, in two processes with the variables that the operators, or SkyPilot, set."""
    small = [*(f"model.{key}={value}" for key, value in TINY_MODEL.items()), "train.steps=3", "train.context=64"]
    small += [
        "train.global_batch=4",
        "optim.schedule.warmup=1",
        f"data.path={dataset}",
        "checkpoint.every=0",
        "eval.batches=1",
        "log.tensorboard=false",
    ]
    run = submitted(tmp_path, PLAIN | {"python": sys.executable}, f"run.folder={tmp_path / 'workspace'}", *small)
    run = replace(run, spec=run.spec.model_copy(update={"workdir": str(tmp_path / "workspace")}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (tmp_path / "workspace").mkdir()
    if kind == "skypilot":
        argv = ["bash", "-c", skypilot(run, asked(2))["run"].replace("--master-port=29500", f"--master-port={port}")]
    else:
        config, job, *_ = (pytorchjob if kind == "pytorchjob" else trainjob)(run, asked(2))
        (tmp_path / "quickstart.toml").write_text(config["data"]["quickstart.toml"])
        (container,) = next(pods_in(job))["containers"]
        argv = [
            str(tmp_path / "quickstart.toml") if word.startswith("/etc/mikoshi/") else word for word in container["command"]
        ]
    processes = []
    for node in "01":
        told = {
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "1",
            "PET_NODE_RANK": node,
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        if kind == "skypilot":
            told = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": node, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {"PATH": path, "HOME": str(tmp_path / node), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **told}
        processes.append(
            subprocess.Popen(
                argv, env=env, cwd=tmp_path / "workspace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], said
    steps = [record["step"] for record in read_jsonl(tmp_path / "workspace" / "quickstart" / "metrics.jsonl")]
    assert sorted(set(steps)) == [1, 2, 3], said
    assert "2 rank(s)" in said[0], said
