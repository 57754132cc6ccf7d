"""What a remote host is asked to run is exactly what was meant, whatever its login shell and whatever is in a path.

ssh joins its arguments and has them parsed by the account's own shell, so there is one argument, which sh, bash, zsh, csh and
fish all read alike. Nothing of the user's ssh settings can give it a terminal, an agent, a forwarding or a shared connection.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mikoshi.launch.backends.setup import LOGIN, setup_file
from mikoshi.launch.config.cluster import SshCluster
from mikoshi.launch.runs.record import Attempt, Request, Result, Spec, Submitted
from mikoshi.trainer.errors import LaunchError, TooFewError

_ASK = "mikoshi_lines=$(cat); " + LOGIN.replace('. "$0"', 'eval "$mikoshi_lines"')
_LOOK = """\
import importlib.metadata as m, os, sys, time
print('mikoshi', m.version('mikoshi'))
token, until = sys.argv[1], time.monotonic() + 5
folder = os.path.dirname(token)
while not os.path.exists(token) and os.path.isdir(folder) and os.listdir(folder) and time.monotonic() < until: time.sleep(0.2)
if not os.path.exists(token): sys.exit(98)
"""
"""Its version, and whether it sees a file just made where it was submitted: a network's file system may take a moment."""

_NO_WORKDIR, _NOT_SHARED, _NOT_FOUND, _NOT_EXECUTABLE, _SSH = 97, 98, 127, 126, 255
_SETTLE = 60.0
_AT_ONCE = 64
_WORD = 1000  # signs of one argument that every shell takes


@dataclass(frozen=True)
class SshSite:
    """The hosts of a cluster file, reached by ssh from the process that leads the attempt."""

    cluster: SshCluster
    run: Submitted
    attempt: Attempt

    def nodes(self) -> list[str]:
        """Its hosts without those to avoid, in their order; those beyond the nodes asked for are spares."""
        return hosts(self.cluster, self.attempt.request)

    def command(self, node: str) -> list[str]:
        """ssh to that host, and there, in the run's workdir, after the setup lines, agent.node."""
        return node_command(self.cluster, self.run, node)

    def after(self, run: Submitted, attempt: Attempt, result: Result) -> Result:
        """Nothing follows by itself: there is no queue."""
        return result


def hosts(cluster: SshCluster, request: Request) -> list[str]:
    """The hosts that a request may use, in the cluster file's order."""
    return [host for host in cluster.hosts if host not in request.avoided]


def node_command(cluster: SshCluster, run: Submitted, host: str) -> list[str]:
    """What is started on the leading machine for agent.node to run on a host."""
    argv = [cluster.python or sys.executable, "-P", "-m", "mikoshi.launch.agent.node"]
    if cluster.setup:
        argv = ["bash", "-c", LOGIN, str(setup_file(run)), *argv]
    return [*ssh(cluster, host, run.spec), remote_line(argv, run.spec.workdir)]


