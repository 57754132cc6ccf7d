"""Runs exactly the intended command on a remote host, whatever its login shell and whatever a path contains.

ssh joins its arguments and has the account's shell parse them. So there is one argument, which sh, bash, zsh, csh and fish
all read alike. The user's ssh settings cannot add a terminal, an agent, a forwarding or a shared connection.
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
from mikoshi.launch.runs.record import Attempt, Request, Result, Spec, SubmittedRun
from mikoshi.trainer.errors import LaunchError, TooFewError

_LOGIN_FROM_STDIN = "mikoshi_lines=$(cat); " + LOGIN.replace('. "$0"', 'eval "$mikoshi_lines"')
_PROBE = """\
import importlib.metadata as m, os, sys, time
print('mikoshi', m.version('mikoshi'))
token, until = sys.argv[1], time.monotonic() + 5
folder = os.path.dirname(token)
while not os.path.exists(token) and os.path.isdir(folder) and os.listdir(folder) and time.monotonic() < until: time.sleep(0.2)
if not os.path.exists(token): sys.exit(98)
"""
"""Prints the version, and checks that a new file of the submitting machine is visible; NFS may take a moment."""

_NO_WORKDIR, _NOT_SHARED, _NOT_FOUND, _NOT_EXECUTABLE, _SSH = 97, 98, 127, 126, 255
_PROBE_TIME = 60.0
_PARALLEL = 64
_MAX_WORD = 1000  # characters of one argument that every shell accepts


@dataclass(frozen=True)
class SshSite:
    """The hosts of a cluster file, which the head reaches by ssh."""

    cluster: SshCluster
    run: SubmittedRun
    attempt: Attempt

    def nodes(self) -> list[str]:
        """The hosts without those to avoid, in order. Those beyond the requested number are spares."""
        return hosts(self.cluster, self.attempt.request)

    def command(self, node: str) -> list[str]:
        """ssh to the host, and there agent.node, in the run's workdir and after the setup lines."""
        return node_command(self.cluster, self.run, node)

    def after(self, run: SubmittedRun, attempt: Attempt, result: Result) -> Result:
        """Return the result unchanged, since there is no queue."""
        return result


def hosts(cluster: SshCluster, request: Request) -> list[str]:
    """The hosts that a request may use, in the cluster file's order."""
    return [host for host in cluster.hosts if host not in request.avoided]


def node_command(cluster: SshCluster, run: SubmittedRun, host: str) -> list[str]:
    """The local command that runs agent.node on a host."""
    argv = [cluster.python or sys.executable, "-P", "-m", "mikoshi.launch.agent.node"]
    if cluster.setup:
        argv = ["bash", "-c", LOGIN, str(setup_file(run)), *argv]
    return [*ssh(cluster, host, run.spec), remote_line(argv, run.spec.workdir)]


