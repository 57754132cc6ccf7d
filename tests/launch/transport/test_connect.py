"""The two ends of a connection to a node agent, as real processes on this machine's loopback."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mikoshi.launch.transport.connect import port_of

ROOT = Path(__file__).parents[3]
DIAL = [sys.executable, "-P", "-m", "mikoshi.launch.transport.connect"]
ECHO = [sys.executable, "-c", "import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"]
WHO = [sys.executable, "-u", "-c", "import os, sys\nprint(os.getpid())\nfor line in sys.stdin: print(line, end='')"]
DEAF = [sys.executable, "-u", "-c", "import os, time\nprint(os.getpid())\ntime.sleep(600)"]


def until(true, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
    return found


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.write_text("secret-" * 8)
    path.chmod(0o600)
    return path


@pytest.fixture
def started():
    """Starts processes, and leaves none of them."""
    processes = []

    def start(argv, **more):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(subprocess.Popen(argv, cwd=ROOT, **{**pipes, **more}))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def serve(started, token):
    def start(command, port=0):
        process = started([*DIAL, "serve", "--port", str(port), "--token-file", str(token), "--", *command])
        said = process.stderr.readline().decode()
        return process, int(re.fullmatch(r"listening on port (\d+)\n", said)[1])

    return start


@pytest.fixture
def connect(started, token):
    def start(port, host="localhost", file=token, wait=10):
        argv = [*DIAL, "connect", host, "--port", str(port), "--token-file", str(file), "--wait", str(wait)]
        return started(argv)

    return start


def test_what_goes_in_at_one_end_comes_out_at_the_other_and_the_end_of_input_ends_both(serve, connect):
    server, port = serve(ECHO)
    line = os.urandom(3 << 20).hex().encode() + b"\n"
    out, err = connect(port).communicate(line, timeout=30)
    assert out == line, (len(out), err)
    assert not psutil.Process(server.pid).children(), "the agent has ended with its connection"
    again = connect(port, host="127.0.0.1")
    assert again.communicate(b"again\n", timeout=30) == (b"again\n", b"")
    assert again.returncode == 0


def test_a_wrong_token_starts_no_agent_and_ends_in_one_line(serve, connect, tmp_path):
    server, port = serve(WHO)
    wrong = tmp_path / "wrong"
    wrong.write_text("another" * 8)
    wrong.chmod(0o600)
    head = connect(port, file=wrong)
    out, err = head.communicate(timeout=30)
    assert (head.returncode, out) == (2, b"")
    assert err.decode().splitlines() == [
        f"error: localhost, port {port}: cannot be reached: it refused the token, or was just ending: is it a pod of another "
        "run?; look at its pod, or raise patience.start"
    ]
    assert not psutil.Process(server.pid).children()


def test_a_node_that_does_not_hold_the_token_is_refused_as_well(connect):
    with socket.create_server(("127.0.0.1", 0)) as fake:
        head = connect(fake.getsockname()[1], host="127.0.0.1")
        there, _ = fake.accept()
        with there:
            there.sendall(b"mikoshi dial 1\n" + b"n" * 32)
            assert len(there.recv(64, socket.MSG_WAITALL)) == 64
            there.sendall(b"p" * 32)
            out, err = head.communicate(timeout=30)
    assert (head.returncode, out) == (2, b"")
    assert b"it does not hold this run's token" in err


def test_one_that_proves_nothing_is_hung_up_on_in_five_seconds_and_keeps_no_one_waiting(serve, connect):
    _, port = serve(ECHO)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(70)]
        began = time.monotonic()
        assert connect(port).communicate(b"through\n", timeout=30)[0] == b"through\n"
        for one in stalled:
            one.settimeout(15)
            with contextlib.suppress(ConnectionResetError):
                while one.recv(4096):
                    pass
        assert time.monotonic() - began < 60, "all at once, not one after the other"


def test_a_head_that_is_killed_leaves_no_agent_behind_even_a_deaf_one(serve, connect):
    for command in (WHO, DEAF):
        server, port = serve(command)
        head = connect(port)
        agent = psutil.Process(int(head.stdout.readline()))
        head.kill()
        until(lambda agent=agent: not agent.is_running())
        assert server.poll() is None, "and the node waits for the next"


def test_a_server_that_is_killed_takes_its_agent_along_and_the_head_learns_it(serve, connect):
    server, port = serve(DEAF)
    head = connect(port)
    agent = psutil.Process(int(head.stdout.readline()))
    server.kill()
    until(lambda: not agent.is_running())
    assert head.wait(15) == 1
    assert b"localhost: the" in head.stderr.read()


def test_an_agent_that_ends_is_told_and_the_next_connection_has_another(serve, connect):
    _, port = serve(WHO)
    first = connect(port)
    pid = int(first.stdout.readline())
    os.kill(pid, signal.SIGKILL)
    assert first.wait(15) == 1
    assert b"the node agent has ended" in first.stderr.read()
    second = connect(port)
    assert int(second.stdout.readline()) != pid


def test_a_later_head_replaces_one_that_is_half_open(serve, connect):
    _, port = serve(WHO)
    lost = connect(port)
    agent = psutil.Process(int(lost.stdout.readline()))
    lost.send_signal(signal.SIGSTOP)  # its end of the connection stays open, as after a cut link
    later = connect(port)
    assert int(later.stdout.readline()) != agent.pid
    assert not agent.is_running()
    out, _ = later.communicate(b"still here\n", timeout=15)
    assert out == b"still here\n"


def test_sigterm_is_the_agents_to_answer_and_no_success(serve, connect):
    saving = "import signal, sys\nsignal.signal(15, lambda *_: (print('saved'), sys.exit()))\nprint('up')\nsys.stdin.read()"
    server, port = serve([sys.executable, "-u", "-c", saving])
    head = connect(port)
    assert head.stdout.readline() == b"up\n"
    server.terminate()
    assert head.stdout.read() == b"saved\n"
    assert server.wait(15) == 143
    idle, _ = serve(WHO)
    idle.terminate()
    assert idle.wait(15) == 143, "a pod that is put out while it waits has not done its part"


def test_a_node_is_waited_for_until_it_is_up_and_no_longer_than_asked(serve, connect):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    early, late = connect(port), connect(port, wait=1)
    assert late.wait(15) == 2
    assert b"cannot be reached" in late.stderr.read()
    serve(ECHO, port)
    assert early.communicate(b"now\n", timeout=15)[0] == b"now\n"


def test_a_port_that_is_taken_is_a_fault_to_try_again_after_and_no_mistake(started, token):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        process = started([*DIAL, "serve", "--port", str(port), "--token-file", str(token), "--", *ECHO])
        _, err = process.communicate(timeout=15)
    assert process.returncode == 1, "2 would end the JobSet for good"
    assert err.decode() == f"error: --port {port}: something else listens there on this host\n"


def test_runs_have_ports_of_their_own_that_nothing_else_is_given():
    ids = [f"{number:032x}" for number in range(2000)]
    ports = [port_of(one) for one in ids]
    assert ports == [port_of(one) for one in ids], "both ends find the same"
    assert min(ports) > 1024 and max(ports) < 30000, "not privileged, of no service and not the kernel's to hand out"
    assert len(set(ports)) > 1700, "two runs rarely share one"


@pytest.mark.parametrize(
    "mode, text, told", [(0o604, "x" * 40, "open to every user"), (0o600, "short", "5 bytes"), (0, None, "No such")]
)
def test_a_token_that_is_none_is_refused_in_one_line(tmp_path, started, mode, text, told):
    path = tmp_path / "token"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    process = started([*DIAL, "serve", "--port", "0", "--token-file", str(path)])
    _, err = process.communicate(timeout=15)
    assert process.returncode == 2
    assert told in err.decode() and err.count(b"\n") == 1
