"""The benchmark: our step beside others' on the same work, alternating, medians; then start-up and the loop's overhead.

    python tests/bench/run.py [--gpu] [--rounds N] [--only step|engines|startup|overhead] [--ranks 1|2]

Prints Markdown tables with the device, the versions and the commit. Every contender is a fresh process each time, with
the same number of threads a rank. On CPU they wait side by side and take one step each in turn, so that whatever else
the machine does meets all of them; a ratio is that of two steps of the same turn. Contenders whose losses are not the
same are refused: they would not do the same work.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed import TCPStore

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = {
    "mikoshi": "Mikoshi, ZeRO-2", "hugging_face": "Hugging Face + accelerate", "plain": "plain PyTorch loop, DDP",
    "deepspeed": "DeepSpeed ZeRO-2",
}  # fmt: skip
SKIP = 2  # steps to warm up
LIMIT = 600.0  # seconds
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


def start(contender, case, ranks, steps, precision, store, folder):
    command = [sys.executable, str(HERE / "contender.py"), contender, "--case", case, "--steps", str(steps)]
    command += ["--skip", str(SKIP), "--precision", precision, "--turns", str(store.port)]
    env = dict(os.environ)
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        env["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // ranks))
    with (folder / f"{contender}.out").open("w") as out, (folder / f"{contender}.err").open("w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)


def race(contenders, case, ranks, steps, precision, limit=LIMIT):
    """What each contender says of itself, by name. All have taken a step before any takes the next. One that takes `limit`
    seconds for a step, its first with all that it imports, or for its end, is named, and the race is over."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as name:
        folder, running, results = Path(name), {}, {}
        try:
            for contender in contenders:
                running[contender] = start(contender, case, ranks, steps, precision, store, folder)
            for number in range(SKIP + steps):
                for contender in contenders if number % 2 == 0 else contenders[::-1]:
                    store.set(f"{contender}/{number}", "")
                    done = [f"{contender}/{number}/{rank}" for rank in range(ranks)]
                    until = time.monotonic() + limit
                    while not store.check(done) and running[contender].poll() is None:
                        if time.monotonic() > until:
                            late = [str(rank) for rank, key in enumerate(done) if not store.check([key])]
                            raise SystemExit(f"{contender}: rank {', '.join(late)}: late: step {number} took over {limit:g} s")
                        time.sleep(0.002)
            until = time.monotonic() + limit
            for contender, process in running.items():
                if code_of(contender, process, until):
                    error = (folder / f"{contender}.err").read_text()[-3000:]
                    raise SystemExit(f"{contender}, {ranks} rank(s) failed:\n{error}")
                lines = (folder / f"{contender}.out").read_text().splitlines()
                results[contender] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
        finally:
            for process in running.values():
                end(process)
    return results


def code_of(contender, process, until):
    """The exit code of a contender that has taken its last step."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{contender}: late: it does not end after its last step") from None


def end(process):
    """End a contender with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_losses(case, precision, ours, theirs, name):
    furthest = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    if not furthest <= SAME_LOSS[precision]:
        raise SystemExit(f"{case}: the losses of {name} are up to {furthest:.2g} away from Mikoshi's: not the same work")


