"""What the doctor finds on real hosts: nothing where all is well, and by name the one that is ill."""

import json
import sys

import pytest

from hosts import lan, power_off, power_on, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")]

CLUSTER = """
kind = "ssh"
hosts = ["n1", "n2", "n3"]
identity = "{identity}"
known_hosts = "{known}"
connect_timeout = 3
[patience]
start = 60
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with lan(tmp_path_factory.mktemp("lan"), ["login", "n1", "n2", "n3"]) as made:
        yield made


@pytest.fixture
def examined(net, tmp_path):
    """Have the doctor look at all hosts, from `login`: its exit code, and each row's verdict and words."""
    (tmp_path / "cluster.toml").write_text(CLUSTER.format(identity=net.identity, known=net.known_hosts))

    def look(code):
        argv = [sys.executable, "-P", "-m", "mikoshi", "doctor", "--on", "cluster.toml", "--json"]
        done = net["login"].run(*argv, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert not list(tmp_path.glob(".mikoshi*")), "nothing is left"
        return {row["name"]: row for row in json.loads(done.stdout)["checks"]}

    return look


def bad(rows):
    return {name for name, row in rows.items() if row["verdict"] == "bad"}


def test_healthy_hosts_are_green(examined):
    rows = examined(0)
    assert not bad(rows)
    assert rows["nodes up"]["found"] == "3 of 3"
    assert "6 of 6" in rows["ports"]["found"]


def test_a_slow_link_is_named(net, examined):
    shape = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64k", "latency", "50ms"]
    assert net["n3"].run(*shape).returncode == 0
    try:
        rows = examined(1)
    finally:
        net["n3"].run("tc", "qdisc", "del", "dev", "eth0", "root")
    told = [line for name in bad(rows) for line in rows[name]["todo"]]
    assert any("n3" in line for line in told), rows
    assert not any("n1:" in line or "n2:" in line for line in told), told


def test_a_folder_that_is_not_shared_is_named(net, examined, tmp_path):
    assert net["n2"].run("mount", "-t", "tmpfs", "tmpfs", tmp_path).returncode == 0
    try:
        rows = examined(1)
    finally:
        net["n2"].run("umount", tmp_path)
    assert bad(rows) == {"shared folder"}
    assert any("n2" in line for line in rows["shared folder"]["todo"])


def test_a_host_that_is_off_is_named_and_the_others_are_looked_at(net, examined):
    power_off(net, "n1")
    try:
        rows = examined(1)
    finally:
        power_on(net, "n1")
    assert bad(rows) == {"nodes up"}
    assert any("n1" in line for line in rows["nodes up"]["todo"])
    assert "2 of 2" in rows["ports"]["found"]
