"""One contender of the training benchmark, as a process (or as one rank of several): prints one JSON line.

All train the same GPT-2-shaped model on the same rows, from the same initial weights, with the same optimizer and
clipping, so that their losses agree; each is written as its own users would write it. All join the same process group
and have the same allocator settings. Step times leave out the first steps; memory is the process's peak resident set
on CPU and the allocator's peak on CUDA.
"""

import argparse
import json
import os
import re
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch.distributed import TCPStore


@dataclass(frozen=True)
class Case:
    layers: int
    width: int
    heads: int
    context: int
    vocab: int
    batch: int  # rows over all ranks

    @property
    def tokens(self):
        return self.batch * self.context


CASES = {
    "cpu": Case(4, 256, 4, 256, 8192, 8),
    "gpt2-124m": Case(12, 768, 12, 1024, 50304, 16),
    "gpt2-1.5b": Case(48, 1600, 25, 1024, 50304, 8),
}
LR, DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0


def rows(case, rank, world, step):
    rng = np.random.default_rng([step, 7])
    data = rng.integers(0, case.vocab, (case.batch, case.context + 1))
    share = case.batch // world
    return data[rank * share : (rank + 1) * share]


def model_of(case):
    return {
        "vocab": case.vocab, "context": case.context, "layers": case.layers, "width": case.width, "heads": case.heads,
        "position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "tied": True,
    }  # fmt: skip


def fill(model, case, places):
    """The initial weights of Mikoshi's model, into another's. `places`: in our names, what it calls something else; a
    name that begins with "T " holds the matrix transposed. Theirs keep queries, keys and values in one matrix."""
    from mikoshi.trainer.model.config import ModelConfig
    from mikoshi.trainer.model.gpt import GPT
    from mikoshi.trainer.model.init import Region, initial
    from mikoshi.trainer.model.init import fill as fill_ours

    config = ModelConfig(**model_of(case))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    targets = dict(model.named_parameters())
    for name, shape in shapes.items():
        values = torch.empty(shape)
        fill_ours(values, name, Region.all_of(shape), initial(name, config), 0, torch.get_num_threads())
        part = re.search(r"\.attn\.([qkv])\.", name)
        for ours, theirs in places.items():
            name = name.replace(ours, theirs)
        target = targets[name.replace("T ", "")].data
        target = target.T if "T " in name and target.ndim == 2 else target
        (target if part is None else target.chunk(3)["qkv".index(part[1])]).copy_(values)
    return model


def ours(case, rank, world, device, precision):
    from mikoshi.data.dataset.rows import Batch
    from mikoshi.trainer.config.run import RunConfig
    from mikoshi.trainer.engines.build import build_engine
    from mikoshi.trainer.engines.layout import layout_of

    config = RunConfig.model_validate(
        {
            "model": model_of(case),
            "data": {"path": "unused"},
            "train": {"steps": 1000, "global_batch": case.batch, "context": case.context},
            "optim": {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "clip": CLIP},
            "parallel": {"zero": int(os.environ.get("BENCH_ZERO", "2"))},
            "engine": {"precision": precision},
            "run": {"seed": 0},
        }
    )
    engine = build_engine(config, layout_of(config, world), device)

    def step(number):
        data = rows(case, rank, world, number)
        return engine.step(Batch(data[:, :-1], data[:, 1:], None, None), LR).loss

    return step


def decay_groups(model):
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


HUGGING_FACE = {
    "embed": "transformer.wte", "position": "transformer.wpe", "blocks": "transformer.h", "attn_norm": "ln_1",
    "mlp_norm": "ln_2", "attn.out": "T attn.c_proj", "attn.q": "T attn.c_attn", "attn.k": "T attn.c_attn",
    "attn.v": "T attn.c_attn", "mlp.up": "T mlp.c_fc", "mlp.down": "T mlp.c_proj", "norm": "transformer.ln_f",
}  # fmt: skip


