"""A node agent reached over TCP where there is neither ssh nor srun: only who holds the token is connected to it.

    python -P -m mikoshi.launch.transport.connect serve   --port PORT --token-file FILE [-- COMMAND...]
    python -P -m mikoshi.launch.transport.connect connect HOST --port PORT --token-file FILE --wait 300

`serve` runs in the pod of a node. Each connection that proves to hold the token gets an agent of its own with the connection
as its standard input and output; a later one replaces the one before, whose head is gone. `connect` is what the head starts:
its own standard input and output, relayed. Both ends prove themselves by HMAC-SHA256 over fresh random numbers, and the
token itself never travels. What travels afterwards is not encrypted: that is for the cluster's network.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from mikoshi.parallel.process.parent_death import die_with_parent
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.exit_codes import DONE, FAULT, USER_ERROR
from mikoshi.trainer.streams import open_streams

PORTS = range(20480, 28672)
"""Where nodes listen: below the ports that kernels hand out (from 32768) and those of Kubernetes' services (from 30000)."""
_GREETING = b"mikoshi dial 1\n"
_NONCE, _PROOF = 32, 32
_SHAKE = 5.0  # seconds that a newcomer has to prove itself
_WAITING = 64  # newcomers at a time; of more, the one that has waited longest is dropped
_ENDING = 5.0  # seconds that an agent has to end by itself once its head is gone
_DRAIN = 30.0  # seconds that the far end has to say its last words
_RELAY = 1 << 16


def port_of(run: str) -> int:
    """The port of a run, from its id: both ends find the same one, and two runs that share a host rarely do."""
    return PORTS[int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "big") % len(PORTS)]


def read_token(path: Path) -> bytes:
    """The secret that both ends hold. Raises LaunchError where it is missing, too short, or open to everyone."""
    try:
        if path.stat().st_mode & 0o007:
            raise LaunchError(f"--token-file {path}: open to every user of this machine: chmod 600 {path}")
        token = path.read_bytes().strip()
    except OSError as error:
        raise LaunchError(f"--token-file {path}: cannot be read: {error.strerror}") from None
    if len(token) < 32:
        raise LaunchError(f"--token-file {path}: {len(token)} bytes: a token has 32 or more")
    return token


def _proof(token: bytes, who: bytes, server: bytes, client: bytes) -> bytes:
    return hmac.digest(token, who + b"\0" + server + client, "sha256")


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel find out within about half a minute that the far end is gone without a word."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --- the end in the pod ---


@dataclass
class _Served:
    """What `serve` has at this moment. command: the agent's, or whatever stands in for it."""

    command: list[str]
    token: bytes
    proven: asyncio.Queue[socket.socket]
    agent: subprocess.Popen[bytes] | None = None
    waiting: dict[asyncio.Task[None], None] = field(default_factory=dict)
    ending: bool = False


