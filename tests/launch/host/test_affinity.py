"""Which cores a rank gets, on machines as their /sys tells of them."""

import os
import subprocess
import sys

import pytest

from mikoshi.launch.host.affinity import assign_cores, cores_for_rank, parse_cores


def machine(root, nodes, threads=2, gpus=()):
    """A fake /sys: `nodes` NUMA nodes of 4 physical cores, hyperthreads numbered after all cores, as Linux does."""
    cores = nodes * 4
    for core in range(cores * threads):
        topology = root / "devices/system/cpu" / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        siblings = ",".join(str(core % cores + cores * t) for t in range(threads))
        (topology / "thread_siblings_list").write_text(siblings + "\n")
        (topology / "physical_package_id").write_text(f"{core % cores // 4}\n")
    for node in range(nodes):
        folder = root / "devices/system/node" / f"node{node}"
        folder.mkdir(parents=True)
        parts = [f"{node * 4 + cores * t}-{node * 4 + 3 + cores * t}" for t in range(threads)]
        (folder / "cpulist").write_text(",".join(parts) + "\n")
    buses = []
    for number, node in enumerate(gpus):
        bus = f"0000:{number:02x}:00.0"
        (root / "bus/pci/devices" / bus).mkdir(parents=True)
        (root / "bus/pci/devices" / bus / "numa_node").write_text(f"{node}\n")
        buses.append(bus)
    return set(range(cores * threads)), buses


def every(size, allowed, buses, root):
    return [assign_cores(rank, size, allowed, buses, root) for rank in range(size)]


def test_a_rank_gets_cores_of_the_numa_node_its_gpu_hangs_on(tmp_path):
    allowed, buses = machine(tmp_path, nodes=2, gpus=[1, 1, 0, 0])
    shares = every(4, allowed, buses, tmp_path)
    assert shares[0] | shares[1] == {4, 5, 6, 7, 12, 13, 14, 15}
    assert shares[2] | shares[3] == {0, 1, 2, 3, 8, 9, 10, 11}


@pytest.mark.parametrize("gpus", [[], [0, 0, 1, 1], [-1, -1, -1, -1], [0, 1, -1, 0]])
def test_no_core_is_shared_none_is_left_over_and_siblings_stay_together(tmp_path, gpus):
    allowed, buses = machine(tmp_path, nodes=2, gpus=gpus)
    shares = every(4, allowed, buses, tmp_path)
    assert sum(map(len, shares)) == len(allowed) and set().union(*shares) == allowed
    assert all({(core + 8) % 16 for core in mine} == mine for mine in shares)


def test_only_cores_that_the_process_may_use_are_shared_out(tmp_path):
    _, buses = machine(tmp_path, nodes=2, gpus=[0, 1])
    assert every(2, {0, 1, 2, 5}, buses, tmp_path) == [{0, 1, 2}, {5}]
    assert set().union(*every(2, {0, 1, 2, 3}, buses, tmp_path)) == {0, 1, 2, 3}  # none beside the second GPU: evenly


def test_nothing_is_bound_with_fewer_cores_than_ranks_or_one_rank(tmp_path):
    allowed, buses = machine(tmp_path, nodes=1, gpus=[0])
    assert every(9, allowed, [], tmp_path) == [allowed] * 9
    assert assign_cores(0, 1, allowed, buses, tmp_path) == allowed


def test_hyperthreads_are_parted_only_where_cores_are_too_few(tmp_path):
    allowed, _ = machine(tmp_path, nodes=1)
    shares = every(8, allowed, [], tmp_path)
    assert sorted(map(len, shares)) == [1] * 8 and set().union(*shares) == allowed


def test_a_machine_that_tells_nothing_is_split_evenly(tmp_path):
    assert every(2, {3, 4, 5, 6}, ["0000:01:00.0", "0000:02:00.0"], tmp_path) == [{3, 4}, {5, 6}]


def test_linux_lists_of_cores():
    assert parse_cores("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    assert parse_cores("") == parse_cores("x-y") == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_the_kernel_accepts_what_this_machine_is_split_into():
    code = (
        "import os, sys\n"
        "from mikoshi.launch.host.affinity import cores_for_rank\n"
        "os.sched_setaffinity(0, cores_for_rank(int(sys.argv[1]), 2))\n"
    )
    code += "print(sorted(os.sched_getaffinity(0)))"
    said = [subprocess.run([sys.executable, "-c", code, r], capture_output=True, text=True, check=True) for r in "01"]
    first, second = ({int(core) for core in one.stdout.strip("[]\n").split(",")} for one in said)
    assert first and second and not first & second
    assert first | second == os.sched_getaffinity(0) == cores_for_rank(0, 2) | cores_for_rank(1, 2)