def hugging_face(case, rank, world, device, precision):
    from accelerate import Accelerator
    from transformers import GPT2Config, GPT2LMHeadModel

    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=case.vocab, n_positions=case.context, n_embd=case.width, n_layer=case.layers,
                   n_head=case.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip
    fill(model, case, HUGGING_FACE)
    if device.type == "cuda":
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(decay_groups(model), lr=LR, betas=BETAS, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step(number):
        data = torch.from_numpy(rows(case, rank, world, number)).to(accelerator.device)
        tokens, labels = data[:, :-1].contiguous(), data[:, 1:].contiguous()
        loss = model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class PlainBlock(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.heads = case.heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(case.width), torch.nn.LayerNorm(case.width)
        self.qkv, self.out = torch.nn.Linear(case.width, 3 * case.width), torch.nn.Linear(case.width, case.width)
        self.up, self.down = torch.nn.Linear(case.width, 4 * case.width), torch.nn.Linear(4 * case.width, case.width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.embed = torch.nn.Embedding(case.vocab, case.width)
        self.position = torch.nn.Embedding(case.context, case.width)
        self.blocks = torch.nn.ModuleList(PlainBlock(case) for _ in range(case.layers))
        self.norm = torch.nn.LayerNorm(case.width)

    def forward(self, tokens, labels):
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embed.weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


PLAIN = {
    "attn_norm": "norm1", "mlp_norm": "norm2", "attn.out": "out", "attn.q": "qkv", "attn.k": "qkv", "attn.v": "qkv",
    "mlp.": "",
}  # fmt: skip


def plain(case, rank, world, device, precision):
    model = fill(PlainGPT(case), case, PLAIN).to(device)
    if device.type == "cuda":
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(decay_groups(model), lr=LR, betas=BETAS, fused=True)
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def step(number):
        data = torch.from_numpy(rows(case, rank, world, number)).to(device)
        with cast:
            loss = model(data[:, :-1], data[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def deepspeed(case, rank, world, device, precision):
    import deepspeed

    # Its all-reduce in shared memory is compiled on the spot, and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = fill(PlainGPT(case), case, PLAIN)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(decay_groups(model), lr=LR, betas=BETAS, fused=True),
        config={
            "train_batch_size": case.batch,
            "train_micro_batch_size_per_gpu": case.batch // world,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {
                "stage": 2, "contiguous_gradients": True, "overlap_comm": True, "reduce_scatter": True,
                "reduce_bucket_size": 5e8, "allgather_bucket_size": 5e8,
            },
        },
    )  # fmt: skip

    def step(number):
        data = torch.from_numpy(rows(case, rank, world, number)).to(device)
        loss = engine(data[:, :-1], data[:, 1:])
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


CONTENDERS = {"mikoshi": ours, "hugging_face": hugging_face, "plain": plain, "deepspeed": deepspeed}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--case", choices=CASES, default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--skip", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--turns", type=int, help="port of the store that says when to take a step; default: at once")
    args = parser.parse_args()
    from mikoshi.parallel.process.process_group import World, join, pick_device, wait_for_all, world_from

    place = world_from(os.environ) or World()
    device = pick_device("auto", place)
    join(place, device)
    case = CASES[args.case]
    step = CONTENDERS[args.contender](case, place.rank, place.size, device, args.precision)
    turns = TCPStore("127.0.0.1", args.turns, is_master=False, wait_for_workers=False) if args.turns else None
    seconds, losses = [], []
    for number in range(args.skip + args.steps):
        if turns is not None:
            turns.wait([f"{args.contender}/{number}"], timedelta(hours=1))
        start = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - start)
        if turns is not None:
            turns.set(f"{args.contender}/{number}/{place.rank}", "")
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    # Ours says the loss of the whole batch, the others that of their own rows: the mean over the ranks is the same.
    mean = torch.tensor(losses, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(mean)
    losses = (mean / place.size).tolist()
    if place.rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        told = {"seconds": slowest.tolist()[args.skip :], "tokens": case.tokens, "peak_bytes": peak, "losses": losses}
        print(json.dumps(told))
    wait_for_all()


def run():
    """Its figures are told, and the process is gone: torch's destructors of gloo groups can wait for ever at an interpreter's
    end, with its lock held, for a thread that waits for that lock."""
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