def remote_line(argv: list[str], workdir: str) -> str:
    """One line for any login shell that makes it become this command in that folder, every argument exact.

    Single quotes mean the same to all of them but for three signs: a backslash to fish, ! and a line break to csh, which also
    bounds the length of a word. Where that is in the way the line is given as octal numbers, which /bin/sh makes text of again.
    """
    script = f"cd -- {shlex.quote(workdir)} || exit {_NO_WORKDIR}; exec {shlex.join(argv)}"
    if script.isascii() and script.isprintable() and not set(script) & set("\\!") and len(script) < _WORD:
        return f"exec /bin/sh -c {shlex.quote(script)}"
    octal = [f"\\0{byte:03o}" for byte in script.encode("utf-8", "surrogateescape")]
    words = ["".join(octal[start : start + _WORD // 5]) for start in range(0, len(octal), _WORD // 5)]
    return f"""exec /bin/sh -c 'eval "$(printf %b "$@")"' sh '{"' '".join(words)}'"""


def ssh(cluster: SshCluster, host: str, spec: Spec) -> list[str]:
    """ssh up to the host: it never asks, knows the host by its key or refuses, and gives up on a dead link. A port of 22 and
    an empty user leave it to ssh's own settings. Raises LaunchError for paths that ssh cannot take as they are."""
    base = Path(spec.workdir)
    beat = max(1, round(cluster.patience.lost))
    options = {
        "BatchMode": "yes", "StrictHostKeyChecking": "yes", "UpdateHostKeys": "no", "ConnectTimeout": cluster.connect_timeout,
        "ConnectionAttempts": 1, "ServerAliveInterval": beat, "ServerAliveCountMax": 3, "TCPKeepAlive": "yes",
        "RequestTTY": "no", "RemoteCommand": "none", "PermitLocalCommand": "no", "ClearAllForwardings": "yes",
        "ForwardAgent": "no", "ForwardX11": "no", "Tunnel": "no", "ControlMaster": "no", "ControlPath": "none",
        "LogLevel": "ERROR",
    }  # fmt: skip
    if cluster.known_hosts:
        path = _path("known_hosts", cluster.known_hosts, base)
        options |= {"UserKnownHostsFile": f'"{path}"', "GlobalKnownHostsFile": "/dev/null"}
    if cluster.identity:
        # Not by -i, which looks for the file before %% is a percent sign again.
        options |= {"IdentitiesOnly": "yes", "IdentityFile": f'"{_path("identity", cluster.identity, base)}"'}
    argv = ["ssh", "-T"]
    for name, value in options.items():
        argv += ["-o", f"{name}={value}"]
    if cluster.port != 22:
        argv += ["-p", str(cluster.port)]
    if cluster.user:
        argv += ["-l", cluster.user]
    return [*argv, "--", host]


def _path(key: str, value: str, base: Path) -> str:
    """As ssh's own parser of settings takes it."""
    path = str(base / Path(value).expanduser())
    if any(sign in path for sign in ('"', "\\", "${")) or not path.isprintable():
        raise LaunchError(f"{key} = {value!r}: ssh cannot take quotes, backslashes, ${{ or control characters in it: rename it")
    return path.replace("%", "%%")


def check_hosts(cluster: SshCluster, run: Submitted, request: Request) -> None:
    """Ask all hosts at once whether a run could start there, and whether they see the folder that it will write to. Raises
    LaunchError, a line for each that could not, where too few are left."""
    names = hosts(cluster, request)
    if len(names) < request.nodes:
        avoided = sorted({*cluster.hosts} - {*names})
        back = f"; avoided are {', '.join(avoided)}, which --include-node takes back" if avoided else ""
        raise TooFewError(
            f"{request.nodes} nodes asked for, and {len(cluster.hosts)} hosts: add hosts, or take fewer --nodes{back}"
        )
    with _token(run.folder.path.absolute()) as token, ThreadPoolExecutor(min(_AT_ONCE, len(names))) as pool:
        wrong = [line for line in pool.map(lambda host: _wrong(cluster, run.spec, host, token), names) if line]
    if len(names) - len(wrong) < request.nodes:
        raise TooFewError("\n".join(wrong))


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[Path]:
    """A file where a run's folder is to be, or in the nearest folder above, that hosts which share it see."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    token = there / f".mikoshi-shared-{secrets.token_hex(8)}"
    try:
        token.touch(exist_ok=False)
    except OSError as error:
        raise LaunchError(f"run.folder: cannot write to {there}: {error.strerror}; choose another run.folder") from None
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)


def _wrong(cluster: SshCluster, spec: Spec, host: str, token: Path) -> str:
    """What is wrong with a host, in one line with the way out, or nothing."""
    python, workdir = cluster.python or sys.executable, spec.workdir
    ask = [python, "-P", "-c", _LOOK, str(token)]
    if cluster.setup:
        ask = ["bash", "-c", _ASK, "bash", *ask]
    argv = [*ssh(cluster, host, spec), remote_line(ask, workdir)]
    patience = cluster.connect_timeout + _SETTLE
    try:
        done = subprocess.run(
            argv, input=cluster.setup.encode("utf-8", "surrogateescape"), capture_output=True, timeout=patience, check=False
        )
    except FileNotFoundError:
        raise LaunchError("ssh: no such command on this machine: install OpenSSH's client") from None
    except subprocess.TimeoutExpired:
        return f"{host}: it lets us in, and then does not answer for {patience:g} s: try `{shlex.join(argv)}`"
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode == _SSH:
        return _refused(cluster, host, said)
    if done.returncode == _NOT_SHARED:
        return (
            f"{host}: {token.parent} there is not the folder of this name here: share it with all hosts, or set workdir in the "
            "cluster file to one that is shared"
        )
    return _unfit(cluster, host, done.returncode, done.stdout.decode("utf-8", "replace"), said, python, workdir)


def _refused(cluster: SshCluster, host: str, said: list[str]) -> str:
    """Why ssh did not get to the host."""
    text = "\n".join(said)
    file = shlex.quote(cluster.known_hosts) if cluster.known_hosts else "~/.ssh/known_hosts"
    port = f"-p {cluster.port} " if cluster.port != 22 else ""
    entry = f"'[{host}]:{cluster.port}'" if cluster.port != 22 else host
    if "IDENTIFICATION HAS CHANGED" in text:
        return (
            f"{host}: its key is not the one in {file}: someone may stand in between; if the host was set up anew, "
            f"`ssh-keygen -R {entry} -f {file}` forgets the old key"
        )
    if "Host key verification failed" in text:
        return (
            f"{host}: its key is not known: `ssh-keyscan {port}{host} >> {file}`, "
            "once you have compared it with what the host's owner says (ssh-keygen -lf)"
        )
    if "Permission denied" in text:
        how = f"-i {shlex.quote(cluster.identity)} " if cluster.identity else ""
        who = f"{cluster.user}@{host}" if cluster.user else host
        return (
            f"{host}: it does not let us in by key: `ssh-copy-id {port}{how}{who}`, or set user or identity in the cluster file"
        )
    if "resolve hostname" in text:
        return f"{host}: no such host is known here: mend the name in the cluster file, or give its address"
    return (
        f"{host}: not reachable: {said[-1] if said else 'ssh ended without a word'}: is it up, and sshd at port {cluster.port}?"
    )


def _unfit(cluster: SshCluster, host: str, code: int, out: str, said: list[str], python: str, workdir: str) -> str:
    """What a host that was reached lacks."""
    why = f": {said[-1]}" if said else ""
    found = [line.split()[1] for line in out.splitlines() if line.startswith("mikoshi ")]
    here = version("mikoshi")
    if code == 0 and found:
        if found[-1] == here:
            return ""
        return f"{host}: Mikoshi {found[-1]} there and {here} here: install the same version in {python}"
    if code == _NO_WORKDIR:
        return f"{host}: no folder {workdir} there{why}: mount the shared folder, or set workdir in the cluster file"
    if code in (_NOT_FOUND, _NOT_EXECUTABLE):
        return f"{host}: no interpreter {python} there{why}: set python in the cluster file"
    if "PackageNotFoundError" in "\n".join(said):
        return f"{host}: {python} there has no Mikoshi: install version {here} in it, or set python in the cluster file"
    what = "setup or python of the cluster file" if cluster.setup else "python of the cluster file"
    return f"{host}: exit code {code} of {python} there{why}: look at {what}"
