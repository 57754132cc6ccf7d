"""A pool of rank processes kept for the whole test session: importing torch is paid once, a test costs milliseconds.

`pool.run(function, *args, world=n)` calls the function on n processes that form one gloo process group, made afresh
for each call, and returns what each rank returned. A rank that raises or dies ends the call for all of them.
"""

import functools
import importlib.util
import inspect
import multiprocessing
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path


def _serve(pipe):
    import torch

    torch.set_num_threads(1)
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

    from parallel.world import leave

    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        return function(*args)
    finally:
        leave()


class RankPool:
    def __init__(self):
        self.context = multiprocessing.get_context("spawn")
        self.ranks = []

    def _grow(self, size):
        while len(self.ranks) < size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def run(self, function, *args, world, timeout=120):
        self._grow(world)
        ranks = self.ranks[:world]
        results = [None] * world
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(ranks):
                store = str(Path(folder) / "store")
                pipe.send((sys.path, inspect.getfile(function), function.__name__, args, rank, world, store))
            pending = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
            deadline = time.monotonic() + timeout
            while pending:
                ready = wait(list(pending), max(0, deadline - time.monotonic()))
                if not ready:
                    self.close()
                    raise TimeoutError(f"ranks {sorted(pending.values())} still run after {timeout} s")
                for pipe in ready:
                    rank = pending.pop(pipe)
                    try:
                        good, results[rank] = pipe.recv()
                    except EOFError:
                        good, results[rank] = False, "the process died"
                    if not good:
                        self.close()
                        raise AssertionError(f"rank {rank} of {world}: {results[rank]}")
        return results

    def close(self):
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
            process.join()
        self.ranks = []
