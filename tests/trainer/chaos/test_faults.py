"""Every kind of fault is the real thing, in a process of its own, strikes where the plan says, and never twice."""

import errno
import itertools
import json
import os
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mikoshi.parallel.process import heartbeat
from mikoshi.trainer.chaos.inject import LOG, SUPERVISOR, InjectedError, Injector, fired, flip_bit, inject, spoil_gradient
from mikoshi.trainer.chaos.plan import (
    KINDS,
    PHASES_OF,
    SLOW_STEPS,
    STEP_PHASES,
    Fault,
    FaultPlan,
    FaultSetting,
    make_fault_plan,
    read_fault_plan,
    write_fault_plan,
)
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.record.run_folder import RunFolder


def in_process(function):
    """What waitpid says of a process that calls the function: it is stopped there, or has ended."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return child, os.waitpid(child, os.WUNTRACED)[1]


def injector(folder, *faults, rank=1, supervisor=None, parameters=()):
    return Injector(FaultPlan(faults), rank, folder / LOG, folder / "checkpoints", lambda: parameters, supervisor)


def walk(listener, first, last, phases=("data", "forward", "backward", "reduce", "update", "agree")):
    for step in range(first, last + 1):
        for phase in phases:
            listener(step, phase)


SETTINGS = st.builds(
    FaultSetting, steps=st.integers(1, 3000), ranks=st.integers(1, 9), every=st.integers(0, 40), compare=st.integers(0, 30),
    replicas=st.booleans(),
)  # fmt: skip


@given(st.integers(0, 99), st.integers(1, 60), st.sets(st.sampled_from(sorted(KINDS)), min_size=1), SETTINGS)
def test_a_plan_is_a_function_of_its_seed_and_has_room(seed, count, kinds, setting):
    kinds = sorted(kind for kind in kinds if setting.refusal(kind) is None)
    if not kinds:
        return
    try:
        plan = make_fault_plan(seed, count, kinds, setting)
    except ConfigError as error:
        assert "train.steps" in str(error) or "checkpoint.every" in str(error)
        return
    assert plan == make_fault_plan(seed, count, kinds, setting)
    assert len(plan.faults) == count
    tally = [sum(fault.kind == kind for fault in plan.faults) for kind in kinds]
    assert max(tally) - min(tally) <= 1
    steps = [fault.step for fault in plan.faults]
    assert steps[0] >= 3
    assert all(later - step >= 3 for step, later in itertools.pairwise(steps))
    assert steps[-1] + 3 <= setting.steps
    for fault in plan.faults:
        assert 0 <= fault.rank < setting.ranks
        assert fault.phase in PHASES_OF.get(fault.kind, (*STEP_PHASES, "save"))
        assert fault.phase != "save" or fault.step % setting.every == 0
        assert fault.kind != "corrupt" or fault.step >= 3 * setting.every - 1
        assert fault.kind != "slow" or fault.step + SLOW_STEPS < setting.steps


def test_another_seed_makes_another_plan():
    setting = FaultSetting(steps=400, ranks=4, every=5)
    kinds = [kind for kind in KINDS if setting.refusal(kind) is None]
    assert make_fault_plan(1, 20, kinds, setting) != make_fault_plan(2, 20, kinds, setting)
    assert "flip" not in kinds
    assert set(kinds) | {"flip"} == set(KINDS)


def test_where_there_is_no_room_it_says_how_many_steps_it_takes():
    with pytest.raises(ConfigError, match=r"train.steps = 50.*need \d+ steps: raise train.steps, or ask for fewer"):
        make_fault_plan(1, 40, ["kill"], FaultSetting(50, 4, 5))
    with pytest.raises(ConfigError, match=r"set checkpoint\.every"):
        make_fault_plan(1, 40, ["kill"], FaultSetting(5000, 4, 0))


def test_a_plan_is_read_back_as_it_was_written(tmp_path):
    plan = make_fault_plan(3, 30, list(KINDS), FaultSetting(2000, 4, 5, 10, True))
    (tmp_path / "plan.toml").write_text(write_fault_plan(plan))
    assert read_fault_plan(tmp_path / "plan.toml", 4) == plan
    tables = [{"kind": f.kind, "step": f.step, "phase": f.phase, "rank": f.rank} for f in plan.faults if f.kind != "preempt"]
    (tmp_path / "plan.json").write_text(json.dumps({"fault": tables}))
    assert read_fault_plan(tmp_path / "plan.json", 4) == FaultPlan(tuple(f for f in plan.faults if f.kind != "preempt"))


GOOD = '[[fault]]\nkind = "kill"\nstep = 3\nphase = "data"\nrank = 1\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + '[[fault]]\nkind = "kil"\nstep = 1\nphase = "data"\nrank = 0', r":7: fault 2, kind: 'kil'.*mean 'kill'"),
        (GOOD.replace("step = 3", "step = -1"), ":3: fault 1, step: -1 is not a whole number"),
        (GOOD.replace("step = 3", "step = true"), ":3: fault 1, step: True is not a whole number"),
        (GOOD.replace("step = 3", "step = 3.0"), ":3: fault 1, step"),
        (GOOD.replace("rank = 1", "rank = 4"), ":5: fault 1, rank: 4 is not a whole number from 0 to 3"),
        (GOOD.replace("rank = 1\n", ""), ":1: fault 1, rank: missing"),
        (GOOD.replace('"data"', '"forwards"'), r":4: fault 1, phase: 'forwards'.*mean 'forward'"),
        (GOOD.replace('"data"', "[1]"), r":4: fault 1, phase: \[1\] is none of"),
        (GOOD.replace('"kill"', '"nan"'), r':4: fault 1, phase: "nan" strikes in reduce'),
        (GOOD + 'signal = "SIGTERM"\n', ':6: fault 1, signal: only "preempt" has one'),
        (GOOD + "steps = 4\n", ":6: fault 1, steps: unknown key; a fault has kind, step, phase, rank, signal"),
        (GOOD + "[[fault]\n", "not TOML.*line 6"),
        ("x = 1\n" + GOOD, "a list of .*fault.* tables and nothing else"),
        ("fault = [1]\n", "fault 1: give a table"),
        ("", "a list of"),
    ],
)
def test_what_is_wrong_in_a_plan_is_told_with_its_line(tmp_path, text, said):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_fault_plan(tmp_path / "plan.toml", 4)


def test_a_plan_that_is_not_there_or_no_json(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_fault_plan(tmp_path / "no.toml", 4)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not JSON"):
        read_fault_plan(tmp_path / "deep.json", 4)


def test_kill_is_sigkill_at_its_step_and_phase_and_never_again(tmp_path):
    fault = Fault("kill", 3, "backward", 1)

    def train(reached):
        listener = injector(tmp_path, fault)
        walk(listener, 1, 2)
        listener(3, "forward")
        (tmp_path / reached).touch()
        listener(3, "backward")
        (tmp_path / "survived").touch()

    _, status = in_process(lambda: train("reached"))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "reached").exists()
    assert not (tmp_path / "survived").exists()
    (record,) = (json.loads(line) for line in (tmp_path / LOG).read_text().splitlines())
    assert {key: record[key] for key in ("number", "kind", "step", "phase", "rank")} == {
        "number": 0, "kind": "kill", "step": 3, "phase": "backward", "rank": 1,
    }  # fmt: skip
    assert abs(time.time() - record["time"]) < 60
    _, status = in_process(lambda: train("again"))
    assert status == 0, "the run that is started again does not suffer it again"
    assert (tmp_path / "survived").exists()
    assert len((tmp_path / LOG).read_text().splitlines()) == 1


def test_a_record_that_a_kill_cut_short_does_no_harm(tmp_path):
    (tmp_path / LOG).write_text('{"number": 0, "time": 1.0}\n{"numb')
    assert fired(tmp_path / LOG) == {0: {"number": 0, "time": 1.0}}


def test_another_ranks_fault_is_not_ours(tmp_path):
    listener = injector(tmp_path, Fault("kill", 3, "data", 0))
    walk(listener, 1, 5)
    assert not (tmp_path / LOG).exists()


def test_of_two_faults_for_one_moment_the_second_strikes_when_it_comes_again(tmp_path):
    faults = (Fault("raise", 3, "data", 1), Fault("kill", 3, "data", 1))
    with pytest.raises(InjectedError, match="fault 1 of the plan: an error on purpose in step 3"):
        injector(tmp_path, *faults)(3, "data")
    _, status = in_process(lambda: injector(tmp_path, *faults)(3, "data"))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert list(fired(tmp_path / LOG)) == [0, 1]


def test_stop_leaves_a_stopped_process(tmp_path):
    child, status = in_process(lambda: injector(tmp_path, Fault("stop", 1, "data", 1))(1, "data"))
    assert os.WIFSTOPPED(status)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def burn(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_slow_takes_twice_the_cpu_for_its_steps_and_no_longer(tmp_path):
    listener = injector(tmp_path, Fault("slow", 2, "data", 1))
    used = []
    for step in range(1, 2 + SLOW_STEPS + 3):
        begun = time.thread_time()
        listener(step, "data")
        burn(0.004)
        listener(step, "forward")
        burn(0.004)
        listener(step, "agree")
        used.append(time.thread_time() - begun)
    slow, quiet = used[1 : 1 + SLOW_STEPS], [used[0], *used[2 + SLOW_STEPS :]]
    assert min(slow) > 0.0155
    assert min(quiet) < 0.0095
    assert sorted(slow)[len(slow) // 2] == pytest.approx(2 * sorted(quiet)[len(quiet) // 2], rel=0.2)


def test_nan_is_one_element_of_a_gradient_that_is_there(tmp_path):
    empty, frozen, p = (torch.nn.Parameter(torch.zeros(n)) for n in (0, 3, 12))
    empty.grad, p.grad = torch.zeros(0), torch.ones(3, 4).t().reshape(12)
    injector(tmp_path, Fault("nan", 1, "reduce", 1), parameters=(empty, frozen, p))(1, "reduce")
    assert int(torch.isnan(p.grad).sum()) == 1
    with pytest.raises(RuntimeError, match="no gradient"):
        spoil_gradient((empty, frozen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_flip_is_one_bit_of_one_weight(dtype):
    weights = torch.linspace(1, 2, 12, dtype=dtype).reshape(3, 4).t()
    p = torch.nn.Parameter(weights.clone(memory_format=torch.preserve_format))
    flip_bit([torch.nn.Parameter(torch.zeros(0)), p])
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    changed = (p.detach().contiguous().view(integers) ^ weights.contiguous().view(integers)).flatten().tolist()
    assert sorted(n.bit_count() for n in changed) == [0] * 11 + [1]
    assert torch.isfinite(p).all()


def flip_where_held_twice():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    cut = torch.nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Replicate(), Shard(0)]))
    alone = torch.nn.Parameter(distribute_tensor(torch.ones(8), mesh["shard"], [Shard(0)]))
    if dist.get_rank() == 1:
        flip_bit([alone, cut])
    return [int((p.to_local() != 1).sum()) for p in (alone, cut)]


def test_flip_takes_a_weight_that_another_rank_holds_too(ranks):
    assert ranks.run(flip_where_held_twice, world=4) == [[0, 0], [0, 1], [0, 0], [0, 0]]


def test_fill_is_a_disk_without_room_until_the_next_save(tmp_path):
    def train():
        listener = injector(tmp_path, Fault("fill", 4, "save", 1))
        listener(2, "save")
        (tmp_path / "before").write_bytes(bytes(1 << 16))
        for _ in range(2):  # it waits for the save before, then begins its own
            listener(4, "save")
        try:
            (tmp_path / "during").write_bytes(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.EFBIG
        else:
            raise AssertionError("it was written")
        walk(listener, 5, 5)
        listener(5, "save")
        (tmp_path / "after").write_bytes(bytes(1 << 16))

    assert in_process(train)[1] == 0


def test_corrupt_is_one_byte_of_the_newest_checkpoint(tmp_path):
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for name in ("rank-00000.safetensors", "manifest.json"):
            (folder / name).write_bytes(bytes(1000))
    _, status = in_process(lambda: injector(tmp_path, Fault("corrupt", 12, "data", 1))(12, "data"))
    assert os.WTERMSIG(status) == signal.SIGKILL
    content = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    (damaged,) = (path for path, data in content.items() if data != bytes(1000))
    assert damaged.parent.name == "step-00000010"
    assert (fired(tmp_path / LOG)[0]["step_damaged"], fired(tmp_path / LOG)[0]["step_older"]) == (10, 5)
    assert sum(byte.bit_count() for byte in content[damaged]) == 1


def test_an_older_checkpoint_counts_as_sound_unless_it_was_damaged_and_not_made_again(tmp_path):
    def older(number, step):
        faults = [Fault("corrupt", at, "data", 1) for at in (6, 11, 16)]
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(bytes(1000))
        in_process(lambda: injector(tmp_path, *faults)(step + 1, "data"))
        return fired(tmp_path / LOG)[number].get("step_older")

    assert older(0, 5) is None
    assert older(1, 10) is None
    remade = tmp_path / "checkpoints" / "step-00000005"
    remade.rename(tmp_path / "checkpoints" / "damaged-step-00000005")
    remade.mkdir()
    (remade / "manifest.json").write_bytes(bytes(1000))
    assert older(2, 15) == 5


def supervisor_that_waits(ready):
    """A process that ends with the number of the signal it gets."""
    asked = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, asked)
        os.write(ready, b"1")
        os._exit(signal.sigwait(asked))
    return child


@pytest.mark.parametrize(
    ("kind", "name"),
    [("launcher", ""), ("node", ""), ("preempt", "SIGTERM"), ("preempt", "SIGUSR1"), ("preempt", "SIGUSR2")],
)
def test_what_started_the_ranks_is_killed_or_asked_to_stop(tmp_path, kind, name):
    told, ready = os.pipe()
    supervisor = supervisor_that_waits(ready)
    assert os.read(told, 1) == b"1"
    fault = Fault(kind, 1, "data", 1, name or "SIGTERM")
    _, own = in_process(lambda: injector(tmp_path, fault, supervisor=supervisor)(1, "data"))
    status = os.waitpid(supervisor, 0)[1]
    os.close(told)
    os.close(ready)
    if kind == "preempt":
        assert os.WEXITSTATUS(status) == signal.Signals[name]
    else:
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert own == (signal.SIGKILL if kind == "node" else 0)


def test_without_a_supervisor_it_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="that `mikoshi` itself has started"):
        injector(tmp_path, Fault("preempt", 1, "data", 1))(1, "data")


def test_the_beats_of_a_run_bring_them(tmp_path, monkeypatch):
    monkeypatch.setenv(SUPERVISOR, str(os.getpid()))

    def train():
        inject(FaultPlan((Fault("raise", 2, "reduce", 1),)), 1, RunFolder(tmp_path), lambda: ())
        heartbeat.send_heartbeat("data", 1)
        heartbeat.send_heartbeat("reduce")
        heartbeat.send_heartbeat("data", 2)
        try:
            heartbeat.send_heartbeat("reduce")
        except InjectedError:
            os._exit(7)

    assert os.WEXITSTATUS(in_process(train)[1]) == 7
    assert list(fired(tmp_path / LOG)) == [0]
