"""What a node answers. The lines of nvidia-smi and of the kernel's log are written ones: there is no GPU in most tests."""

import json
import os
import resource
import threading
import time

import psutil
import pytest

from mikoshi.launch.host import gpus, probe
from mikoshi.launch.host.probe import answer

SMI = """0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559, 0, 34, 0, 570.124.06
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559, 4100, [N/A], [Not Supported], 570.124.06
"""


def test_a_node_tells_of_itself_in_json(tmp_path):
    told = answer({"ask": "about", "workdir": str(tmp_path)})
    assert json.loads(json.dumps(told)) == told
    assert told["versions"]["torch"] and told["versions"]["mikoshi"]
    assert told["cores"] == len(os.sched_getaffinity(0)) and told["memory"] == psutil.virtual_memory().total
    assert told["limits"]["nofile"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < told["disk"]["workdir"] <= psutil.disk_usage(str(tmp_path)).total
    assert told["network"]["interface"] in psutil.net_if_addrs()


def test_a_folder_that_is_not_there_is_told_so(tmp_path):
    assert answer({"ask": "about", "workdir": str(tmp_path / "absent")})["disk"]["workdir"] is None


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"ask": "reboot"}, "'reboot' is no question"),
        ({}, "None is no question"),
        ({"ask": "about"}, "KeyError"),
        ({"ask": "listen", "interface": "ib9", "seconds": 1}, "network.interface = ib9"),
        ({"ask": "connect", "to": {"a": []}, "patience": "soon"}, "ValueError"),
    ],
)
def test_a_question_that_cannot_be_answered_is_an_error_and_no_crash(question, said):
    assert said in answer(question)["error"]


def test_the_clock_is_this_machines():
    before = time.time()
    assert before <= answer({"ask": "clock"})["time"] <= time.time()


def ask_shared(folder, token="t", patience=0.0):
    return answer({"ask": "shared", "folder": str(folder), "name": "head", "token": token, "patience": patience})


def test_a_shared_folder_is_seen_from_both_sides(tmp_path):
    (tmp_path / "head").write_text("t")
    told = ask_shared(tmp_path)
    assert told["seen"] and told["why"] == "" and told["kind"]
    assert (tmp_path / told["wrote"]).read_text() == told["token"]


def test_a_folder_of_the_same_name_with_other_or_no_contents_is_not_shared(tmp_path):
    assert "what others write in it is not" in ask_shared(tmp_path)["why"]
    (tmp_path / "head").write_text("another")
    assert "other contents" in ask_shared(tmp_path)["why"]
    assert ask_shared(tmp_path / "absent")["why"] == "No such file or directory"


def test_a_file_that_comes_late_is_waited_for(tmp_path):
    late = threading.Timer(0.3, (tmp_path / "head").write_text, ["t"])
    late.start()
    assert ask_shared(tmp_path, patience=10.0)["seen"]
    late.join()


def test_the_innermost_mount_names_the_file_system(tmp_path):
    inside = tmp_path / "my data"
    mounts = "\n".join(
        [
            "22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda rw",
            f"23 22 0:22 / {tmp_path} rw - overlay overlay rw",
            f"24 23 0:23 / {str(inside).replace(' ', chr(92) + '040')} rw - nfs4 server:/data rw",
        ]
    )
    assert [probe.file_system(path, mounts) for path in (inside / "x", tmp_path / "my", tmp_path.parent)] == [
        "nfs4",
        "overlay",
        "ext4",
    ]


def test_a_node_is_reached_by_the_port_it_listens_on():
    at = answer({"ask": "listen", "interface": "", "seconds": 5})
    to = {"me": [at["address"], at["port"], at["hello"]], "someone": [at["address"], at["port"], "f" * 16]}
    reached = answer({"ask": "connect", "to": to, "patience": 2.0})["reached"]
    assert 0 < reached["me"]["ms"] < 2000
    assert "another machine" in reached["someone"]["error"]


def test_a_closed_port_is_told_with_its_address():
    reached = answer({"ask": "connect", "to": {"x": ["127.0.0.1", 1, ""]}, "patience": 2.0})["reached"]
    assert reached["x"]["error"] == "127.0.0.1 port 1: Connection refused"
    assert answer({"ask": "connect", "to": {}, "patience": 1}) == {"reached": {}}


def test_a_listener_ends_by_itself():
    before = threading.active_count()
    at = answer({"ask": "listen", "interface": "", "seconds": 0.2})
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.02)
    assert "error" in answer({"ask": "connect", "to": {"x": list(at.values())}, "patience": 1.0})["reached"]["x"]


def test_infiniband_ports_and_their_states_are_read(tmp_path):
    assert probe.infiniband(tmp_path / "absent") == {}
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert probe.infiniband(tmp_path) == {"mlx5_0/1": "ACTIVE 400 Gb/sec (4X NDR)"}


def test_the_table_of_nvidia_smi_is_read_and_what_a_gpu_cannot_tell_is_none():
    first, second = gpus.parse_gpus(SMI)
    assert first["name"] == "NVIDIA H100 80GB HBM3" and (first["memory_mib"], first["celsius"], first["ecc"]) == (81559, 34, 0)
    assert second["celsius"] is None and second["ecc"] is None and second["used_mib"] == 4100
    assert gpus.parse_gpus("No devices were found\n") == []


def tool(folder, script):
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_tool_that_fails_is_an_error_with_its_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool(tmp_path, "echo 'Unable to determine the device handle for GPU 0000:4E:00.0: Unknown Error'; exit 15")
    assert "Unable to determine the device handle" in gpus.query_gpus()["error"]


def test_processes_are_told_of_the_gpu_they_are_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool(tmp_path, f'case "$1" in *compute*) echo "GPU-bbbb, 4242";; *) printf %s "{SMI}";; esac')
    found = gpus.query_gpus()
    assert [gpu["pids"] for gpu in found["gpus"]] == [[], [4242]] and found["driver"] == "570.124.06"


def test_the_last_fault_in_the_kernels_log_is_told():
    old, new = (
        "[1.0] NVRM: Xid (PCI:0000:4e:00): 31, pid=1",
        "[9.0] NVRM: Xid (PCI:0000:4e:00): 79, GPU has fallen off the bus.",
    )
    log = f"{old}\n[2.0] usb 1-1: new\n{new}\n"
    assert "79, GPU has fallen" in gpus.xid(log) and gpus.xid("all is well") == ""
