"""Over real ssh to real hosts: what is checked before a run, and that nothing outlives its local end."""

import contextlib
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from hosts import cut, lan, mend, on, power_off, power_on, until, why_not
from mikoshi.launch.backends.local.local import LocalBackend
from mikoshi.launch.backends.ssh.ssh import SshSite
from mikoshi.launch.config.cluster import SshCluster, load_cluster
from mikoshi.launch.runs.record import Request, SubmittedRun, create_run, new_spec
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder
from runs import run_config
from standin import noted, standin

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")

SHELLS = {"n2": "/usr/bin/fish", "n3": "/usr/bin/tcsh"}
ECHO = """
print("up", flush=True)
for line in sys.stdin:
    print(line.rstrip("\\n")[::-1], flush=True)
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    shells = {name: shell for name, shell in SHELLS.items() if Path(shell).exists()}
    odd = tmp_path_factory.mktemp("keys of 100%")
    with lan(tmp_path_factory.mktemp("lan"), ["n1", "n2", "n3"], shells) as made:
        made.identity = Path(shutil.copy(made.identity, odd))
        made.known_hosts = Path(shutil.copy(made.known_hosts, odd))
        yield made


def request(**fields):
    return Request(**{"nodes": 2, "min_nodes": 1, "time": 1.0, **fields})


def cluster(net, *names, **fields):
    """Hosts by their addresses, which the machine that runs the tests can reach."""
    addresses = [net[name].address for name in names or net.hosts]
    known = {"identity": str(net.identity), "known_hosts": str(net.known_hosts), "connect_timeout": 3}
    return SshCluster(kind="ssh", hosts=addresses, **{**known, **fields})


def check(cluster, **asked):
    """As for a run that is not there yet, in the cluster's workdir or else on a disk that the hosts share."""
    workdir = Path(cluster.workdir or tempfile.gettempdir())
    config = run_config(workdir / "data", Path("runs"))
    run = SubmittedRun(RunFolder(workdir / config.run.path), new_spec(config, cluster, workdir))
    LocalBackend(cluster).check(run, request(**asked))


def refusal(cluster, **asked):
    with pytest.raises(LaunchError) as refused:
        check(cluster, **asked)
    return str(refused.value).splitlines()


def test_hosts_that_serve_are_let_pass_whatever_their_login_shell(net, tmp_path):
    check(cluster(net, workdir=str(tmp_path)), nodes=3)
    # The setup lines of a check: read once, by bash, in no other's input.
    check(cluster(net, setup="[[ 1 == 1 ]]\nread -r line || true\necho noise"), nodes=3)


def test_each_host_that_does_not_serve_is_a_line_of_its_own(net, tmp_path):
    lines = refusal(cluster(net, workdir=str(tmp_path / "no such")), nodes=3)
    assert [line.split(":")[0] for line in lines] == [host.address for host in net.hosts.values()]
    assert all(f"no folder {tmp_path / 'no such'} there" in line and "set workdir" in line for line in lines)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"python": "/no/such/python"}, "no interpreter /no/such/python there"),
        ({"python": "/usr/bin/python3"}, "has no Mikoshi: install version"),
        ({"setup": "module_of_yours load cuda"}, "module_of_yours"),
        ({"setup": "false", "python": "/bin/true"}, "look at setup or python"),
        ({"user": "nobody"}, "it does not let us in by key: `ssh-copy-id"),
        ({"port": 2222}, "is it up, and sshd at port 2222?"),
    ],
)
def test_what_is_wrong_is_told_with_the_way_out(net, fields, told):
    lines = refusal(cluster(net, "n1", **fields), nodes=1)
    assert len(lines) == 1 and lines[0].startswith(net["n1"].address) and told in lines[0]


@pytest.mark.parametrize("runs", [False, True])
def test_a_folder_of_the_same_name_that_is_not_shared_is_told(net, tmp_path, runs):
    if runs:  # there is a run already, in a folder that is not on the other host at all
        (tmp_path / "runs").mkdir()
    mine = cluster(net, workdir=str(tmp_path))
    assert net["n2"].run("mount", "-t", "tmpfs", "none", str(tmp_path)).returncode == 0
    try:
        (line,) = refusal(mine, nodes=3)
    finally:
        net["n2"].run("umount", str(tmp_path))
    where = tmp_path / "runs" if runs else tmp_path
    assert line.startswith(f"{net['n2'].address}: {where} there is not the folder of this name here: share it")
    check(mine, nodes=3)
    assert not list(tmp_path.rglob(".mikoshi-shared-*"))


def test_another_version_there_is_told(net, tmp_path):
    old = standin(tmp_path / "python", "print('mikoshi 0.0.1')")
    (line,) = refusal(cluster(net, "n1", python=str(old)), nodes=1)
    assert "Mikoshi 0.0.1 there and" in line and "install the same version" in line
    assert noted(old)["argv"][:2] == ["-P", "-c"]


