"""A launcher's variables are read as it means them; a group of CPU tensors does not write to freed memory."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from launch.bandwidth import Plan, _group
from parallel import gloo
from parallel.world import World, first_host, join, leave, world_from


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


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("n[1-3]", "n1"), ("gpu[07-09,12],x", "gpu07"), ("a[2,5]-ib", "a2-ib")]
)
def test_first_of_slurms_compressed_lists(nodes, first):
    assert first_host(nodes) == first


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
    plan = Plan(("a",), 1, "cpu", frozenset(), 8, 8, 20.0)
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
