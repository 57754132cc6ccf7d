"""A real Slurm of three nodes on this machine, as root: each node has a network, a host name and two (null) GPUs of its own.

Everything is in one folder but for network namespaces and a bridge, whose names begin with the cluster's own token; down()
removes them all. Several clusters may be up at once.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "iproute2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare")
NODES = ("n1", "n2", "n3")
GPUS = 2
USER = 65534
"""The account `nobody`, for what a plain user may do."""

_CONF = """\
ClusterName=c{token}
SlurmctldHost=ctl({net}.1)
SlurmctldPort={port}
SlurmdPort=6818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
TCPTimeout=2
KillWait=5
UnkillableStepTimeout=10
MinJobAge=300
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=10 PriorityTier=10 PreemptMode=OFF
"""

# $1: host name, $2: the hosts file; then what to run, with a host name and a hosts file of its own.
_AS_HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class ClusterError(RuntimeError):
    """The test cluster cannot be brought up here; the message says why."""


@dataclass(frozen=True)
class SlurmCluster:
    """token: what its namespaces' names begin with. net: the first three numbers of its addresses."""

    folder: Path
    token: str
    net: str
    port: int

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """For client commands, and for what calls them."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def address(self, node: str) -> str:
        return f"{self.net}.{10 + NODES.index(node) + 1}"

    def call(self, *argv: str, user: int = 0) -> str:
        """What a client command prints. Raises ClusterError with what it said."""
        done = subprocess.run(as_user(user, argv), env=self.env, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise ClusterError(f"{argv[0]}: {done.stderr.strip()}")
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """As sinfo has them: idle, mixed, allocated, completing, down*, …"""
        lines = self.call("sinfo", "-hN", "-p", "main", "-o", "%N %T").split("\n")
        return dict(line.split() for line in lines if line)  # type: ignore[misc]

    def job(self, ident: str) -> dict[str, str]:
        """The fields of scontrol show job; empty for one that is no longer known."""
        try:
            text = self.call("scontrol", "-o", "show", "job", ident)
        except ClusterError:
            return {}
        return dict(part.split("=", 1) for part in text.splitlines()[0].split() if "=" in part)  # type: ignore[misc]

    def on(self, node: str, *argv: str) -> list[str]:
        """The command that runs `argv` on a node, beside its slurmd."""
        hosts = str(self.folder / "hosts")
        inside = ["unshare", "--uts", "--mount", "sh", "-c", _AS_HOST, "sh", node, hosts, *argv]
        return ["nsenter", f"--net=/run/netns/{self.token}{node}", *inside]

    def processes(self, node: str) -> list[psutil.Process]:
        """All that run in a node's network."""
        return _inside(Path(f"/run/netns/{self.token}{node}"))

    def power_off(self, node: str) -> None:
        """Nothing of it is left, and nobody is told: srun, killed alone, has a helper that ends its step elsewhere."""
        self.cut(node)
        self.kill_node(node)

    def kill_node(self, node: str) -> None:
        """End all that runs on it."""
        _kill(lambda: self.processes(node))

    def kill_rank(self, node: str, number: int = signal.SIGKILL) -> None:
        """Or another signal, to one of the ranks that run there."""
        ranks: list[psutil.Process] = []

        def there() -> bool:
            ranks[:] = [process for process in self.processes(node) if process.name().startswith("mikoshi-rank")]
            return bool(ranks)

        self.wait(there, 30.0, f"a rank on {node}")
        ranks[0].send_signal(number)

    def start_node(self, node: str) -> None:
        """Its slurmd, as at the machine's start."""
        _run(self.on(node, _program("slurmd"), "-N", node, "-f", str(self.conf)), env=self.env)

    def cut(self, node: str) -> None:
        """Its link: nothing reaches it, and it reaches nothing."""
        _run(["ip", "link", "set", f"{self.token}{node}", "down"])

    def restore(self, node: str) -> None:
        _run(["ip", "link", "set", f"{self.token}{node}", "up"])

    def wait(self, until: Callable[[], bool], seconds: float = 30.0, what: str = "the cluster") -> None:
        """Raises ClusterError when it does not come true in time."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise ClusterError(f"{what}: not after {seconds:g} s; nodes: {self.node_states()}")
            time.sleep(0.1)

    def quiet(self) -> None:
        """End all jobs, bring all nodes back, and wait until they are idle: for the next test."""
        self.call("scancel", "--user=root")
        self.call("scancel", f"--user={USER}")
        for node in NODES:
            self.restore(node)
            if not any(process.name() == "slurmd" for process in self.processes(node)):
                self.start_node(node)

        def idle() -> bool:
            states = self.node_states()
            for node, state in states.items():
                if state.startswith(("down", "drain")):
                    subprocess.run(
                        ["scontrol", "update", f"NodeName={node}", "State=RESUME"], env=self.env, capture_output=True
                    )
            return set(states.values()) == {"idle"}

        self.wait(idle, 60.0, "all nodes idle")


def missing() -> str:
    """Why no cluster can be brought up here, or nothing."""
    if os.geteuid():
        return "needs root: nodes are network namespaces"
    absent = [program for program in PROGRAMS if not _found(program)]
    return f"needs the Debian packages of {', '.join(absent)}: run tests/cluster/slurm-up once" if absent else ""


def install() -> None:
    """The Debian packages, where they are absent. Their own services are not started."""
    if not any(not _found(program) for program in PROGRAMS):
        return
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    _run(["apt-get", "update", "-qq"], env=env)
    _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], env=env)


def up(folder: Path) -> SlurmCluster:
    """Bring one up in a folder that is new; it returns when all nodes are idle. Raises ClusterError, and leaves nothing."""
    if why := missing():
        raise ClusterError(why)
    if (folder / "cluster.json").exists():
        raise ClusterError(f"{folder}: a cluster is there already: run slurm-down --folder {folder} first")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    cluster = SlurmCluster(folder, f"mks{secrets.token_hex(2)}", _free_net(), _free_port())
    (folder / "cluster.json").write_text(json.dumps({**asdict(cluster), "folder": str(folder)}))
    try:
        _write(cluster)
        _network(cluster)
        _start(cluster)
        cluster.wait(lambda: set(cluster.node_states().values()) == {"idle"}, 30.0, "all nodes idle")
    except BaseException:
        down(cluster)
        raise
    return cluster


def load(folder: Path) -> SlurmCluster:
    """The one that is up in a folder."""
    try:
        found = json.loads((folder / "cluster.json").read_text())
    except FileNotFoundError:
        raise ClusterError(f"{folder}: no cluster is there") from None
    return SlurmCluster(Path(found["folder"]), found["token"], found["net"], found["port"])


def down(cluster: SlurmCluster) -> None:
    """Remove all of it; what is not there is passed over."""
    spaces = [Path(f"/run/netns/{cluster.token}{node}") for node in NODES]
    _kill(lambda: [process for space in spaces for process in _inside(space)])
    _kill(lambda: _daemons(cluster))
    for space in spaces:
        subprocess.run(["ip", "netns", "delete", space.name], capture_output=True)
    subprocess.run(["ip", "link", "delete", cluster.token], capture_output=True)
    shutil.rmtree(cluster.folder, ignore_errors=True)


def as_user(user: int, argv: tuple[str, ...]) -> list[str]:
    """A command under a plain account."""
    return [*(["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []), *argv]


def _write(cluster: SlurmCluster) -> None:
    folder = cluster.folder
    for name in ("state", "dev", "munge"):
        (folder / name).mkdir(exist_ok=True)
    hosts = [f"{cluster.address(node)} {node}" for node in NODES]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{cluster.net}.1 ctl", *hosts]) + "\n")
    nodes = "\n".join(f"NodeName={node} NodeAddr={cluster.address(node)}" for node in NODES)
    text = _CONF.format(token=cluster.token, net=cluster.net, port=cluster.port, folder=folder, gpus=GPUS, nodes=nodes)
    cluster.conf.write_text(text)
    for number in range(GPUS):
        os.mknod(folder / "dev" / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"NodeName=n[1-3] Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n")
    key = folder / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))


def _network(cluster: SlurmCluster) -> None:
    bridge = cluster.token
    _run(["ip", "link", "add", bridge, "type", "bridge"])
    _run(["ip", "address", "add", f"{cluster.net}.1/24", "dev", bridge])
    _run(["ip", "link", "set", bridge, "up"])
    for node in NODES:
        space = f"{cluster.token}{node}"
        _run(["ip", "netns", "add", space])
        _run(["ip", "link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space])
        _run(["ip", "link", "set", space, "master", bridge, "up"])
        _run(["ip", "-n", space, "address", "add", f"{cluster.address(node)}/24", "dev", "eth0"])
        _run(["ip", "-n", space, "link", "set", "lo", "up"])
        _run(["ip", "-n", space, "link", "set", "eth0", "up"])
        _run(["ip", "-n", space, "route", "add", "default", "via", f"{cluster.net}.1"])


def _start(cluster: SlurmCluster) -> None:
    munge = cluster.folder / "munge"
    _run([_program("munged"), "--force", f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
          f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2"])  # fmt: skip
    controller = [_program("slurmctld"), "-c", "-f", str(cluster.conf)]
    _run(["unshare", "--uts", "--mount", "sh", "-c", _AS_HOST, "sh", "ctl", str(cluster.folder / "hosts"), *controller],
         env=cluster.env)  # fmt: skip
    for node in NODES:
        cluster.start_node(node)


def _daemons(cluster: SlurmCluster) -> list[psutil.Process]:
    """Its munged and slurmctld: those that its folder is on the command line of."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        mine = any(f"{cluster.folder}/" in part for part in process.info["cmdline"] or ())
        if mine and process.info["name"] in ("munged", "slurmctld"):
            found.append(process)
    return found


def _inside(space: Path) -> list[psutil.Process]:
    try:
        wanted = space.stat().st_ino
    except FileNotFoundError:
        return []
    found = []
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/ns/net").stat().st_ino == wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def _kill(those: Callable[[], list[psutil.Process]]) -> None:
    """Until none is left: while some are killed, others may start more. Raises ClusterError after 20 s."""
    deadline = time.monotonic() + 20.0
    while found := those():
        if time.monotonic() > deadline:
            raise ClusterError(f"cannot be killed: {found}")
        for process in found:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(found, timeout=1.0)


def _free_net() -> str:
    taken = subprocess.run(["ip", "-4", "-o", "address"], capture_output=True, text=True).stdout
    while True:
        net = f"10.{64 + secrets.randbelow(64)}.{secrets.randbelow(256)}"
        if f" {net}." not in taken:
            return net


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _program(name: str) -> str:
    found = _found(name)
    if found is None:
        raise ClusterError(f"{name}: not installed")
    return found


def _run(argv: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, timeout=600)
    if done.returncode:
        raise ClusterError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
