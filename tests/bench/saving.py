"""Saving, loading and the stall of a background save, beside torch's own ways, on the state of a GPT and its moments.

    python -P tests/bench/saving.py [--gigabytes 1] [--worlds 1,2,4] [--rounds 5] [--folder PATH]

In each world of gloo ranks the state is cut over all of them, as under ZeRO 3, and the contenders take turns, each round in
another order; a time is that of the slowest rank. All of them flush what they have written to the disk (torch.save does
so here by an fsync of its own). What ours does beside the others: SHA-256 and XXH3 of every byte when saving, XXH3 again
before loading, unless only sizes are compared (verify = "sizes"). "warm": the files are in the page cache;
"cold": they have been dropped from it. Memory: the most that a rank's process grew by meanwhile.
"""

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

WIDTH, VOCAB = 768, 24_576


def state_of(gigabytes, mesh, seed=0):
    """Weights and two moments in fp32 of a GPT of about that size, cut along dimension 0 over `mesh`."""
    import torch
    from torch.distributed.tensor import Shard, empty

    layers = max(1, round((gigabytes * 1e9 / 12 - VOCAB * WIDTH) / (12 * WIDTH**2)))
    shapes = {"embed.weight": (VOCAB, WIDTH), "norm.weight": (WIDTH,)}
    for layer in range(layers):
        for name, rows, columns in [("q", 1, 1), ("k", 1, 1), ("v", 1, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)]:
            shapes[f"layers.{layer}.{name}.weight"] = (rows * WIDTH, columns * WIDTH)
        shapes[f"layers.{layer}.norm.weight"] = (WIDTH,)
    state = {}
    torch.manual_seed(seed + torch.distributed.get_rank())
    for name, shape in shapes.items():
        for kind in ("model.{}", "optim.{}.first", "optim.{}.second"):
            tensor = empty(*shape, device_mesh=mesh, placements=[Shard(0)])
            tensor.to_local().normal_()
            state[kind.format(name)] = tensor
    return state


def ours_save(folder, state):
    from mikoshi.trainer.checkpoint.saver import save as save_checkpoint

    save_checkpoint(folder, 1, state, {"config": ""}, keep=1)


def ours_load(folder, state, digests=True):
    from mikoshi.trainer.checkpoint.restore import load as load_checkpoint
    from mikoshi.trainer.checkpoint.restore import newest_valid

    path, manifest, _ = newest_valid(folder, digests=digests)
    load_checkpoint(path, manifest, state)


def ours_load_by_size(folder, state):
    ours_load(folder, state, digests=False)


def dcp_save(folder, state):
    from torch.distributed.checkpoint import FileSystemWriter, save

    save(state, storage_writer=FileSystemWriter(folder))


def dcp_load(folder, state):
    from torch.distributed.checkpoint import FileSystemReader, load

    load(state, storage_reader=FileSystemReader(folder))


def plain_save(folder, state):
    import torch

    folder.mkdir(exist_ok=True)
    with (folder / f"{torch.distributed.get_rank()}.pt").open("wb") as out:
        torch.save({name: tensor.to_local() for name, tensor in state.items()}, out)
        out.flush()
        os.fsync(out.fileno())


def plain_load(folder, state):
    import torch

    found = torch.load(folder / f"{torch.distributed.get_rank()}.pt", weights_only=True)
    for name, tensor in state.items():
        tensor.to_local().copy_(found[name])


class Background:
    """Ours and DCP's: begin a save, then wait for it outside of the time that counts."""

    def __init__(self):
        self.saver = None

    def ours(self, folder, state):
        from mikoshi.trainer.checkpoint.retention import Keep
        from mikoshi.trainer.checkpoint.saver import Saver
        from mikoshi.trainer.checkpoint.storage.local import LocalStore

        if self.saver is None:
            self.saver = Saver(LocalStore(folder), Keep(1))
        self.saver.store = LocalStore(folder)
        self.saver.begin(1, state, {"config": ""})
        return self.saver.conclude

    def dcp(self, folder, state):
        from torch.distributed.checkpoint import FileSystemWriter, async_save

        return async_save(state, storage_writer=FileSystemWriter(folder)).result


SAVES = {"Mikoshi": ours_save, "DCP": dcp_save, "torch.save": plain_save}
LOADS = {
    "Mikoshi": {"Mikoshi": ours_load, "Mikoshi, sizes": ours_load_by_size},
    "DCP": {"DCP": dcp_load},
    "torch.save": {"torch.save": plain_load},
}


