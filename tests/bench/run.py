"""The benchmark: our step beside others' on the same work, alternating, medians; then start-up and the loop's overhead.

    python tests/bench/run.py [--gpu] [--rounds N] [--only step|startup|overhead]

Prints Markdown tables with the device, the versions and the commit. Every contender is a fresh process each time.
"""

import argparse
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
NAMES = {"mikoshi": "Mikoshi", "hugging_face": "Hugging Face + accelerate", "plain": "plain PyTorch loop"}


def machine():
    import accelerate
    import transformers

    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    else:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        device = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    commit = ""
    if shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = asked.stdout.strip()
    return (
        f"{device}; Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}; commit {commit or 'unknown'}"
    )


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


def step_table(case, ranks, rounds, steps, precision, contenders):
    results = {name: [] for name in contenders}
    for number in range(rounds):
        order = contenders if number % 2 == 0 else contenders[::-1]
        for name in order:
            results[name].append(measure(name, case, ranks, steps, precision))
            print(f"  {case}, {ranks} rank(s), round {number + 1}, {name}: {results[name][-1]}", file=sys.stderr)
    rate = {name: statistics.median(r["tokens_per_s"] for r in runs) for name, runs in results.items()}
    peak = {name: statistics.median(r["peak_bytes"] for r in runs) for name, runs in results.items()}
    print(f"\n{case}, {precision}, {ranks} rank(s), medians of {rounds} alternating runs of {steps} steps:\n")
    print("| | tokens/s | Mikoshi's speed | peak memory | " + ("MFU |" if torch.cuda.is_available() else ""))
    print("|---|---|---|---|" + ("---|" if torch.cuda.is_available() else ""))
    for name in contenders:
        ratio = statistics.median(
            ours["tokens_per_s"] / theirs["tokens_per_s"]
            for ours, theirs in zip(results["mikoshi"], results[name], strict=True)
        )
        told = "" if name == "mikoshi" else f"{ratio:.2f}x"
        row = f"| {NAMES[name]} | {rate[name]:,.0f} | {told} | {peak[name] / 2**20:,.0f} MiB |"
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
        for ranks in (1, 2):
            step_table("cpu", ranks, args.rounds, 8, "fp32", ["mikoshi", "hugging_face", "plain"])
    if args.only in (None, "startup"):
        startup(min(args.rounds, 3), 2)
    if args.only in (None, "overhead"):
        overhead(23)


if __name__ == "__main__":
    main()
