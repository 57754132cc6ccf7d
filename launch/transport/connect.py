"""Connects the head to node agents over TCP where there is neither ssh nor srun. Only a holder of the token is connected.

    python -P -m mikoshi.launch.transport.connect serve   --port PORT --token-file FILE [-- COMMAND...]
    python -P -m mikoshi.launch.transport.connect connect HOST --port PORT --token-file FILE --wait 300

`serve` runs in the pod of a node. Each authenticated connection gets an agent of its own, with the connection as its
standard input and output. A later connection replaces the one before, whose head is gone. The head starts `connect`, which
relays its own standard input and output. Both ends authenticate by HMAC-SHA256 over fresh nonces, and the token itself is
never sent. Later traffic is not encrypted: that is the task of the cluster's network.
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
"""Ports of nodes: below the ephemeral ports (from 32768) and those of Kubernetes services (from 30000)."""
_GREETING = b"mikoshi dial 1\n"
_NONCE, _PROOF = 32, 32
_HANDSHAKE_TIMEOUT = 5.0  # seconds for a client to authenticate
_MAX_PENDING = 64  # clients that authenticate at a time; the oldest is dropped beyond that
_EXIT_TIMEOUT = 5.0  # seconds for an agent to exit once its head is gone
_DRAIN_TIMEOUT = 30.0  # seconds for the peer to send its last output
_RELAY = 1 << 16


def port_of(run: str) -> int:
    """The port of a run, from its id. Both ends compute the same one, and two runs on one host rarely do."""
    return PORTS[int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "big") % len(PORTS)]


def read_token(path: Path) -> bytes:
    """Read the shared secret. Raises LaunchError if the file is missing, too short, or readable by everyone."""
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
    """Have the kernel detect a dead peer within about half a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --- in the pod ---


@dataclass
class _Server:
    """The state of `serve`.

    command: the command to run as the agent
    authenticated: connections that wait for an agent
    pending: connections that are authenticating
    """

    command: list[str]
    token: bytes
    authenticated: asyncio.Queue[socket.socket]
    agent: subprocess.Popen[bytes] | None = None
    pending: dict[asyncio.Task[None], None] = field(default_factory=dict)
    ending: bool = False


def serve(port: int, token: bytes, command: list[str]) -> int:
    """Listen until SIGTERM, which is passed on to the agent and waited out.

    Returns the exit code of that signal, so that an evicted pod counts as lost, not as done; or FAULT if the port is in
    use, which may be over at the next try. Raises LaunchError for a port that this user may not open.
    """
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
    """Listen on every address, IPv6 and IPv4, as far as the machine has them."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_MAX_PENDING)
    return socket.create_server(("", port), backlog=_MAX_PENDING)


async def _serve(listener: socket.socket, token: bytes, command: list[str]) -> None:
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    server = _Server(command, token, asyncio.Queue())

    def stop() -> None:
        server.ending = True
        end.set()
        if server.agent is not None and server.agent.poll() is None:
            server.agent.send_signal(signal.SIGTERM)

    loop.add_signal_handler(signal.SIGTERM, stop)
    print(f"listening on port {listener.getsockname()[1]}", file=sys.stderr, flush=True)
    listener.setblocking(False)
    acceptor, agents = asyncio.create_task(_accept(listener, server)), asyncio.create_task(_serve_agents(server))
    ended = asyncio.create_task(end.wait())
    try:
        done, _ = await asyncio.wait({acceptor, agents, ended}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        acceptor.cancel()
        while server.agent is not None and not agents.done():
            await asyncio.sleep(0.05)
    finally:
        for task in (acceptor, agents, ended, *server.pending):
            task.cancel()
        _kill(server.agent)


async def _accept(listener: socket.socket, server: _Server) -> None:
    """Accept connections and authenticate them concurrently, so that a stalled one does not delay the others."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            client, _ = await loop.sock_accept(listener)
        except OSError:  # out of file descriptors, or the client is gone
            await asyncio.sleep(0.1)
            continue
        if len(server.pending) >= _MAX_PENDING:
            next(iter(server.pending)).cancel()
        task = asyncio.create_task(_authenticate(client, server))
        server.pending[task] = None
        task.add_done_callback(lambda ended: server.pending.pop(ended, None))


async def _authenticate(client: socket.socket, server: _Server) -> None:
    """Queue a client that holds the token; close any other."""
    loop, accepted = asyncio.get_running_loop(), False
    try:
        client.setblocking(False)
        _keep_alive(client)
        async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
            nonce = secrets.token_bytes(_NONCE)
            await loop.sock_sendall(client, _GREETING + nonce)
            answer = b""
            while len(answer) < _NONCE + _PROOF:
                piece = await loop.sock_recv(client, _NONCE + _PROOF - len(answer))
                if not piece:
                    return
                answer += piece
            peer_nonce, proof = answer[:_NONCE], answer[_NONCE:]
            if not hmac.compare_digest(proof, _proof(server.token, b"head", nonce, peer_nonce)):
                print("a connection without the run's token was refused", file=sys.stderr, flush=True)
                return
            await loop.sock_sendall(client, _proof(server.token, b"node", nonce, peer_nonce))
        server.authenticated.put_nowait(client)
        accepted = True
    except (OSError, TimeoutError):
        return
    finally:
        if not accepted:
            client.close()


