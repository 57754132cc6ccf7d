"""The variables that ranks get."""

from types import SimpleNamespace

import pytest

from mikoshi.launch.config.cluster import SlurmCluster
from mikoshi.launch.config.settings import as_records, check_order, settings


def chosen(device="cuda", nodes=2, **keys):
    cluster = SlurmCluster(kind="slurm", **keys)
    return {one.name: one for one in settings(cluster, nodes, 8, "eth0", device, 100)}


def degrees(tp=1, cp=1, ep=1, expert_tp=None):
    return SimpleNamespace(tp=tp, cp=cp, ep=ep, expert_tp=expert_tp)


def test_nccl_gets_exactly_the_interface_and_gloo_its_plain_name():
    found = chosen()
    assert found["NCCL_SOCKET_IFNAME"].value == "=eth0"
    assert found["GLOO_SOCKET_IFNAME"].value == "eth0"


def test_every_setting_says_why():
    for one in as_records(list(chosen(network={"hca": "mlx5_0"}).values())):
        assert set(one) == {"name", "value", "why"} and len(one["why"]) > 20


def test_a_cluster_without_gpus_gets_nothing_of_nccl():
    assert set(chosen("cpu")) == {"GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "RES_OPTIONS"}


def test_threads_are_the_ranks_share_of_the_cores_and_at_least_one():
    assert chosen()["OMP_NUM_THREADS"].value == "12"
    few = settings(SlurmCluster(kind="slurm"), 1, 8, "lo", "cpu", 2)
    assert {one.name: one.value for one in few}["OMP_NUM_THREADS"] == "1"


def test_adapters_are_named_only_when_traffic_leaves_the_node():
    assert chosen(network={"hca": "mlx5_0,mlx5_1"})["NCCL_IB_HCA"].value == "mlx5_0,mlx5_1"
    assert "NCCL_IB_HCA" not in chosen(nodes=1, network={"hca": "mlx5_0"})


def test_the_users_own_variable_wins_and_is_listed_once_as_theirs():
    cluster = SlurmCluster(kind="slurm", env={"NCCL_DEBUG": "INFO", "HF_HUB_OFFLINE": "1"})
    found = settings(cluster, 2, 8, "eth0", "cuda", 64)
    assert [(one.value, one.why) for one in found if one.name == "NCCL_DEBUG"] == [("INFO", "the cluster file's env")]
    assert [one.value for one in found if one.name == "HF_HUB_OFFLINE"] == ["1"]


def test_the_group_of_every_tensor_parallel_rank_lies_in_one_node_where_nothing_is_said():
    from mikoshi.parallel.layout import Layout

    layout, per_node = Layout(shards=4, tp=4, cp=2, zero=2), 8
    assert check_order(layout, per_node, 4) == []
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        mates = [
            r for r in range(layout.world) if (c := layout.coordinates(r)) and (c.cp, c.data, c.pp) == (at.cp, at.data, at.pp)
        ]
        assert {r // per_node for r in mates} == {rank // per_node}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (degrees(tp=16), "parallel.tp = 16: does not fit inside a node of 8 ranks"),
        (degrees(tp=3), "use tp = 2"),
        (degrees(tp=4, cp=4), "parallel.cp = 4: with tp = 4 it spans 16 ranks"),
        (degrees(ep=16), "parallel.ep = 16: it spans 16 ranks"),
        (degrees(tp=4, ep=4), "parallel.ep = 4: it spans 16 ranks"),
    ],
)
def test_what_crosses_nodes_is_said(asked, said):
    lines = check_order(asked, 8, 4)
    assert len(lines) == 1 and said in lines[0]
    assert check_order(asked, 8, 1) == []


def test_experts_that_are_not_cut_by_tensor_parallelism_fit_more_easily():
    assert check_order(degrees(tp=4, ep=8, expert_tp=1), 8, 4) == []