def step_table(case, ranks, rounds, steps, precision, contenders):
    results = {name: [] for name in contenders}
    for number in range(rounds):
        together = [[name] for name in contenders] if torch.cuda.is_available() else [contenders]  # a GPU may not hold all
        for group in together:
            for name, result in race(group, case, ranks, steps, precision).items():
                results[name].append(result)
                shown = f"{statistics.median(result['seconds']):.3f} s, {result['peak_bytes'] / 2**20:,.0f} MiB"
                print(f"  {case}, {ranks} rank(s), round {number + 1}, {name}: {shown}", file=sys.stderr)
    for name in contenders:
        check_losses(case, precision, results["mikoshi"][0], results[name][0], name)
    seconds = {name: [s for result in runs for s in result["seconds"]] for name, runs in results.items()}
    peak = {name: statistics.median(r["peak_bytes"] for r in runs) for name, runs in results.items()}
    tokens = results["mikoshi"][0]["tokens"]
    print(f"\n{case}, {precision}, {ranks} rank(s), medians of {rounds} x {steps} steps; in brackets, half of the ratios:\n")
    print("| | tokens/s | Mikoshi's speed | peak memory a rank | " + ("MFU |" if torch.cuda.is_available() else ""))
    print("|---|---|---|---|" + ("---|" if torch.cuda.is_available() else ""))
    for name in contenders:
        rate = tokens / statistics.median(seconds[name])
        low, middle, high = statistics.quantiles(a / b for a, b in zip(seconds[name], seconds["mikoshi"], strict=True))
        told = f"{middle:.2f}x ({low:.2f}x to {high:.2f}x)" if name != "mikoshi" else ""
        called = NAMES[name] if ranks > 1 else NAMES[name].split(", ")[0]
        row = f"| {called} | {rate:,.0f} | {told} | {peak[name] / 2**20:,.0f} MiB |"
        print(row + (f" {mfu(case, rate / ranks):.1%} |" if torch.cuda.is_available() else ""))


def mfu(case_name, tokens_per_s):
    from contender import CASES

    from mikoshi.trainer.model.config import ModelConfig
    from mikoshi.trainer.record.metrics import flops_per_token, peak_flops

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


ENGINES = """
base = "{base}"
[engine]
precision = "bf16"
[data]
source = "python-stdlib"
path = "{data}"
tokenizer_vocab = 8192
on_invalid = "skip"
[train]
steps = 1000
global_batch = 16
context = 1024
[run]
folder = "{folder}"
"""


def engines_table(rounds, ranks, gpu):
    """`mikoshi compare` of the engines, each with its own defaults: on a GPU with GPT-2 124M in bf16."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if gpu:
            base, data = ROOT / "configs/models/gpt2-124m.toml", ROOT / "build/data/python-stdlib-bench"
            config = folder / "engines.toml"
            config.write_text(ENGINES.format(base=base, data=data, folder=folder))
            subprocess.run(mikoshi("prepare", config), check=True, capture_output=True)
        else:
            config = prepared(folder, 1000)
        command = mikoshi("compare", config, "--engines", "native,deepspeed,megatron", "--rounds", rounds)
        done = subprocess.run([*command, "--ranks", str(ranks), "--out", str(folder / "out"), "--json"], stdout=subprocess.PIPE)
        told = folder / "out" / "compare.md"
        if not told.exists():
            raise SystemExit(f"mikoshi compare ended with exit code {done.returncode}")
        print(f"\nengines, {'gpt2-124m, bf16' if gpu else 'cpu, fp32'}, {ranks} rank(s):\n\n{told.read_text()}")


def mikoshi(*arguments):
    return [sys.executable, "-P", "-m", "mikoshi", *map(str, arguments)]


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
    from mikoshi.parallel.process.process_group import World, join, leave
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.train import loop

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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["step", "engines", "startup", "overhead"])
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
        if args.only in (None, "step"):
            for case in ("gpt2-124m", "gpt2-1.5b"):
                step_table(case, 1, min(args.rounds, 2), 20, "bf16", ["mikoshi", "hugging_face", "plain"])
        if args.only in (None, "engines"):
            engines_table(args.rounds, 1, gpu=True)
        return
    if args.only in (None, "step"):
        for ranks in (args.ranks,) if args.ranks else (1, 2):
            contenders = ["mikoshi", "hugging_face", "plain"]
            if ranks > 1 and importlib.util.find_spec("deepspeed"):
                contenders.append("deepspeed")
            elif ranks > 1:
                print("\ndeepspeed: not installed, skipped (pip install -c constraints.txt -e '.[deepspeed]')")
            step_table("cpu", ranks, args.rounds, 16, "fp32", contenders)
    if args.only in (None, "engines"):
        engines_table(args.rounds, args.ranks or 2, gpu=False)
    if args.only in (None, "startup"):
        startup(min(args.rounds, 3), 2)
    if args.only in (None, "overhead"):
        overhead(23)


if __name__ == "__main__":
    main()
