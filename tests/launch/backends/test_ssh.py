"""What ssh is given: options that nothing of the user's settings undoes, and one line that every login shell reads alike."""

import shutil
import subprocess
import sys

import pytest

from mikoshi.launch.backends.local.local import LocalBackend
from mikoshi.launch.backends.ssh.ssh import SshSite, hosts, remote_line, ssh
from mikoshi.launch.config.cluster import SshCluster
from mikoshi.launch.runs.record import Request, create_run, new_spec
from mikoshi.trainer.errors import LaunchError
from runs import run_config
from standin import noted, standin

SHELLS = ["sh", "bash", "dash", "zsh", "tcsh", "fish"]
HOSTILE_CONFIG = """\
Host *
  ControlMaster auto
  ControlPath /tmp/shared-%C
  ForwardAgent yes
  ForwardX11 yes
  RequestTTY force
  RemoteCommand tmux attach
  PermitLocalCommand yes
  LocalCommand touch canary
  LocalForward 8888 localhost:8888
  StrictHostKeyChecking no
  BatchMode no
  UpdateHostKeys yes
  ServerAliveInterval 0
  ConnectTimeout 600
"""


def cluster(**fields):
    return SshCluster(kind="ssh", **{"hosts": ["n1", "n2", "n3"], **fields})


def request(**fields):
    return Request(**{"nodes": 2, "min_nodes": 1, "time": 1.0, **fields})


def made_of(argv, config):
    """What ssh itself understands of an argument list, beside a user's settings."""
    asked = ["ssh", "-F", str(config), "-G", *argv[1:]]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def spec_of(folder):
    return new_spec(run_config(folder / "data", folder / "runs"), cluster(), folder)


needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's client")


@needs_ssh
def test_nothing_of_the_users_settings_gives_it_a_terminal_an_agent_or_a_shared_connection(tmp_path):
    config = tmp_path / "config"
    config.write_text(HOSTILE_CONFIG)
    plain = made_of(ssh(cluster(connect_timeout=7), "n1", spec_of(tmp_path)), config)
    wanted = {
        "batchmode": "yes", "stricthostkeychecking": "true", "controlmaster": "false", "forwardagent": "no", "forwardx11": "no",
        "requesttty": "false", "permitlocalcommand": "no", "clearallforwardings": "yes", "updatehostkeys": "false",
        "connecttimeout": "7", "serveraliveinterval": "5", "host": "n1", "port": "22",
    }  # fmt: skip
    assert {name: plain.get(name) for name in wanted} == wanted
    assert not {"remotecommand", "controlpath"} & {name for name, value in plain.items() if value != "none"}


@needs_ssh
def test_what_ssh_itself_knows_of_a_host_still_counts(tmp_path):
    config = tmp_path / "config"
    config.write_text("Host n1\n  HostName n1.example.org\n  Port 2222\n  User someone\n  ProxyJump gate\n")
    plain = made_of(ssh(cluster(), "n1", spec_of(tmp_path)), config)
    assert (plain["hostname"], plain["port"], plain["user"], plain["proxyjump"]) == (
        "n1.example.org",
        "2222",
        "someone",
        "gate",
    )
    own = made_of(ssh(cluster(port=22022, user="me"), "n1", spec_of(tmp_path)), config)
    assert (own["port"], own["user"]) == ("22022", "me")


@needs_ssh
def test_paths_with_blanks_and_percent_signs_are_taken_as_they_are(tmp_path):
    (tmp_path / "config").write_text("")
    argv = ssh(cluster(known_hosts="/keys of/100%h", identity="/keys of/%u id"), "n1", spec_of(tmp_path))
    plain = made_of(argv, tmp_path / "config")
    assert plain["userknownhostsfile"] == "/keys of/100%h" and plain["globalknownhostsfile"] == "/dev/null"
    assert plain["identitiesonly"] == "yes" and plain["identityfile"] == "/keys of/%%u id"


@pytest.mark.parametrize("path", ['a"b', "a\\b", "${HOME}/key", "a\nProxyCommand touch canary"])
@pytest.mark.parametrize("key", ["identity", "known_hosts"])
def test_a_path_that_ssh_would_read_otherwise_is_refused(tmp_path, key, path):
    with pytest.raises(LaunchError, match=key):
        ssh(cluster(**{key: path}), "n1", spec_of(tmp_path))