def remote_line(argv: list[str], workdir: str) -> str:
    """A line for any login shell that runs exactly this command in that folder.

    Single quotes mean the same in all shells, but for three characters: backslash in fish, and ! and line breaks in csh,
    which also limits the length of a word. Where these matter, the line is sent as octal numbers, which /bin/sh decodes.
    """
    script = f"cd -- {shlex.quote(workdir)} || exit {_NO_WORKDIR}; exec {shlex.join(argv)}"
    if script.isascii() and script.isprintable() and not set(script) & set("\\!") and len(script) < _MAX_WORD:
        return f"exec /bin/sh -c {shlex.quote(script)}"
    octal = [f"\\0{byte:03o}" for byte in script.encode("utf-8", "surrogateescape")]
    chunks = ["".join(octal[start : start + _MAX_WORD // 5]) for start in range(0, len(octal), _MAX_WORD // 5)]
    return f"""exec /bin/sh -c 'eval "$(printf %b "$@")"' sh '{"' '".join(chunks)}'"""


def ssh(cluster: SshCluster, host: str, spec: Spec) -> list[str]:
    """The ssh command up to the host. It never prompts, accepts only known host keys, and detects a dead link.

    A port of 22 and an empty user leave both to ssh's own settings. Raises LaunchError for paths that ssh cannot take.
    """
    base = Path(spec.workdir)
    alive_interval = max(1, round(cluster.patience.lost))
    options = {
        "BatchMode": "yes", "StrictHostKeyChecking": "yes", "UpdateHostKeys": "no", "ConnectTimeout": cluster.connect_timeout,
        "ConnectionAttempts": 1, "ServerAliveInterval": alive_interval, "ServerAliveCountMax": 3, "TCPKeepAlive": "yes",
        "RequestTTY": "no", "RemoteCommand": "none", "PermitLocalCommand": "no", "ClearAllForwardings": "yes",
        "ForwardAgent": "no", "ForwardX11": "no", "Tunnel": "no", "ControlMaster": "no", "ControlPath": "none",
        "LogLevel": "ERROR",
    }  # fmt: skip
    if cluster.known_hosts:
        path = _path("known_hosts", cluster.known_hosts, base)
        options |= {"UserKnownHostsFile": f'"{path}"', "GlobalKnownHostsFile": "/dev/null"}
    if cluster.identity:
        # Not by -i, which opens the file before %% is unescaped.
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
    """A path as ssh's config parser takes it."""
    path = str(base / Path(value).expanduser())
    if any(sign in path for sign in ('"', "\\", "${")) or not path.isprintable():
        raise LaunchError(f"{key} = {value!r}: ssh cannot take quotes, backslashes, ${{ or control characters in it: rename it")
    return path.replace("%", "%%")


def check_hosts(cluster: SshCluster, run: SubmittedRun, request: Request) -> None:
    """Check all hosts at once: the run could start there, and they see the run folder.

    Raises LaunchError, a line for each bad host, if too few are left.
    """
    names = hosts(cluster, request)
    if len(names) < request.nodes:
        avoided = sorted({*cluster.hosts} - {*names})
        back = f"; avoided are {', '.join(avoided)}, which --include-node takes back" if avoided else ""
        raise TooFewError(
            f"{request.nodes} nodes asked for, and {len(cluster.hosts)} hosts: add hosts, or take fewer --nodes{back}"
        )
    with _shared_token(run.folder.path.absolute()) as token, ThreadPoolExecutor(min(_PARALLEL, len(names))) as pool:
        wrong = [line for line in pool.map(lambda host: _host_problem(cluster, run.spec, host, token), names) if line]
    if len(names) - len(wrong) < request.nodes:
        raise TooFewError("\n".join(wrong))


@contextlib.contextmanager
def _shared_token(folder: Path) -> Iterator[Path]:
    """A file in the run folder, or in the nearest existing parent, that hosts which share the folder see."""
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


def _host_problem(cluster: SshCluster, spec: Spec, host: str, token: Path) -> str:
    """What is wrong with a host, with what to do, in one line; or ""."""
    python, workdir = cluster.python or sys.executable, spec.workdir
    probe = [python, "-P", "-c", _PROBE, str(token)]
    if cluster.setup:
        probe = ["bash", "-c", _LOGIN_FROM_STDIN, "bash", *probe]
    argv = [*ssh(cluster, host, spec), remote_line(probe, workdir)]
    patience = cluster.connect_timeout + _PROBE_TIME
    try:
        done = subprocess.run(
            argv, input=cluster.setup.encode("utf-8", "surrogateescape"), capture_output=True, timeout=patience, check=False
        )
    except FileNotFoundError:
        raise LaunchError("ssh: no such command on this machine: install OpenSSH's client") from None
    except subprocess.TimeoutExpired:
        return f"{host}: it lets us in, and then does not answer for {patience:g} s: try `{shlex.join(argv)}`"
    errors = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode == _SSH:
        return _connection_problem(cluster, host, errors)
    if done.returncode == _NOT_SHARED:
        return (
            f"{host}: {token.parent} there is not the folder of this name here: share it with all hosts, or set workdir in the "
            "cluster file to one that is shared"
        )
    return _environment_problem(cluster, host, done.returncode, done.stdout.decode("utf-8", "replace"), errors, python, workdir)


def _connection_problem(cluster: SshCluster, host: str, errors: list[str]) -> str:
    """Why ssh did not reach the host."""
    text = "\n".join(errors)
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
    last = errors[-1] if errors else "ssh ended without a word"
    return f"{host}: not reachable: {last}: is it up, and sshd at port {cluster.port}?"


def _environment_problem(
    cluster: SshCluster, host: str, code: int, out: str, errors: list[str], python: str, workdir: str
) -> str:
    """What a reachable host lacks; or ""."""
    why = f": {errors[-1]}" if errors else ""
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
    if "PackageNotFoundError" in "\n".join(errors):
        return f"{host}: {python} there has no Mikoshi: install version {here} in it, or set python in the cluster file"
    what = "setup or python of the cluster file" if cluster.setup else "python of the cluster file"
    return f"{host}: exit code {code} of {python} there{why}: look at {what}"
