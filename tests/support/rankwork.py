"""What the ranks of a supervisor's tests do. Importable, as a function that supervised ranks call must be."""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mikoshi.data.io.atomic import write_file
from mikoshi.parallel.process import heartbeat
from mikoshi.parallel.process.process_group import join, world_from
from mikoshi.trainer.exit_codes import DONE, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.signals import STOP_SIGNALS


def rank():
    return int(os.environ["RANK"])


def note(folder, **more):
    """Say that this rank has got so far."""
    told = {"rank": rank(), "attempt": int(os.environ["TORCHELASTIC_RESTART_COUNT"]), "pid": os.getpid(), "time": time.time()}
    with (Path(folder) / "notes.jsonl").open("a") as out:
        out.write(json.dumps(told | more) + "\n")


def returns(codes):
    """End with this rank's code, or by its signal if it is negative; of a user's error leave a message."""
    code = codes[rank()]
    if code == 2:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": f"rank {rank()} says"}))
    if code < 0:
        os.kill(os.getpid(), -code)
        time.sleep(60)
    return code


def dies_then_is_refused(folder, refusals):
    """Killed in the first attempt; in the next ones a user's error, which rank 0 says itself and the other leaves."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    note(folder)
    if not attempt:
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt > refusals:
        return DONE
    if rank():
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": "disk: No space left on device"}))
    return USER_ERROR


def asks_then_dies(step):
    """Has its supervisor asked to stop, and is killed, at this step, once the request has come back."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if step:
        heartbeat.send_heartbeat("data", step)
    os.kill(int(os.environ["MIKOSHI_SUPERVISOR"]), signal.SIGTERM)
    signal.sigwait(STOP_SIGNALS)
    os.kill(os.getpid(), signal.SIGKILL)
    return DONE


def waits_for_the_other():
    """Rank 0 ends at once, as one that is asked to stop before its first step; rank 1 waits for it to come."""
    if rank() == 0:
        return PREEMPTED
    join(world_from(os.environ), torch.device("cpu"), timedelta(minutes=10))
    return DONE


def train(folder, steps, faults=(), silence=5.0, every=0, pace=0.0):
    """Steps of `pace` seconds and an all-reduce with a beat for each phase, which go on from the last save, stop on request,
    and meet `faults`: (attempt or None, step, phase, rank, what): an exception's message, or a signal that this rank sends
    itself. Of a step "any", the first that comes there."""
    asked = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    heartbeat.set_limits(silence, 60.0)
    heartbeat.set_listener(lambda step, phase: _strike(folder, faults, step, phase))
    torch.set_num_threads(1)
    join(world_from(os.environ), torch.device("cpu"), timedelta(seconds=60))
    saved = Path(folder) / "saved"
    start = int(saved.read_text()) if saved.exists() else 0
    dist.barrier()
    note(folder, start=start)
    for step in range(start + 1, steps + 1):
        heartbeat.send_heartbeat("data", step)
        heartbeat.send_heartbeat("forward")
        held_up_here(folder, step)
        heartbeat.send_heartbeat("reduce")
        time.sleep(pace)
        dist.all_reduce(torch.ones(8))
        heartbeat.send_heartbeat("agree")
        flag = torch.tensor(len(asked))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if bool(flag) or step == steps or (every and step % every == 0):
            heartbeat.send_heartbeat("save")
            if rank() == 0:
                write_file(saved, str(step).encode())
                RunFolder(Path(folder)).event("save", step=step)
            dist.barrier()
        if flag and step < steps:
            if rank() == 0:
                RunFolder(Path(folder)).event("stop", step=step)
            dist.barrier()
            heartbeat.send_heartbeat("end")
            note(folder, stopped=step, asked=asked)
            _all_come_to_the_end()
            return PREEMPTED
    _all_come_to_the_end()
    return DONE


def _all_come_to_the_end():
    """By the store, which is the supervisor's: a rank that ends closes connections on which another may still read."""
    store = dist.distributed_c10d._get_default_store()
    if store.add("ended", 1) == dist.get_world_size():
        store.set("all ended", "")
    store.wait(["all ended"])


def held_up_here(folder, step):
    """A function to be found in the stacks of a rank that hangs."""
    wanted = Path(folder) / f"hang-{rank()}"
    if wanted.exists() and int(wanted.read_text()) == step:
        wanted.unlink()
        time.sleep(600)


def _strike(folder, faults, step, phase):
    for attempt, *where, what in faults:
        now = attempt in (None, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
        if now and where in ([step, phase, rank()], ["any", phase, rank()]):
            note(folder, fault=what)
            if isinstance(what, str):
                raise RuntimeError(what)
            os.kill(os.getpid(), what)


def deaf(folder):
    """Take no notice of any request to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    note(folder)
    while True:
        time.sleep(0.1)
        heartbeat.send_heartbeat("data", 1)


def place(folder):
    """Say where this rank finds itself."""
    import mikoshi

    told = {
        "env": dict(os.environ), "cwd": str(Path.cwd()), "comm": Path("/proc/self/comm").read_text().strip(),
        "parent": os.getppid(), "session": os.getsid(0), "cuda": torch.cuda.is_initialized(), "mikoshi": mikoshi.__file__,
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "handlers": [signal.getsignal(number) == signal.SIG_DFL for number in STOP_SIGNALS],
        "main": "rerun" in dir(sys.modules["__main__"]), "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
    }  # fmt: skip
    note(folder, **told)
    return DONE
