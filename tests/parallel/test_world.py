"""A launcher's variables are read as it means them; impossible layouts are refused with ones that work."""

import pytest

from parallel.world import World, first_host, world_from


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
