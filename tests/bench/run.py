"""The benchmark: our step beside others' on the same work, alternating, medians; then start-up and the loop's overhead.

    python tests/bench/run.py [--gpu] [--rounds N] [--only step|startup|overhead] [--ranks 1|2]

Prints Markdown tables with the device, the versions and the commit. Every contender is a fresh process each time, with
the same number of threads a rank. Contenders whose losses are not the same are refused: they would not do the same work.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = {
    "mikoshi": "Mikoshi, ZeRO-2", "hugging_face": "Hugging Face + accelerate", "plain": "plain PyTorch loop, DDP",
    "deepspeed": "DeepSpeed ZeRO-2",
}  # fmt: skip
# Of a loss of about 9: rounding, and what a few steps of AdamW make of it.
SAME_LOSS = {"fp32": 1e-4, "bf16": 3e-2}


def machine():
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    else:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        device = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    commit = ""
    if shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = asked.stdout.strip()
    libraries = [name for name in ("torch", "transformers", "accelerate", "deepspeed") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    return f"{device}; Python {platform.python_version()}, {versions}; commit {commit or 'unknown'}"


def measure(contender, case, ranks, steps, precision):
    command = [sys.executable, str(HERE / "contender.py"), contender, "--case", case, "--steps", str(steps)]
    command += ["--precision", precision]
    env = dict(os.environ)
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        env["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // ranks))
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{contender}, {ranks} rank(s) failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def check_losses(case, precision, ours, theirs, name):
    furthest = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    if not furthest <= SAME_LOSS[precision]:
        raise SystemExit(f"{case}: the losses of {name} are up to {furthest:.2g} away from Mikoshi's: not the same work")


def step_table(case, ranks, rounds, steps, precision, contenders):
    results = {name: [] for name in contenders}
    for number in range(rounds):
        order = contenders if number % 2 == 0 else contenders[::-1]
        for name in order:
            results[name].append(measure(name, case, ranks, steps, precision))
            print(f"  {case}, {ranks} rank(s), round {number + 1}, {name}: {results[name][-1]}", file=sys.stderr)
    for name in contenders:
        check_losses(case, precision, results["mikoshi"][0], results[name][0], name)
    rate = {name: statistics.median(r["tokens_per_s"] for r in runs) for name, runs in results.items()}
    peak = {name: statistics.median(r["peak_bytes"] for r in runs) for name, runs in results.items()}
    print(f"\n{case}, {precision}, {ranks} rank(s), medians of {rounds} alternating runs of {steps} steps:\n")
    print("| | tokens/s | Mikoshi's speed | peak memory a rank | " + ("MFU |" if torch.cuda.is_available() else ""))
    print("|---|---|---|---|" + ("---|" if torch.cuda.is_available() else ""))
    for name in contenders:
        ratios = [
            ours["tokens_per_s"] / theirs["tokens_per_s"]
            for ours, theirs in zip(results["mikoshi"], results[name], strict=True)
        ]
        told = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}x to {max(ratios):.2f}x)" if name != "mikoshi" else ""
        called = NAMES[name] if ranks > 1 else NAMES[name].split(", ")[0]
        row = f"| {called} | {rate[name]:,.0f} | {told} | {peak[name] / 2**20:,.0f} MiB |"
        print(row + (f" {mfu(case, rate[name] / ranks):.1%} |" if torch.cuda.is_available() else ""))


def mfu(case_name, tokens_per_s):
    from contender import CASES

    from trainer.metrics import flops_per_token, peak_flops
    from trainer.model.config import ModelConfig

    case = CASES[case_name]
    config = ModelConfig(
        vocab=case.vocab, context=case.context, layers=case.layers, width=case.width, heads=case.heads, position="learned",
        norm="layernorm", mlp="gelu_tanh", bias=True, tied=True,
    )  # fmt: skip
    peak = peak_flops(torch.device("cuda", 0), "bf16")
    return flops_per_token(config, case.context) * tokens_per_s / peak if peak else float("nan")


RUN = """
[model]
vocab = 8192
context = 256
layers = 4
width = 256
heads = 4
position = "learned"
norm = "layernorm"
mlp = "gelu_tanh"
bias = true
tied = true
[data]
source = "python-stdlib"
path = "{data}"
on_invalid = "skip"
[train]
steps = {steps}
global_batch = 8
context = 256
[eval]
batches = 1
[run]
folder = "{folder}"
"""


def prepared(folder, steps):
    (folder / "bench.toml").write_text(RUN.format(data=ROOT / "build/data/python-stdlib-bench", folder=folder, steps=steps))
    subprocess.run(mikoshi("prepare", folder / "bench.toml"), check=True, capture_output=True)
    return folder / "bench.toml"


def mikoshi(*arguments):
    return [sys.executable, "-P", "-m", "trainer.cli", *map(str, arguments)]


def startup(rounds, ranks):
    seconds, helps = [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            config = prepared(Path(name), 1)
            begun = time.time()
            command = mikoshi("train", config, "--ranks", ranks, f"run.name=r{number}")
            subprocess.run(command, check=True, capture_output=True)
            first = json.loads((Path(name) / f"r{number}" / "metrics.jsonl").read_text().splitlines()[0])
            seconds.append(first["time"] - first["step_seconds"] - begun)
        begun = time.perf_counter()
        subprocess.run(mikoshi("--help"), check=True, capture_output=True)
        helps.append(time.perf_counter() - begun)
    print(f"\nfrom the command to the first step, {ranks} rank(s): {statistics.median(seconds):.1f} s, median of {rounds}")
    print(f"mikoshi --help: {statistics.median(helps):.2f} s, median of {rounds}")


def overhead(steps):
    """The share of a step that the loop around the engine takes: data, metrics, logs, the question whether to stop."""
    from parallel.world import World, join, leave
    from trainer import loop
    from trainer.config import load_config

    inside = []

    def timed_engine(*arguments):
        engine = build(*arguments)
        step = engine.step

        def timed(*args):
            begun = time.perf_counter()
            result = step(*args)
            inside.append(time.perf_counter() - begun)
            return result

        engine.step = timed
        return engine

    build, loop.build_engine = loop.build_engine, timed_engine
    with tempfile.TemporaryDirectory() as name:
        config = load_config(prepared(Path(name), steps), ["run.name=o"])
        (Path(name) / "o" / "checkpoints").mkdir(parents=True)
        join(World(), torch.device("cpu"))
        loop.fit(config, World(), torch.device("cpu"))
        leave()
        records = [json.loads(line) for line in (Path(name) / "o" / "metrics.jsonl").read_text().splitlines()]
    whole = [r["step_seconds"] for r in records if "loss" in r]
    shares = [1 - a / b for a, b in zip(inside, whole, strict=True)][3:]
    print(f"\nthe loop's own share of a step: {statistics.median(shares):.2%}, median of {len(shares)} steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["step", "startup", "overhead"])
    parser.add_argument("--ranks", type=int, choices=[1, 2], help="of the steps; default: both")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    print(machine())
    if args.gpu:
        if not torch.cuda.is_available():
            raise SystemExit("error: torch sees no CUDA device here")
        for case in ("gpt2-124m", "gpt2-1.5b"):
            step_table(case, 1, min(args.rounds, 2), 20, "bf16", ["mikoshi", "hugging_face", "plain"])
        return
    if args.only in (None, "step"):
        for ranks in (args.ranks,) if args.ranks else (1, 2):
            contenders = ["mikoshi", "hugging_face", "plain"]
            if ranks > 1 and importlib.util.find_spec("deepspeed"):
                contenders.append("deepspeed")
            elif ranks > 1:
                print("\ndeepspeed: not installed, skipped (pip install -c constraints.txt -e '.[bench]')")
            step_table("cpu", ranks, args.rounds, 8, "fp32", contenders)
    if args.only in (None, "startup"):
        startup(min(args.rounds, 3), 2)
    if args.only in (None, "overhead"):
        overhead(23)


if __name__ == "__main__":
    main()
