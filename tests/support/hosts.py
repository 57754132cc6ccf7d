"""Real hosts on one machine: each has its own network, host name, processes and sshd, on the file system that all share.

A host is a network namespace on a common bridge with an init of its own, so that its cable can be pulled and its power cut.
What is left of a session that was killed is removed by the next one.
"""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_NETNS, _ETC = Path("/run/netns"), Path("/etc/netns")
_INIT = r"""
hostname "$1"
mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/sshd
exec /usr/sbin/sshd -D -e -f "$2"
"""
_SSHD = """\
Port {port}
HostKey {key}
AuthorizedKeysFile {authorized}
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
PrintMotd no
MaxStartups 100
"""


@dataclass
class Host:
    """netns: its network namespace; port: the end of its cable in the bridge; folder: its sshd's files and log."""

    name: str
    address: str
    netns: str
    port: str
    folder: Path
    process: subprocess.Popen | None = None
    init: int = 0

    def enter(self, *argv, cwd="/"):
        """The argument list that runs another one on this host, as if typed there."""
        spaces = ["--net", "--uts", "--pid", "--mount", "--ipc"]
        return ["nsenter", "--target", str(self.init), *spaces, "--", "env", f"--chdir={cwd}", *map(str, argv)]

    def run(self, *argv, cwd="/", **options):
        return subprocess.run(self.enter(*argv, cwd=cwd), capture_output=True, text=True, **options)


@dataclass
class Lan:
    """Hosts that can reach each other by name. identity: the private key that all of them let in; known_hosts: their keys."""

    bridge: str
    folder: Path
    identity: Path
    known_hosts: Path
    hosts: dict[str, Host] = field(default_factory=dict)

    def __getitem__(self, name):
        return self.hosts[name]


def why_not():
    """Why this machine can have no such hosts, or nothing."""
    if os.geteuid():
        return "needs root, for network namespaces"
    wanted = {"ip": "iproute2", "ssh": "openssh-client", "/usr/sbin/sshd": "openssh-server", "unshare": "util-linux"}
    absent = sorted(package for program, package in wanted.items() if shutil.which(program) is None)
    if absent:
        return f"needs the Debian packages {', '.join(absent)}"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True).returncode:
        return "needs the right to make namespaces, which this container lacks"
    return ""


@contextlib.contextmanager
def lan(folder, names, shells=None):
    """Hosts of these names. shells: the login shells of root on some of them. Nothing of them is left at the end."""
    _sweep()
    mine = str(os.getpid())
    bridge = _unused(f"mk{mine}b")
    net = _free_subnet()
    made = Lan(bridge, folder, folder / "id", folder / "known_hosts")
    folder.mkdir(parents=True, exist_ok=True)
    _keygen(made.identity)
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{net[1]}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        addresses = {name: str(net[number]) for number, name in enumerate(names, 11)}
        known = []
        for number, name in enumerate(names):
            host = Host(name, addresses[name], f"mikoshi-{bridge}-{number}", f"{bridge}{number}", folder / name)
            made.hosts[name] = host
            _wire(host, bridge)
            _etc(host, addresses, (shells or {}).get(name))
            _keygen(host.folder / "hostkey")
            public = (host.folder / "hostkey.pub").read_text().split()
            known.append(f"{name},{host.address} {public[0]} {public[1]}\n")
            authorized = made.identity.with_suffix(".pub")
            config = _SSHD.format(port=22, key=host.folder / "hostkey", authorized=authorized)
            (host.folder / "sshd_config").write_text(config)
        made.known_hosts.write_text("".join(known))
        for host in made.hosts.values():
            _boot(host)
        yield made
    finally:
        for host in made.hosts.values():
            _halt(host)
            _remove(host.netns)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def cut(lan, name):
    """The switch forgets about a cable: packets vanish both ways, and nobody is told."""
    _switch(lan[name], "0")


def mend(lan, name):
    """As it was before."""
    _switch(lan[name], "3")


def power_off(lan, name):
    """Every process is gone at once, and no peer hears of it."""
    cut(lan, name)
    _halt(lan[name])


def power_on(lan, name):
    """The host boots: its sshd listens again, and nothing else runs."""
    mend(lan, name)
    _boot(lan[name])