def test_paths_are_relative_to_the_workdir_and_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    spec = spec_of(tmp_path)
    assert f'IdentityFile="{tmp_path}/keys/id"' in ssh(cluster(identity="keys/id"), "n1", spec)
    assert 'IdentityFile="/home/me/.ssh/id"' in ssh(cluster(identity="~/.ssh/id"), "n1", spec)


def test_hosts_to_avoid_are_left_out_and_spares_stay_in_order(tmp_path):
    assert hosts(cluster(), request()) == ["n1", "n2", "n3"]
    assert hosts(cluster(), request(exclude=["n1"])) == ["n2", "n3"]
    run = create_run(new_spec(run_config(tmp_path / "data", tmp_path / "runs"), cluster(), tmp_path))
    assert SshSite(cluster(), run, run.add(request(exclude=["n2"]))).nodes() == ["n1", "n3"]


def test_fewer_hosts_than_nodes_are_refused_before_any_is_asked(tmp_path):
    run = create_run(new_spec(run_config(tmp_path / "data", tmp_path / "runs"), cluster(), tmp_path))
    with pytest.raises(
        LaunchError, match=r"3 nodes asked for, and 3 hosts: .* avoided are n2, which --include-node takes back"
    ):
        LocalBackend(cluster()).check(run, request(nodes=3, exclude=["n2"]))


def test_a_plain_command_can_be_read():
    line = remote_line(["/opt/python", "-P", "-m", "mikoshi.launch.agent.node"], "/data/run")
    assert line == "exec /bin/sh -c 'cd -- /data/run || exit 97; exec /opt/python -P -m mikoshi.launch.agent.node'"


HARD = [
    "a b", "it's", 'a"b', "$(touch canary)", "`touch canary`", "new\nline", "trail\n", "\n", "ex!cl", "!!", "back\\slash",
    "\\\\", "\\", "tab\t", "ünï", "~", "*", "%s%b\\0101", "-x", ";touch canary;", "\x01\x7f", "long" * 2000,
    "{a,b}", "#", "&", "$HOME",
]  # fmt: skip


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_passes_every_argument_exactly(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"needs the shell {shell}")
    program = standin(tmp_path / "program's $(touch canary)\nname")
    workdir = tmp_path / "a 'folder'\\! $(touch canary)"
    workdir.mkdir()
    line = remote_line([str(program), "", *HARD], str(workdir))
    subprocess.run([shell, "-c", line], cwd=tmp_path, check=True)
    note = noted(program)
    assert note["argv"] == ["", *HARD] and note["cwd"] == str(workdir)
    assert not list(tmp_path.rglob("canary"))


def test_a_missing_workdir_starts_nothing(tmp_path):
    program = standin(tmp_path / "program")
    done = subprocess.run(["sh", "-c", remote_line([str(program)], str(tmp_path / "no such"))], capture_output=True, text=True)
    assert done.returncode == 97 and "no such" in done.stderr and noted(program) is None


def test_the_command_for_a_node_takes_the_setup_from_a_file(tmp_path):
    python = standin(tmp_path / "python", "print(sys.stdin.read())")
    there = cluster(python=str(python), setup="echo noise; read -r stolen; export SEEN=$#")
    run = create_run(new_spec(run_config(tmp_path / "data", tmp_path / "runs"), there, tmp_path))
    (run.folder.path / "setup.sh").write_text(there.setup + "\n")
    argv = SshSite(there, run, run.add(request())).command("n2")
    assert argv[-2] == "n2" and argv[-3] == "--" and "SEEN" not in argv[-1]
    done = subprocess.run(["sh", "-c", argv[-1]], input="first line\nsecond", capture_output=True, text=True, cwd="/")
    assert done.stdout == "first line\nsecond\n" and done.stderr == "noise\n"
    note = noted(python)
    assert (
        note["argv"] == ["-P", "-m", "mikoshi.launch.agent.node"]
        and note["cwd"] == str(tmp_path)
        and note["env"]["SEEN"] == "0"
    )


def test_without_an_interpreter_of_its_own_it_is_the_one_that_submits(tmp_path):
    run = create_run(new_spec(run_config(tmp_path / "data", tmp_path / "runs"), cluster(), tmp_path))
    assert (
        f"exec {sys.executable} -P -m mikoshi.launch.agent.node"
        in SshSite(cluster(), run, run.add(request())).command("n1")[-1]
    )
