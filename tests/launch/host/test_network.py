"""Which interface is taken."""

import socket

import psutil
import pytest

from mikoshi.launch.host.network import Interface, choose_interface, default_routes, interfaces, select_interface
from mikoshi.trainer.errors import LaunchError

LO = Interface("lo", "127.0.0.1", loopback=True)
DOCKER = Interface("docker0", "172.17.0.1", loopback=False)
ETH = Interface("eth0", "10.0.0.5", loopback=False)
IB = Interface("ib0", "10.1.0.5", loopback=False)


def test_the_interface_found_here_is_one_that_a_port_can_be_opened_on():
    name, address = select_interface("")
    assert name in psutil.net_if_addrs()
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
        pass


def test_the_named_interface_is_taken_though_it_is_not_that_of_the_default_route():
    assert choose_interface("ib0", [LO, ETH, IB], ["eth0"]) == ("ib0", "10.1.0.5")
    loopback = next(one for one in interfaces() if one.loopback)
    assert select_interface(loopback.name) == (loopback.name, loopback.address)


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(
        LaunchError, match=r"network\.interface = ib7: .* has no such interface .* it has lo \(127.0.0.1\), ib0"
    ):
        choose_interface("ib7", [LO, IB], [])


def test_without_a_name_the_default_route_wins_then_what_leads_outward_then_loopback():
    assert choose_interface("", [LO, ETH, IB], ["ib0", "eth0"])[0] == "ib0"
    assert choose_interface("", [LO, DOCKER, ETH], [])[0] == "eth0"
    assert choose_interface("", [LO, DOCKER], [])[0] == "lo"
    with pytest.raises(LaunchError, match="no network interface"):
        choose_interface("", [], [])


def test_of_several_default_routes_the_lowest_metric_wins_and_one_that_is_down_or_narrower_is_none(tmp_path):
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT"
    lines = [
        "wlan0 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0",
        "eth0 00000000 0101A8C0 0003 0 0 100 00000000 0 0 0",
        "eth1 00000000 0101A8C0 0002 0 0 1 00000000 0 0 0",
        "eth2 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0",
    ]
    (tmp_path / "route").write_text("\n".join([head, *lines]))
    none, one = "0" * 32, "fe80" + "0" * 27 + "1"
    six = [
        f"{none} 00 {none} 00 {one} 00000400 00000001 00000000 00000003 eth3",
        f"{none} 00 {none} 00 {none} ffffffff 00000001 00000000 00200200 lo",
    ]
    (tmp_path / "ipv6_route").write_text("\n".join(six))
    assert default_routes(tmp_path) == ["eth0", "wlan0", "eth3"]
    assert default_routes(tmp_path / "absent") == []