def on(host):
    """What runs on a host besides its init: by name of the command."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        there = (_NETNS / host.netns).stat().st_ino
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                inside = Path(f"/proc/{process.pid}/ns/net").stat().st_ino == there
                outer = host.process is not None and process.pid in (host.init, host.process.pid)
                if inside and not outer and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def until(true, seconds, what):
    """Wait for something to become true. Fails where it does not in time."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return value


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _switch(host, state):
    subprocess.run(["bridge", "link", "set", "dev", host.port, "state", state], check=True, capture_output=True, text=True)


def _keygen(path):
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", path], check=True)


def _wire(host, bridge):
    inner = f"{host.port}i"
    _ip("netns", "add", host.netns)
    _ip("link", "add", host.port, "type", "veth", "peer", "name", inner)
    _ip("link", "set", inner, "netns", host.netns, "name", "eth0")
    _ip("-n", host.netns, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.netns, "link", "set", "lo", "up")
    _ip("-n", host.netns, "link", "set", "eth0", "up")
    gateway = str(next(ipaddress.ip_network(f"{host.address}/24", strict=False).hosts()))
    _ip("-n", host.netns, "route", "add", "default", "via", gateway)
    _ip("link", "set", host.port, "master", bridge, "up")


def _etc(host, addresses, shell):
    """What `ip netns exec` puts over /etc on that host."""
    folder = _ETC / host.netns
    folder.mkdir(parents=True)
    lines = [f"{address} {name}\n" for name, address in addresses.items()]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (folder / "resolv.conf").write_text("")
    if shell is not None:
        passwd = Path("/etc/passwd").read_text()
        (folder / "passwd").write_text(re.sub(r"^(root:.*):[^:]*$", rf"\1:{shell}", passwd, count=1, flags=re.MULTILINE))


def _boot(host):
    argv = [
        "setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", host.netns,
        "unshare", "--uts", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child",
        "sh", "-c", _INIT, "sh", host.name, str(host.folder / "sshd_config"),
    ]  # fmt: skip
    with (host.folder / "log").open("ab") as log:
        host.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    children = until(lambda: psutil.Process(host.process.pid).children(), 10, f"{host.name} starts")
    host.init = children[0].pid
    until(lambda: _answers(host), 10, f"the sshd of {host.name} answers: {host.folder / 'log'}")


def _answers(host):
    with contextlib.suppress(OSError), socket.create_connection((host.address, 22), timeout=1) as connection:
        return connection.recv(4) == b"SSH-"
    return False


def _halt(host):
    if host.process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.init or host.process.pid, signal.SIGKILL)
        host.process.wait(10)
    host.process = None
    until(lambda: not on(host), 10, f"every process of {host.name} is gone")


def _remove(netns):
    subprocess.run(["ip", "netns", "del", netns], capture_output=True)
    shutil.rmtree(_ETC / netns, ignore_errors=True)
    with contextlib.suppress(OSError):
        _ETC.rmdir()


def _unused(prefix):
    """A name of its own for each bridge of this process; short, as interfaces want it."""
    there = {link["ifname"] for link in _json("link")}
    return next(name for number in range(100) if (name := f"{prefix}{number or ''}") not in there)


def _json(*arguments):
    done = subprocess.run(["ip", "-json", *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout or "[]")


def _free_subnet():
    """A /24 of 10.0.0.0/8 that this machine has no route to."""
    routes = [ipaddress.ip_network(route["dst"], strict=False) for route in _json("-4", "route") if route["dst"] != "default"]
    whole, mine = list(ipaddress.ip_network("10.0.0.0/8").subnets(new_prefix=16)), os.getpid() % 256
    for wide in whole[mine:] + whole[:mine]:
        for net in wide.subnets(new_prefix=24):
            if not any(net.overlaps(route) for route in routes):
                return net
    raise OSError("no free subnet in 10.0.0.0/8")


def _sweep():
    """Remove the hosts of sessions that are gone."""
    for path in _NETNS.glob("mikoshi-mk*b*-*") if _NETNS.exists() else []:
        found = re.fullmatch(r"mikoshi-(mk([0-9]+)b[0-9]*)-[0-9]+", path.name)
        if found and not psutil.pid_exists(int(found.group(2))):
            for process in on(Host("", "", path.name, "", path)):
                process.kill()
            _remove(path.name)
            subprocess.run(["ip", "link", "del", found.group(1)], capture_output=True)