def test_a_host_whose_key_is_not_known_is_refused_and_stays_unknown(net, tmp_path):
    empty = tmp_path / "known hosts"
    empty.write_text("")
    (line,) = refusal(cluster(net, "n1", known_hosts=str(empty)), nodes=1)
    assert "its key is not known: `ssh-keyscan" in line and str(empty) in line and not empty.read_text()


def test_a_host_whose_key_has_changed_is_refused_as_such(net, tmp_path):
    mixed = tmp_path / "known_hosts"
    other = net.known_hosts.read_text().splitlines()[1].split()[1:]
    mixed.write_text(f"{net['n1'].address} {' '.join(other)}\n")
    (line,) = refusal(cluster(net, "n1", known_hosts=str(mixed)), nodes=1)
    assert "its key is not the one in" in line and f"ssh-keygen -R {net['n1'].address}" in line


def test_an_unknown_name_is_told(net):
    (line,) = refusal(cluster(net, "n1").model_copy(update={"hosts": ["no-such-host.invalid"]}), nodes=1)
    assert "no-such-host.invalid: no such host is known here" in line


def test_a_dead_host_is_told_unless_a_spare_stands_in(net):
    power_off(net, "n2")
    try:
        check(cluster(net), nodes=2)
        (line,) = refusal(cluster(net), nodes=3)
        assert line.startswith(f"{net['n2'].address}: not reachable")
    finally:
        power_on(net, "n2")


def test_a_hostfile_names_the_hosts_and_their_ranks(net, tmp_path):
    (tmp_path / "hosts").write_text("".join(f"{host.address} slots=2  # {host.name}\n" for host in net.hosts.values()))
    (tmp_path / "mine.toml").write_text(
        f'kind = "ssh"\nhostfile = "hosts"\nidentity = "{net.identity}"\nknown_hosts = "{net.known_hosts}"\n'
    )
    read = load_cluster(str(tmp_path / "mine.toml"))
    assert read.hosts == [host.address for host in net.hosts.values()] and read.ranks == 2
    check(read, nodes=3)


@contextlib.contextmanager
def agent(net, name, folder, then=ECHO, **fields):
    """A stand-in for agent.node on a host, started as the head starts it: its process here, and what it noted there."""
    workdir = folder / "it's \\ a $(touch canary)\nfolder!"
    workdir.mkdir(parents=True)
    python = standin(folder / "bin" / "python !\n\\", then)
    asked = cluster(net, python=str(python), setup='echo noise; export "SET=$# !"', **fields)
    run = create_run(new_spec(run_config(folder / "data", folder / "runs"), asked, workdir))
    (run.folder.path / "setup.sh").write_text(asked.setup + "\n")
    argv = SshSite(asked, run, run.add(request())).command(net[name].address)
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, until(lambda: noted(python), 20, f"it runs on {name}"), workdir
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            pipe.close()
        with contextlib.suppress(OSError):  # what could not be written any more
            process.stdin.close()


def alive(net, name, note):
    """Whether the stand-in still runs on that host (its number is the host's own)."""
    return bool(net[name].run("kill", "-0", str(note["pid"])).returncode == 0)


@pytest.mark.parametrize("name", ["n1", "n2", "n3"])
def test_an_agent_is_reached_exactly_through_a_pipe_alone(net, name, tmp_path):
    with agent(net, name, tmp_path) as (process, note, workdir):
        assert note["argv"] == ["-P", "-m", "mikoshi.launch.agent.node"] and note["cwd"] == str(workdir)
        assert note["env"]["SET"] == "0 !" and "SSH_AUTH_SOCK" not in note["env"] and "SSH_TTY" not in note["env"]
        assert process.stdout.readline() == "up\n", "something else was written into the pipe"
        text = "a line; $(touch canary) \\ ü"
        process.stdin.write(text + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == text[::-1] + "\n"
        process.stdin.close()
        assert process.wait(10) == 0
    assert not list(tmp_path.rglob("canary")) and not alive(net, name, note)


def test_killed_at_the_local_end_it_is_gone_within_seconds(net, tmp_path):
    with agent(net, "n1", tmp_path) as (process, note, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not alive(net, "n1", note), 5, "the remote end is gone")
    until(lambda: len(on(net["n1"])) == 0, 5, "nothing of it is left on n1")


def test_the_local_end_learns_of_a_dead_host_and_ends(net, tmp_path):
    patience = {"patience": {"lost": 1.0}}
    with agent(net, "n1", tmp_path, **patience) as (process, _, _):
        power_off(net, "n1")
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            assert process.wait(15) == 255
        finally:
            power_on(net, "n1")


def test_a_short_cut_of_the_link_is_lived_through(net, tmp_path):
    with agent(net, "n1", tmp_path, patience={"lost": 5.0}) as (process, _, _):
        assert process.stdout.readline() == "up\n"
        cut(net, "n1")
        try:
            process.stdin.write("abc\n")
            process.stdin.flush()
        finally:
            mend(net, "n1")
        assert process.stdout.readline() == "cba\n"


def test_no_process_of_the_tests_is_left_on_a_host(net):
    for host in net.hosts.values():
        until(lambda host=host: not on(host), 5, f"{host.name} is empty")
