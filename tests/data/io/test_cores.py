"""Threads are counted by what may run: affinity, and the quota of the nearest, or of any further, control group."""

import pytest

from mikoshi.data.io.cores import cores


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V1 = "4:memory:/pod/box\n3:cpu,cpuacct:/pod/box"
CASES = {
    "none": ({}, 8),
    "v2, no limit": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
    "v2, at the root of a container": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
    "v2, nested, the tighter one is further up": (
        {
            "proc/self/cgroup": "0::/pod/box",
            "sys/fs/cgroup/pod/cpu.max": "200000 100000",
            "sys/fs/cgroup/pod/box/cpu.max": "600000 100000",
        },
        2,
    ),
    "v2, the host's path": ({"proc/self/cgroup": "0::/../../pod", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
    "v2, parts of a core": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
    "v2, less than a core": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    "v2, more than the affinity": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "6400000 100000"}, 8),
    "v2, garbage": ({"proc/self/cgroup": "0::/\n::\nx", "sys/fs/cgroup/cpu.max": "a b c"}, 8),
    "v1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs_quota_us": "500000",
            "sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs_period_us": "100000",
        },
        5,
    ),
    "v1, nested": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "50000",
            "sys/fs/cgroup/cpu/pod/box/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/pod/box/cpu.cfs_period_us": "100000",
        },
        3,
    ),
    "v1 beside v2": (
        {
            "proc/self/cgroup": f"{V1}\n0::/pod",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "700000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        7,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cores(tmp_path, case):
    files, right = CASES[case]
    assert cores(tree(tmp_path, files), affinity=8) == right


def test_cores_of_this_process():
    import os

    assert 1 <= cores() <= len(os.sched_getaffinity(0))
