"""A pool of rank processes kept for the whole test session: importing torch is paid once for all, a test costs milliseconds.

`pool.run(function, *args, world=n)` calls the function on n processes that form one gloo process group, made afresh
for each call, and returns what each rank returned. A rank that raises or dies ends the call for all of them.
"""

import faulthandler
import functools
import gc
import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock


def _serve(pipe, said):
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # what a rank that a signal ends has to say
    faulthandler.enable()
    while True:
        try:
            sys.path[:], file, name, args, rank, world, store = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _call(getattr(_module(file), name), args, rank, world, store)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@functools.cache
def _module(file):
    """The test module at `file`, whose name is not one that can be imported."""
    spec = importlib.util.spec_from_file_location(f"ranks_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(function, args, rank, world, store):
    import torch.distributed as dist

    from mikoshi.parallel.process.gloo import use_one_worker
    from mikoshi.parallel.process.process_group import leave

    use_one_worker()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        return function(*args)
    finally:
        _forget_deepspeed()
        _forget_megatron()
        leave()
        gc.collect()  # an engine is full of cycles, and every gloo group that it holds runs two threads that poll


def _forget_deepspeed():
    """DeepSpeed keeps the groups that it has made for the whole process, and forgets them in its own end of them alone. Under
    ZeRO 3 the ranks compare numbers of modules that it goes on counting from one engine to the next, of which the ranks
    of a pool have not had the same."""
    deepspeed = sys.modules.get("deepspeed")
    comm = getattr(deepspeed, "comm", None)
    if deepspeed is None or comm is None or not comm.is_initialized():
        return
    # Asked of the types: a list of all objects would take hold of some that a gloo thread is letting go.
    engines = (deepspeed.runtime.engine.DeepSpeedEngine, deepspeed.runtime.pipe.engine.PipelineEngine)
    for engine in [found for found in gc.get_referrers(*engines) if isinstance(found, engines)]:
        engine.destroy()  # hooks at its gradients keep it otherwise, with all of its groups
    comm.destroy_process_group()
    zero = deepspeed.runtime.zero
    zero.parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    zero.partition_parameters.Init.param_id = 0


def _forget_megatron():
    """Its writer of checkpoints starts a process that outlives a rank which is killed."""
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    writer = sys.modules.get("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if writer is not None and writer._results_queue is not None:
        writer._results_queue._manager.shutdown()
        writer._results_queue = None


MOST_THREADS = 150
"""Of a rank that is kept: under ZeRO 3 DeepSpeed does not let go of its groups, whose threads poll."""


def _threads(pid):
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


class RankPool:
    """engines: whether other makers' engines are imported too."""

    def __init__(self, engines=False):
        self.context = multiprocessing.get_context("forkserver")
        self.server = forkserver.ForkServer()  # of its own: that of the process is what some tests are about
        self.server.set_forkserver_preload(["preloaded", *(["preloaded_engines"] if engines else [])])
        with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
            self.server.ensure_running()
        self.ranks = []
        self.said = tempfile.TemporaryDirectory(prefix="ranks-")

    def _grow(self, size):
        while len(self.ranks) < size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs, str(self._file(len(self.ranks)))), daemon=True)
            with mock.patch.object(forkserver, "connect_to_new_process", self.server.connect_to_new_process):
                process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def run(self, function, *args, world, timeout=120):
        self._grow(world)
        ranks = self.ranks[:world]
        results = [None] * world
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(ranks):
                self._file(rank).write_text("")
                store = str(Path(folder) / "store")
                pipe.send((sys.path, inspect.getfile(function), function.__name__, args, rank, world, store))
            pending = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
            deadline = time.monotonic() + timeout
            while pending:
                ready = wait(list(pending), max(0, deadline - time.monotonic()))
                if not ready:
                    self.close()
                    said = [f"rank {rank}: {self._said(rank)}" for rank in range(world)]
                    raise TimeoutError("\n".join([f"ranks {sorted(pending.values())} still run after {timeout} s", *said]))
                for pipe in ready:
                    rank = pending.pop(pipe)
                    try:
                        good, results[rank] = pipe.recv()
                    except EOFError:
                        good, results[rank] = False, "its process ended"
                    if not good:
                        ended = self._ended()
                        self.close()
                        raise AssertionError("\n".join([f"rank {rank} of {world}: {results[rank]}", *ended]))
        if any(_threads(process.pid) > MOST_THREADS for process, _ in ranks):
            self.close()
        return results

    def _ended(self):
        """What the ranks have said that a signal or an exit has ended: the others' errors come of it."""
        over = wait([process.sentinel for process, _ in self.ranks], 0.5)
        told = []
        for rank, (process, _) in enumerate(self.ranks):
            if process.sentinel in over:
                process.join(5)
                told.append(f"rank {rank}: exit code {process.exitcode}\n{self._said(rank)}")
        return told

    def _file(self, rank):
        return Path(self.said.name) / str(rank)

    def _said(self, rank):
        return self._file(rank).read_text(errors="replace")[-8000:]

    def close(self):
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
            process.join()
        self.ranks = []

    def end(self):
        """Close it, and end what ranks are forked from."""
        self.close()
        self.server._stop()
        self.said.cleanup()