def serve(port: int, token: bytes, command: list[str]) -> int:
    """Listen until SIGTERM, which the agent is told of and outlived for; the exit code is then that of the signal, so that a
    pod which is put out counts as lost and not as done. A port that is taken is a fault, which may be over at the next try;
    raises LaunchError for one that this user may not have."""
    try:
        listener = _listener(port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            print(f"error: --port {port}: something else listens there on this host", file=sys.stderr, flush=True)
            return FAULT
        raise LaunchError(f"--port {port}: cannot listen: {error.strerror}") from None
    with listener:
        asyncio.run(_serve(listener, token, command))
    return 128 + signal.SIGTERM


def _listener(port: int) -> socket.socket:
    """On every address, IPv6 and IPv4, as far as the machine has them."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_WAITING)
    return socket.create_server(("", port), backlog=_WAITING)


async def _serve(listener: socket.socket, token: bytes, command: list[str]) -> None:
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    served = _Served(command, token, asyncio.Queue())

    def stop() -> None:
        served.ending = True
        end.set()
        if served.agent is not None and served.agent.poll() is None:
            served.agent.send_signal(signal.SIGTERM)

    loop.add_signal_handler(signal.SIGTERM, stop)
    print(f"listening on port {listener.getsockname()[1]}", file=sys.stderr, flush=True)
    listener.setblocking(False)
    door, agents = asyncio.create_task(_door(listener, served)), asyncio.create_task(_agents(served))
    ended = asyncio.create_task(end.wait())
    try:
        done, _ = await asyncio.wait({door, agents, ended}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        door.cancel()
        while served.agent is not None and not agents.done():
            await asyncio.sleep(0.05)
    finally:
        for task in (door, agents, ended, *served.waiting):
            task.cancel()
        _kill(served.agent)


async def _door(listener: socket.socket, served: _Served) -> None:
    """Let newcomers prove themselves, side by side: one that stalls keeps no other waiting."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            newcomer, _ = await loop.sock_accept(listener)
        except OSError:  # out of descriptors, or gone before it was let in
            await asyncio.sleep(0.1)
            continue
        if len(served.waiting) >= _WAITING:
            next(iter(served.waiting)).cancel()
        task = asyncio.create_task(_admit(newcomer, served))
        served.waiting[task] = None
        task.add_done_callback(lambda ended: served.waiting.pop(ended, None))


async def _admit(newcomer: socket.socket, served: _Served) -> None:
    """Hand a newcomer on if it holds the token, and close it if it does not."""
    loop, kept = asyncio.get_running_loop(), False
    try:
        newcomer.setblocking(False)
        _keep_alive(newcomer)
        async with asyncio.timeout(_SHAKE):
            nonce = secrets.token_bytes(_NONCE)
            await loop.sock_sendall(newcomer, _GREETING + nonce)
            answer = b""
            while len(answer) < _NONCE + _PROOF:
                piece = await loop.sock_recv(newcomer, _NONCE + _PROOF - len(answer))
                if not piece:
                    return
                answer += piece
            theirs, proof = answer[:_NONCE], answer[_NONCE:]
            if not hmac.compare_digest(proof, _proof(served.token, b"head", nonce, theirs)):
                print("a connection without the run's token was refused", file=sys.stderr, flush=True)
                return
            await loop.sock_sendall(newcomer, _proof(served.token, b"node", nonce, theirs))
        served.proven.put_nowait(newcomer)
        kept = True
    except (OSError, TimeoutError):
        return
    finally:
        if not kept:
            newcomer.close()


async def _agents(served: _Served) -> None:
    """One agent after the other, each for one connection."""
    following: socket.socket | None = None
    while True:
        connection = following or await served.proven.get()
        following = None
        with connection:
            if served.ending:
                continue
            connection.setblocking(True)  # the agent shares this setting
            pipe = connection.fileno()
            served.agent = subprocess.Popen(
                served.command, stdin=pipe, stdout=pipe, start_new_session=True, preexec_fn=die_with_parent
            )
            following = await _attend(served.agent, connection, served)
            _kill(served.agent)
            served.agent = None
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


async def _attend(agent: subprocess.Popen[bytes], connection: socket.socket, served: _Served) -> socket.socket | None:
    """Until the agent has ended, by itself or because its connection has; the newcomer that takes its place, if one does."""
    poller, gone = select.poll(), float("inf")
    poller.register(connection, select.POLLRDHUP)
    while agent.poll() is None and time.monotonic() < gone + _ENDING:
        if not served.proven.empty():
            return served.proven.get_nowait()
        if gone == float("inf") and poller.poll(0):
            gone = time.monotonic()
        await asyncio.sleep(0.05)
    return None


def _kill(agent: subprocess.Popen[bytes] | None) -> None:
    """End an agent with all that it started in its session."""
    if agent is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()


# --- the end at the head ---


def connect(host: str, port: int, token: bytes, wait: float) -> int:
    """Reach a node, trying for `wait` seconds while it comes up, and relay until it has said its last word; the exit code:
    0 if the head ended it, 1 if the node did. Raises LaunchError where it cannot be reached, or does not hold the token."""
    connection = _reach(host, port, token, time.monotonic() + wait)
    closed = threading.Event()
    threading.Thread(target=_upwards, args=(connection, closed), daemon=True).start()
    with connection:
        try:
            while data := connection.recv(_RELAY):
                _write(sys.stdout.fileno(), data)
        except BrokenPipeError:
            return FAULT
        except OSError as error:
            print(f"{host}: the connection was lost: {error.strerror or error}", file=sys.stderr, flush=True)
            return DONE if closed.is_set() else FAULT
    if closed.is_set():
        return DONE
    print(f"{host}: the node agent has ended; what it said is in the log of its pod", file=sys.stderr, flush=True)
    return FAULT


def _upwards(connection: socket.socket, closed: threading.Event) -> None:
    """Standard input to the node. At its end the node is told so, and has a while to say its last words."""
    with contextlib.suppress(OSError):
        while data := os.read(sys.stdin.fileno(), _RELAY):
            connection.sendall(data)
        closed.set()
        connection.shutdown(socket.SHUT_WR)
    time.sleep(_DRAIN)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _reach(host: str, port: int, token: bytes, deadline: float) -> socket.socket:
    """A connection to a node that holds the token. One that hangs up may just be ending, with another in its place soon."""
    refused = 0
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_SHAKE)
        except OSError as error:
            why = error.strerror or str(error)
        else:
            try:
                if _shake(connection, host, port, token):
                    return connection
                refused += 1
                why = "it refused the token, or was just ending: is it a pod of another run?"
            except BaseException as error:
                connection.close()
                if not isinstance(error, OSError):
                    raise
                why = error.strerror or str(error)
            connection.close()
        if time.monotonic() > deadline or refused == 3:
            raise LaunchError(f"{host}, port {port}: cannot be reached: {why}; look at its pod, or raise patience.start")
        time.sleep(0.2)


