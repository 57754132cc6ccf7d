"""Whatever stands in a cluster file is refused or goes through exactly, and is never run: real shells try what comes of it."""

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hosts import until
from mikoshi.launch.backends.local.local import LocalBackend
from mikoshi.launch.backends.slurm.slurm import SCRIPT
from mikoshi.launch.backends.ssh.ssh import SshSite, remote_line
from mikoshi.launch.config.cluster import LocalCluster, SlurmCluster, SshCluster, load_cluster
from mikoshi.launch.config.hostfile import read_hostfile
from mikoshi.launch.config.names import host_name, variable_name, word
from mikoshi.launch.config.private_env import PRIVATE, read_private, write_private
from mikoshi.launch.runs.record import Request, create_run, new_spec, open_submitted
from mikoshi.trainer.errors import ConfigError, LaunchError
from runs import run_config
from standin import noted, standin

CANARY = "canary"
HOSTILE = [
    "; touch canary;", "$(touch canary)", "`touch canary`", "' ; touch canary; '", '" ; touch canary; "', "\ntouch canary\n",
    "| touch canary", "&& touch canary", "-oProxyCommand=touch canary", "\\'; touch canary #", "!touch",
    "${IFS}touch${IFS}canary", "a\rb", "--", "-", "é$(touch canary)", "%(touch canary)", "\\$(touch canary)", "(touch canary)",
    "<(touch canary)", "*", "~root", "$'\\x41'", "{a,b}", " leading", "trailing ", "\u202etxt", "😀",
]  # fmt: skip
TEXT = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=40),
    st.lists(st.sampled_from([*HOSTILE, "word", "'", '"', "\\", "\n", "$", "`", "!", " "]), max_size=5).map("".join),
)
# A file's name can hold anything but a slash and NUL.
NAME = TEXT.map(lambda text: text.replace("/", "_").encode()[:120].decode("utf-8", "ignore")).filter(
    lambda t: t not in ("", ".", "..")
)
SHELLS = [shell for shell in ("sh", "bash", "zsh", "tcsh", "fish") if shutil.which(shell)]
few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def watched():
    """A folder in which no command may leave its mark."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        yield folder
        assert not [path for path in folder.rglob("*") if path.name == CANARY], "something of it was run"


def on_path(folder):
    """An environment whose ssh runs its last argument as sshd does, and notes the others."""
    folder.mkdir()
    program = folder / "ssh"
    program.write_text('#!/bin/sh\nfor last; do :; done\nexec "${SHELL_THERE:-sh}" -c "$last"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


@few
@given(interpreter=NAME, workdir=NAME, setup=TEXT, shell=st.sampled_from(SHELLS))
@example(interpreter="python", workdir="-", setup="", shell="sh")
@example(interpreter="-c", workdir="\\\\'; touch canary #", setup="true", shell="fish" if "fish" in SHELLS else "sh")
def test_over_ssh_paths_are_exact_and_setup_lines_are_a_file(interpreter, workdir, setup, shell):
    with watched() as folder:
        there = folder / "there" / workdir
        there.mkdir(parents=True)
        python = standin(folder / "bin" / interpreter)
        cluster = SshCluster(kind="ssh", hosts=["n1"], python=str(python), setup=setup)
        run = create_run(new_spec(run_config(folder / "data", folder / "runs"), cluster, there))
        attempt = run.add(Request(nodes=1, min_nodes=1, time=1.0))
        if setup:  # what is to be run is run by the user's wish; here it is only seen to come from its file
            (run.folder.path / "setup.sh").write_text("export FROM_FILE=yes\n")
        argv = SshSite(cluster, run, attempt).command("n1")
        environment = {**on_path(folder / "fake"), "SHELL_THERE": shell}
        subprocess.run(argv, env=environment, cwd=folder, stdin=subprocess.DEVNULL, check=True)
        note = noted(python)
        assert note["argv"] == ["-P", "-m", "mikoshi.launch.agent.node"] and note["cwd"] == str(there)
        assert note["env"].get("FROM_FILE") == ("yes" if setup else None)


@few
@given(arguments=st.lists(TEXT, max_size=4), shell=st.sampled_from(SHELLS))
def test_any_arguments_are_exact_in_any_login_shell(arguments, shell):
    with watched() as folder:
        program = standin(folder / "program")
        subprocess.run([shell, "-c", remote_line([str(program), *arguments], str(folder))], cwd=folder, check=True)
        assert noted(program)["argv"] == arguments


@few
@given(interpreter=NAME, workdir=NAME, name=NAME, value=TEXT)
def test_on_this_machine_paths_and_values_are_exact(interpreter, workdir, name, value):
    with watched() as folder:
        there = folder / workdir
        there.mkdir(parents=True)
        python = standin(folder / "bin" / interpreter)
        cluster = LocalCluster(kind="local", python=str(python), env={"VALUE": value}, setup="export SET=1")
        run = create_run(new_spec(run_config(folder / "data", folder / f"runs of {name}"), cluster, there))
        attempt = run.add(Request(nodes=1, min_nodes=1, time=1.0))
        attempt.write_job(LocalBackend(cluster).submit(run, attempt))
        note = until(lambda: noted(python), 20, "the head runs")
        assert note["argv"] == ["-P", "-m", "mikoshi.launch.controller.head", str(run.folder.path)] and note["cwd"] == str(
            there
        )
        assert read_private(run.folder.path / PRIVATE) == {"VALUE": value}
        again = open_submitted(run.folder.path).spec
        assert again.cluster == cluster and again.workdir == str(there)


@few
@given(interpreter=NAME, folder_name=NAME, setup_name=NAME, held=TEXT)
def test_what_the_batch_script_is_given_it_passes_on_exactly(interpreter, folder_name, setup_name, held):
    with watched() as folder:
        (folder / "batch.sh").write_text(SCRIPT)
        python = standin(folder / "bin" / interpreter)
        setup = folder / "setups" / setup_name
        setup.parent.mkdir()
        setup.write_text(f"set -- other arguments\nexport HELD={shlex.quote(held)}\n")
        given = ["bash", str(folder / "batch.sh"), str(python), str(setup), "/bin", str(folder / folder_name), folder_name]
        subprocess.run(given, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        note = noted(python)
        assert note["argv"] == ["-P", "-m", "mikoshi.launch.controller.head", str(folder / folder_name), folder_name]
        assert note["env"]["HELD"] == held


@few
@given(text=TEXT)
def test_setup_lines_are_what_bash_makes_of_them_alone(text):
    """The very text as a program's argument: not read twice on its way through the file."""
    with watched() as folder:
        program = standin(folder / "python")
        cluster = LocalCluster(kind="local", python=str(program), setup=f"export HELD={shlex.quote(text)}")
        run = create_run(new_spec(run_config(folder / "data", folder / "runs"), cluster, folder))
        LocalBackend(cluster).submit(run, run.add(Request(nodes=1, min_nodes=1, time=1.0)))
        assert until(lambda: noted(program), 20, "the head runs")["env"]["HELD"] == text