async def _serve_agents(server: _Server) -> None:
    """Run one agent after another, one for each connection."""
    next_connection: socket.socket | None = None
    while True:
        connection = next_connection or await server.authenticated.get()
        next_connection = None
        with connection:
            if server.ending:
                continue
            connection.setblocking(True)  # the agent inherits this setting
            pipe = connection.fileno()
            server.agent = subprocess.Popen(
                server.command, stdin=pipe, stdout=pipe, start_new_session=True, preexec_fn=die_with_parent
            )
            next_connection = await _wait_for_agent(server.agent, connection, server)
            _kill(server.agent)
            server.agent = None
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


async def _wait_for_agent(agent: subprocess.Popen[bytes], connection: socket.socket, server: _Server) -> socket.socket | None:
    """Wait until the agent or its connection has ended. Returns the client that replaces it, if there is one."""
    poller, gone = select.poll(), float("inf")
    poller.register(connection, select.POLLRDHUP)
    while agent.poll() is None and time.monotonic() < gone + _EXIT_TIMEOUT:
        if not server.authenticated.empty():
            return server.authenticated.get_nowait()
        if gone == float("inf") and poller.poll(0):
            gone = time.monotonic()
        await asyncio.sleep(0.05)
    return None


def _kill(agent: subprocess.Popen[bytes] | None) -> None:
    """Kill an agent and its whole session."""
    if agent is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()


# --- at the head ---


def connect(host: str, port: int, token: bytes, wait: float) -> int:
    """Connect to a node, with retries for `wait` seconds, and relay until the agent ends.

    Returns 0 if the head closed the connection, 1 if the node did. Raises LaunchError if the node cannot be reached or does
    not hold the token.
    """
    connection = _connect(host, port, token, time.monotonic() + wait)
    closed = threading.Event()
    threading.Thread(target=_relay_stdin, args=(connection, closed), daemon=True).start()
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


def _relay_stdin(connection: socket.socket, closed: threading.Event) -> None:
    """Relay standard input to the node. At its end, the node has a while to send its last output."""
    with contextlib.suppress(OSError):
        while data := os.read(sys.stdin.fileno(), _RELAY):
            connection.sendall(data)
        closed.set()
        connection.shutdown(socket.SHUT_WR)
    time.sleep(_DRAIN_TIMEOUT)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _connect(host: str, port: int, token: bytes, deadline: float) -> socket.socket:
    """Connect and authenticate. A node that hangs up may just be ending, with a successor to come."""
    refused = 0
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_HANDSHAKE_TIMEOUT)
        except OSError as error:
            why = error.strerror or str(error)
        else:
            try:
                if _handshake(connection, host, port, token):
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


def _handshake(connection: socket.socket, host: str, port: int, token: bytes) -> bool:
    """Authenticate both ends. Returns False if the node hung up; raises LaunchError if it has another token."""
    _keep_alive(connection)
    until = time.monotonic() + _HANDSHAKE_TIMEOUT
    hello = _receive(connection, len(_GREETING) + _NONCE, until)
    if len(hello) < len(_GREETING) + _NONCE:
        return False
    if not hello.startswith(_GREETING):
        raise LaunchError(f"{host}: something else answers at port {port}: end it there, or leave that node out")
    peer_nonce, own_nonce = hello[len(_GREETING) :], secrets.token_bytes(_NONCE)
    connection.sendall(own_nonce + _proof(token, b"head", peer_nonce, own_nonce))
    proof = _receive(connection, _PROOF, until)
    if len(proof) < _PROOF:
        return False
    if not hmac.compare_digest(proof, _proof(token, b"node", peer_nonce, own_nonce)):
        raise LaunchError(f"{host}: it does not hold this run's token: something else answers at that port")
    connection.settimeout(None)
    return True


def _receive(connection: socket.socket, size: int, until: float) -> bytes:
    """Receive `size` bytes, or fewer if the peer closes. Raises TimeoutError at the monotonic time `until`."""
    data = b""
    while len(data) < size:
        connection.settimeout(max(0.01, until - time.monotonic()))
        piece = connection.recv(size - len(data))
        if not piece:
            break
        data += piece
    return data


def main(arguments: list[str]) -> int:
    """Run the command line of either end, and return its exit code."""
    parser = argparse.ArgumentParser(prog="mikoshi.launch.transport.connect", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    serving, connecting = verbs.add_parser("serve"), verbs.add_parser("connect")
    connecting.add_argument("host")
    for verb in (serving, connecting):
        verb.add_argument("--port", type=int, required=True)
        verb.add_argument("--token-file", type=Path, required=True)
    serving.add_argument("command", nargs="*")
    connecting.add_argument("--wait", type=float, default=0.0)
    options = parser.parse_args(arguments)
    open_streams(unread=True)
    try:
        token = read_token(options.token_file)
        if options.verb == "serve":
            return serve(options.port, token, options.command or [sys.executable, "-P", "-m", "mikoshi.launch.agent.node"])
        return connect(options.host, options.port, token, options.wait)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