def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def timed(work):
    """Seconds of the slowest rank, and the most that any rank's memory grew by."""
    import torch
    import torch.distributed as dist

    ctypes.CDLL(None).malloc_trim(0)  # what was freed does not hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = memory("VmRSS")
    dist.barrier()
    began = time.perf_counter()
    result = work()
    told = torch.tensor([time.perf_counter() - began, memory("VmHWM") - before], dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.tolist(), result


def cleared(folder):
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()


def drop_from_cache(folder):
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def measure(gigabytes, rounds, root):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    warnings.filterwarnings("ignore")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    mesh = init_device_mesh("cpu", (world,))
    state, blank = state_of(gigabytes, mesh), state_of(gigabytes, mesh, seed=1)
    size = torch.tensor(sum(tensor.to_local().nbytes for tensor in state.values()))
    dist.all_reduce(size)
    background, told = Background(), {}
    for number in range(rounds + 1):  # the first is for warming up
        turn = list(SAVES)[number % len(SAVES) :] + list(SAVES)[: number % len(SAVES)]
        for name in turn:
            folder = root / f"{name}-{number}"
            told.setdefault(f"save, {name}", []).append(timed(lambda f=folder, n=name: SAVES[n](f, state))[0])
            for how, load in LOADS[name].items():
                for cache in ("warm", "cold"):
                    if cache == "cold":
                        drop_from_cache(folder)
                    told.setdefault(f"load {cache}, {how}", []).append(timed(lambda f=folder, c=load: c(f, blank))[0])
            assert all(torch.equal(tensor.to_local(), blank[key].to_local()) for key, tensor in state.items()), name
            cleared(folder)
        for name, begin in [("Mikoshi", background.ours), ("DCP", background.dcp)][:: 1 if number % 2 else -1]:
            folder = root / f"async-{name}-{number}"
            stall, wait = timed(lambda f=folder, b=begin: b(f, state))
            wait()
            told.setdefault(f"stall, {name}", []).append(stall)
            cleared(folder)
    if rank == 0:
        first = told["stall, Mikoshi"][0]
        print(json.dumps({"bytes": int(size), "first": first, "told": {k: v[1:] for k, v in told.items()}}))


def as_rank(rank, world, store, *arguments):
    import torch.distributed as dist

    from mikoshi.parallel.process.gloo import use_one_worker

    use_one_worker()
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    measure(*arguments)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # without a last word of libraries' threads


def in_world(world, args, root):
    code = "import runpy, sys; run = runpy.run_path(sys.argv[1]); run['child'](sys.argv[2:])"
    store = str(root / f"store-{world}")
    rest = [str(world), store, str(args.gigabytes), str(args.rounds), str(root)]
    commands = [[sys.executable, "-P", "-c", code, __file__, str(rank), *rest] for rank in range(world)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks)
    return json.loads(outputs[0])


def child(arguments):
    rank, world, store, gigabytes, rounds, root = arguments
    as_rank(int(rank), int(world), store, float(gigabytes), int(rounds), Path(root))


def row(world, what, told, beside):
    """A line of the table: medians, and per round the ratio to `beside`: its median, and from which to which it went."""
    seconds, grown = zip(*told, strict=True)
    other = [s for s, _ in beside]
    ratios = [a / b for a, b in zip(seconds, other, strict=True)]
    ratio = f"{statistics.median(seconds) / statistics.median(other):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    print(f"| {world} | {what} | {statistics.median(seconds):.2f} s | {ratio} | {statistics.median(grown) / 1e6:,.0f} MB |")


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--worlds", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the file system to be measured (default: a temporary folder)")
    args = parser.parse_args()
    root, summaries = Path(tempfile.mkdtemp(dir=args.folder)), []
    print(f"python -P {' '.join(sys.argv)}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {args.rounds} rounds\n")
    print("| ranks | what | median | ratio to DCP (rounds) | memory a rank |\n|---|---|---|---|---|")
    try:
        for world in map(int, args.worlds.split(",")):
            found = in_world(world, args, root)
            told = found["told"]
            for what in ("save", "load warm", "load cold", "stall"):
                for key in (key for key in told if key.startswith(f"{what},")):
                    row(world, key, told[key], told[f"{what}, DCP"])
            stall, whole = (statistics.median(s for s, _ in told[key]) for key in ("stall, Mikoshi", "save, Mikoshi"))
            summaries.append(
                f"{found['bytes'] / 1e9:.2f} GB over {world} rank(s): a background save stalls training for {stall:.2f} s, "
                f"{stall / whole:.0%} of a save ({found['first'][0]:.2f} s the first time, when "
                f"{found['first'][1] / 1e6:,.0f} MB a rank are taken for the copy)"
            )
        print("\n" + "\n".join(summaries))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