@many
@given(text=TEXT)
@example("fe80::1%$(touch canary)")
@example("fe80::1%eth0")
@example("-oProxyCommand=x")
@example("root@n1")
@example("n1\n")
def test_a_host_name_is_refused_or_harmless(text):
    try:
        passed = host_name(text)
    except ValueError:
        with pytest.raises(ValidationError):
            SshCluster(kind="ssh", hosts=[text])
        with pytest.raises(ValidationError):
            Request(nodes=1, min_nodes=1, time=1.0, exclude=[text])
        return
    assert passed == text and not text.startswith("-")
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:_%-")
    assert Path(f"node-{text}.log").name == f"node-{text}.log"


@many
@given(text=TEXT)
def test_words_for_a_scheduler_are_refused_or_harmless(text):
    try:
        word(text)
    except ValueError:
        with pytest.raises(ValidationError):
            SlurmCluster(kind="slurm", partition=text)
        return
    assert not text.startswith("-") and not set(text) & set(" \t\r\n;&|$`'\"\\()<>*?[]#~!{}")


@many
@given(name=TEXT)
def test_a_variables_name_is_refused_or_one(name):
    try:
        variable_name(name)
    except ValueError:
        with pytest.raises(ValidationError):
            LocalCluster(kind="local", env={name: "x"})
        with pytest.raises(ValidationError):
            LocalCluster(kind="local", secrets=[name])
        return
    assert name.isidentifier() and name.isascii()


@many
@given(value=TEXT)
def test_values_survive_the_private_file(value):
    with watched() as folder:
        write_private(folder / PRIVATE, {"NAME": value})
        assert read_private(folder / PRIVATE) == {"NAME": value}
        assert [path.name for path in folder.iterdir()] == [PRIVATE]


@pytest.mark.parametrize("section", ["python", "workdir", "setup", "identity", "known_hosts"])
def test_a_nul_byte_which_no_command_can_hold_is_refused(section):
    with pytest.raises(ValidationError, match="NUL"):
        SshCluster(kind="ssh", hosts=["n1"], **{section: "a\0b"})


@many
@given(lines=st.lists(st.one_of(TEXT, TEXT.map(lambda text: f"{text} slots=2")), max_size=4))
def test_a_hostfile_is_read_as_hosts_or_refused(lines):
    with watched() as folder:
        file = folder / "hostfile"
        file.write_bytes("\n".join(lines).encode())
        try:
            found = read_hostfile(file)
        except LaunchError as error:
            assert len(str(error).splitlines()) == 1
            return
        assert all(host_name(host) and slots > 0 for host, slots in found.items())


@many
@given(text=TEXT, key=st.sampled_from(["hosts", "user", "python", "setup", "network.interface"]))
def test_overrides_of_a_cluster_file_are_refused_in_words_or_hold_exactly(text, key):
    with watched() as folder:
        file = folder / "mine.toml"
        file.write_text('kind = "ssh"\nhosts = ["n1"]\n')
        value = f"[{_quoted(text)}]" if key == "hosts" else _quoted(text)
        try:
            cluster = load_cluster(str(file), (f"{key}={value}",))
        except ConfigError as error:
            assert key.split(".")[0] in str(error)
            return
        held = cluster.network.interface if "." in key else getattr(cluster, key)
        assert held == ([text] if key == "hosts" else text)


def _quoted(text):
    """A TOML string of any text."""
    return '"' + "".join(f"\\U{ord(sign):08x}" for sign in text) + '"'
