"""One contender of the training benchmark, as a process (or as one rank of several): prints one JSON line.

All train the same GPT-2-shaped model on the same rows with the same optimizer and clipping; each is written as its
own users would write it. Step times leave out the first steps; memory is the process's peak resident set on CPU and
the allocator's peak on CUDA.
"""

import argparse
import json
import os
import resource
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch


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


def ours(case, rank, world, device, precision):
    from data.loader import Batch
    from trainer.config import RunConfig
    from trainer.engines import build_engine
    from trainer.engines.carry import layout_of

    config = RunConfig.model_validate(
        {
            "model": {
                "vocab": case.vocab, "context": case.context, "layers": case.layers, "width": case.width,
                "heads": case.heads, "position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True,
                "tied": True,
            },
            "data": {"path": "unused"},
            "train": {"steps": 1000, "global_batch": case.batch, "context": case.context},
            "optim": {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "clip": CLIP},
            "parallel": {"zero": int(os.environ.get("BENCH_ZERO", "2"))},
            "engine": {"precision": precision},
        }
    )  # fmt: skip
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


def hugging_face(case, rank, world, device, precision):
    from accelerate import Accelerator
    from transformers import GPT2Config, GPT2LMHeadModel

    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=case.vocab, n_positions=case.context, n_embd=case.width, n_layer=case.layers,
                   n_head=case.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip
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
        for p in self.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.02)

    def forward(self, tokens, labels):
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embed.weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain(case, rank, world, device, precision):
    torch.manual_seed(0)
    model = PlainGPT(case).to(device)
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


CONTENDERS = {"mikoshi": ours, "hugging_face": hugging_face, "plain": plain}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--case", choices=CASES, default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--skip", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    from parallel.world import World, join, leave, pick_device, world_from

    place = world_from(os.environ) or World()
    device = pick_device("auto", place)
    if args.contender != "hugging_face":
        join(place, device)
    case = CASES[args.case]
    step = CONTENDERS[args.contender](case, place.rank, place.size, device, args.precision)
    seconds, losses = [], []
    for number in range(args.skip + args.steps):
        start = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - start)
    if place.rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        median = statistics.median(seconds[args.skip :])
        print(json.dumps({"seconds": median, "tokens_per_s": case.tokens / median, "peak_bytes": peak,
                          "first_loss": losses[0], "last_loss": losses[-1]}))  # fmt: skip
    leave()


if __name__ == "__main__":
    main()
