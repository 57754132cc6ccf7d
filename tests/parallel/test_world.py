"""A launcher's variables are read as it means them; a group of CPU tensors does not write to freed memory."""

import os
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mikoshi.launch.agent.bandwidth import BandwidthPlan, _group
from mikoshi.parallel.errors import LayoutError
from mikoshi.parallel.process import gloo
from mikoshi.parallel.process import process_group as world
from mikoshi.parallel.process.nodelist import expand_nodelist
from mikoshi.parallel.process.process_group import World, join, leave, one_gpu_each, pick_device, rendezvous, world_from


def test_nobody_launched_it():
    assert world_from({}) is None
    assert world_from({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None, "a batch script itself is no task"
    assert world_from({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_torchrun():
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert world_from(env) == World(5, 8, 1, ("a", 7))


def test_one_gpu_a_pod_without_local_ranks():
    assert world_from({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}).local_rank is None


def test_srun():
    env = {
        "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-09,12]",
        "SLURM_JOB_ID": "11", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    place = world_from(env)
    assert (place.rank, place.size, place.local_rank) == (3, 6, 1)
    assert place.master[0] == "gpu07"
    assert world_from({**env, "SLURM_PROCID": "4"}).master == place.master
    assert world_from({**env, "SLURM_STEP_ID": "1"}).master != place.master


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCH = {"RANK": "0", "WORLD_SIZE": "2"}

LISTS = {
    "n1": "n1", "n1,n2": "n1 n2", "n[1-3]": "n1 n2 n3", "gpu[07-09,12],x1": "gpu07 gpu08 gpu09 gpu12 x1", "[1-2]": "1 2",
    "rack[1-2]node[3-4]": "rack1node3 rack1node4 rack2node3 rack2node4", "n[098-101]": "n098 n099 n100 n101",
    "n[00-01,4]ib[1-2],m": "n00ib1 n00ib2 n01ib1 n01ib2 n4ib1 n4ib2 m", "n[1-2][3-4]": "n13 n14 n23 n24",
    "n[9-11],": "n9 n10 n11",
    "n[1-2]x[4],n[7]": "n1x4 n2x4 n7", "n1, n2,,n3": "n1 n2 n3",
}  # fmt: skip


@pytest.mark.parametrize("nodes", LISTS)
def test_slurms_compressed_lists(nodes):
    assert expand_nodelist(nodes) == LISTS[nodes].split()
    place = world_from({**STEP, "SLURM_STEP_NODELIST": nodes})
    assert place.master[0] == LISTS[nodes].split()[0], "rank 0 is on the first node"


@pytest.mark.parametrize(
    ("nodes", "names"), [("a[2,5]-ib", "a2-ib a5-ib"), ("", ""), ("(null)", ""), ("n[1-", "n[1-"), ("n[]", "n[]")]
)
def test_lists_that_not_every_slurm_takes(nodes, names):
    assert expand_nodelist(nodes) == names.split()


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs Slurm's commands")
def test_slurm_reads_its_lists_the_same(tmp_path):
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    env = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    text = ",".join(LISTS)
    told = subprocess.run(["scontrol", "show", "hostnames", text], env=env, capture_output=True, text=True, timeout=60)
    assert told.stdout.split() == expand_nodelist(text), told.stderr


@pytest.mark.parametrize(
    ("env", "place"),
    [
        (OMPI | {"MASTER_ADDR": "a", "MASTER_PORT": "7"}, World(1, 4, 1, ("a", 7))),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, World(1, 4, 1, ("127.0.0.1", 29500))),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_PORT": "7"},
         World(1, 2, 1, ("127.0.0.1", 7))),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "b"}, World(0, 2, None, ("b", 29500))),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0"}, None),
        (OMPI | TORCH, World(0, 2, None, ("127.0.0.1", 29500))),
        # mpirun's daemons are tasks of Slurm, whose variables its ranks inherit.
        (OMPI | {"MASTER_ADDR": "a"} | STEP, World(1, 4, 1, ("a", 29500))),
        # srun --mpi=pmi2: as srun has it.
        ({"PMI_RANK": "3", "PMI_SIZE": "4"} | STEP, World(3, 4, 1, ("n1", 20000))),
        (STEP | {"WORLD_SIZE": "4"}, World(3, 4, 1, ("n1", 20000))),
        ({"WORLD_SIZE": "1"}, None),
    ],
)  # fmt: skip
def test_mpirun(env, place):
    assert world_from(env) == place


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (TORCH | {"RANK": ""}, "RANK is empty"),
        (TORCH | {"WORLD_SIZE": " "}, "WORLD_SIZE is empty"),
        (TORCH | {"RANK": "-1"}, "RANK=-1"),
        (TORCH | {"RANK": "one"}, "RANK=one"),
        (TORCH | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        (TORCH | {"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0"),
        (TORCH | {"RANK": "2"}, "RANK=2 and WORLD_SIZE=2: ranks are numbered from 0 to 1"),
        (TORCH | {"LOCAL_RANK": ""}, "LOCAL_RANK is empty"),
        (TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 and LOCAL_WORLD_SIZE=1"),
        (TORCH | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 and WORLD_SIZE=2"),
        (TORCH | {"MASTER_PORT": "x"}, "MASTER_PORT=x"),
        (TORCH | {"MASTER_PORT": "0"}, "MASTER_PORT=0"),
        (TORCH | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        (TORCH | {"MASTER_ADDR": ""}, "MASTER_ADDR=''"),
        ({"RANK": "1"}, "RANK=1 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set and RANK is not"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1"),
        (OMPI, "pass MASTER_ADDR"),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "pass MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE is not"),
        ({"PMI_RANK": "4", "PMI_SIZE": "4"}, "PMI_RANK=4 and PMI_SIZE=4"),
        (STEP | {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS is empty"),
        (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 and SLURM_STEP_NUM_TASKS=4"),
        (STEP | {"SLURM_PROCID": ""}, "SLURM_PROCID is empty"),
        (STEP | {"SLURM_LOCALID": ""}, "SLURM_LOCALID is empty"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST=''"),
        (STEP | {"SLURM_STEP_NODELIST": "n[1-"}, "SLURM_STEP_NODELIST='n[1-'"),
        (STEP | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID=x"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(env, said):
    with pytest.raises(LayoutError) as told:
        world_from(env)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_task_that_sees_its_own_gpu_alone_uses_it(monkeypatch):
    def device(env, seen):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        return pick_device("auto", world_from(env))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    fourth = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    assert device(STEP | {"SLURM_LOCALID": "3"}, 1) == device(fourth, 1) == torch.device("cuda", 0)
    assert device(STEP | {"SLURM_LOCALID": "3"}, 4) == device(fourth, 4) == torch.device("cuda", 3)
    for env, seen in ((fourth | {"TORCHELASTIC_RUN_ID": "x"}, 1), (fourth, 2)):
        with pytest.raises(LayoutError, match=f"local rank 3 has no GPU: this process sees {seen}"):
            device(env, seen)


@pytest.mark.parametrize(("gpus", "said"), [("abc", None), ("aba", "ranks 0 and 2: both have the GPU a"), ("aaa", "GPU a")])
def test_one_gpu_of_two_ranks_is_refused_by_all(gpus, said):
    store = dist.HashStore()

    def told(rank):
        try:
            one_gpu_each(store, World(rank, 3), gpus[rank], timedelta(seconds=30))
        except LayoutError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(told, range(3)))
    assert found == {None} if said is None else len(found) == 1 and (said in found.pop() or gpus == "aba")


def test_ranks_meet_where_no_agent_keeps_the_store():
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        places = [World(rank, 2, master=("127.0.0.1", port)) for rank in (1, 0)]
        later, first = pool.map(lambda place: rendezvous(place, timedelta(seconds=60)), places)
        first.set("a", "b")
        assert later.get("a") == b"b"


def test_a_port_of_another_program_is_one_line_at_once(monkeypatch):
    monkeypatch.setattr(world, "_ANSWER_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LayoutError, match=f"MASTER_PORT={port}: rank 0 cannot listen there: address already in use"):
            rendezvous(World(0, 2, master=("127.0.0.1", port)), timedelta(minutes=10))
        with pytest.raises(LayoutError, match=f"MASTER_PORT={port}: what answers there is not rank 0"):
            rendezvous(World(1, 2, master=("127.0.0.1", port)), timedelta(seconds=2))
        assert isinstance(rendezvous(World(0, 1, master=("127.0.0.1", port)), timedelta(minutes=10)), dist.HashStore), (
            "needs no port"
        )


def workers(group):
    return group._get_backend(torch.device("cpu")).options._threads


def test_every_gloo_group_has_one_worker(ranks):
    assert ranks.run(groups_made, world=2) == [[1, 1, 1]] * 2


def groups_made():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    return [workers(group) for group in (dist.group.WORLD, dist.new_group([0, 1]), mesh["b"].get_group())]


def test_a_group_made_in_any_way_has_one_worker(ranks):
    assert ranks.run(backends_made, world=1) == [[(1, 1800), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7)]]


def backends_made():
    def options():
        made = dist.ProcessGroupGloo._Options()
        made._timeout, made._devices = timedelta(seconds=6), [dist.ProcessGroupGloo.create_default_device()]
        return made

    def made(*args, **named):
        return dist.ProcessGroupGloo(dist.HashStore(), 0, 1, *args, **named)

    leave()
    join(World(), torch.device("cpu"), timedelta(seconds=5))
    three, four = timedelta(seconds=3), timedelta(seconds=4)
    whole = dist.group.WORLD._get_backend(torch.device("cpu"))
    told = [made(), made(three), made(timeout=four), whole, made(options())]
    found = [(one.options._threads, one.options._timeout.total_seconds()) for one in told]
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=7), dist.group.WORLD)
    return [*found, (whole.options._threads, whole.options._timeout.total_seconds())]


@pytest.mark.parametrize("way", ["a run", "the doctor"])
def test_a_run_and_the_doctor_see_to_it_themselves(ranks, way):
    assert ranks.run(made_anew, way, world=1) == [(2, 1)]


def made_anew(way):
    """Of torch's own group, and of ours."""
    alone, cpu = World(), torch.device("cpu")
    leave()
    dist.ProcessGroupGloo.__init__ = gloo._torchs_own
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    before = workers(dist.group.WORLD)
    leave()
    if way == "a run":
        join(alone, cpu)
        return before, workers(dist.group.WORLD)
    plan = BandwidthPlan(("a",), 1, "cpu", frozenset(), 8, 8, 20.0)
    with _group("a", [0], alone, plan, dist.HashStore(), cpu):
        return before, workers(dist.group.WORLD)


@pytest.mark.parametrize("interfaces", ["lo", "lo,lo"])
def test_a_gloo_group_takes_the_interfaces_that_it_is_given(ranks, interfaces):
    assert ranks.run(summed_over, interfaces, world=2) == [3.0, 3.0]


def summed_over(interfaces):
    x = torch.tensor(dist.get_rank() + 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
        with pytest.raises(RuntimeError):
            dist.new_group([0, 1])
        patch.setenv("GLOO_SOCKET_IFNAME", interfaces)
        dist.all_reduce(x, group=dist.new_group([0, 1]))
    return x.item()


def test_gathers_and_sums_at_once_end_no_rank(ranks):
    assert ranks.run(gathered_and_summed, 1000, world=1) == [(2.0, 1.0)]


def gathered_and_summed(times):
    """Of torch's own groups, two workers end a rank within some hundred of these."""
    ops, name, x = torch.ops._c10d_functional, dist.group.WORLD.group_name, torch.ones(2)
    for _ in range(times):
        asked = [one for _ in range(20) for one in (ops.all_gather_into_tensor(x, 1, name), ops.all_reduce(x, "sum", name))]
        found = [ops.wait_tensor(one) for one in asked]
    return found[-2].sum().item(), found[-1].mean().item()
