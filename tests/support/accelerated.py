"""A script as users of accelerate write it, started by torchrun or `accelerate launch`: CASE CONFIG OUT."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.interop.accelerate.prepare import finish, prepare
from mikoshi.trainer.interop.dataloader import training_batches

STEPS = 4


def accelerator_of(case):
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    if case in ("ddp", "launched"):
        return Accelerator(cpu=True, gradient_accumulation_steps=2)
    if case == "ddp-compiled":
        return Accelerator(cpu=True, gradient_accumulation_steps=2, dynamo_backend="eager")
    if case == "ddp-bf16":
        return Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    if case == "no-cpu-flag":
        return Accelerator()
    if case.startswith("deepspeed"):
        build_nothing()
        plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=2, gradient_clipping=1.0)
        how = {"cpu": True} if case == "deepspeed-cpu" else {"kwargs_handlers": gloo}
        return Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2, **how)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    how = {"fsdp2-cpu": {"cpu": True}, "fsdp2": {}, "fsdp2-gloo": {"kwargs_handlers": gloo}}[case]
    return Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2, **how)


def build_nothing():
    """At its first start on a CPU DeepSpeed compiles collectives for a minute, which gloo does as well."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def tiny(config):
    import transformers

    torch.manual_seed(1)
    shape = transformers.LlamaConfig(
        vocab_size=config.model.vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape)


def losses_of(accelerator, model, optimizer, batches):
    """Of each step, over all ranks."""
    found, parts = [], []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and accelerator.distributed_type != "DEEPSPEED":  # which clips by itself
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        parts.append(accelerator.reduce(loss.detach().clone(), "mean").item())
        if len(parts) == batches.micro_batches:
            found.append(sum(parts) / len(parts))
            parts = []
    return found


def main():
    case, config, out = sys.argv[1], load_config(Path(sys.argv[2])), Path(sys.argv[3])
    torch.set_num_threads(1)
    rank, told = os.environ.get("RANK", "0"), {}
    accelerator = accelerator_of(case)
    model = tiny(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    try:
        batches = training_batches(config, **({} if "RANK" in os.environ and accelerator.num_processes > 1 else ALONE))
        model, optimizer, batches = prepare(accelerator, model, optimizer, batches, precision="fp32")
        told = {"model": type(model).__name__, "losses": losses_of(accelerator, model, optimizer, batches)}
    except ConfigError as error:
        told = {"error": str(error)}
    (out / f"{rank}.json").write_text(json.dumps(told))
    finish()


ALONE = {"rank": 0, "world": 1, "micro_batches": 2}

if __name__ == "__main__":
    main()