def _shake(connection: socket.socket, host: str, port: int, token: bytes) -> bool:
    """Prove to hold the token, and have the node prove it. False: it hung up. Raises LaunchError for another token."""
    _keep_alive(connection)
    until = time.monotonic() + _SHAKE
    hello = _receive(connection, len(_GREETING) + _NONCE, until)
    if len(hello) < len(_GREETING) + _NONCE:
        return False
    if not hello.startswith(_GREETING):
        raise LaunchError(f"{host}: something else answers at port {port}: end it there, or leave that node out")
    theirs, ours = hello[len(_GREETING) :], secrets.token_bytes(_NONCE)
    connection.sendall(ours + _proof(token, b"head", theirs, ours))
    proof = _receive(connection, _PROOF, until)
    if len(proof) < _PROOF:
        return False
    if not hmac.compare_digest(proof, _proof(token, b"node", theirs, ours)):
        raise LaunchError(f"{host}: it does not hold this run's token: something else answers at that port")
    connection.settimeout(None)
    return True


def _receive(connection: socket.socket, size: int, until: float) -> bytes:
    """So many bytes, fewer if the far end closes. Raises TimeoutError at `until`, however slowly it drips."""
    data = b""
    while len(data) < size:
        connection.settimeout(max(0.01, until - time.monotonic()))
        piece = connection.recv(size - len(data))
        if not piece:
            break
        data += piece
    return data


def main(arguments: list[str]) -> int:
    """The command line of both ends."""
    parser = argparse.ArgumentParser(prog="mikoshi.launch.transport.connect", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    serving, connecting = verbs.add_parser("serve"), verbs.add_parser("connect")
    connecting.add_argument("host")
    for verb in (serving, connecting):
        verb.add_argument("--port", type=int, required=True)
        verb.add_argument("--token-file", type=Path, required=True)
    serving.add_argument("command", nargs="*")
    connecting.add_argument("--wait", type=float, default=0.0)
    given = parser.parse_args(arguments)
    open_streams(unread=True)
    try:
        token = read_token(given.token_file)
        if given.verb == "serve":
            return serve(given.port, token, given.command or [sys.executable, "-P", "-m", "mikoshi.launch.agent.node"])
        return connect(given.host, given.port, token, given.wait)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
