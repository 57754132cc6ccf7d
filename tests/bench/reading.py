"""The data benchmark: our loader beside others' on the same corpus, alternating, medians.

    python tests/bench/reading.py [--rounds N] [--tokens N] [--seconds S] [--only NAME ...] [--contexts N ...]

Prints Markdown tables with the machine, the versions and the commit: tokens per CPU-second (all threads of one process)
of batches of 8 random rows, mixed of two sources and shuffled, with document masks and as they come; then the time to
the first batch, to the first batch after --depth samples, and whether that is the one that an uninterrupted run comes
to. Every contender is a fresh process each time, in an environment of its own, which is made on first use; one that
cannot be installed is told with the reason. Times leave out interpreter and imports.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCRIPTS = HERE / "data_contenders"
TORCH = "torch==2.13.0"
DEEP = 10**9


@dataclass(frozen=True)
class Contender:
    title: str
    requirements: tuple[str, ...] = ()
    package: str = ""


CONTENDERS = {
    "ours": Contender("Mikoshi"),
    "litdata": Contender("litdata", (TORCH, "litdata==0.2.76"), "litdata"),
    "megatron": Contender("megatron-core GPTDataset", (TORCH, "megatron-core"), "megatron-core"),
    "datasets": Contender("`datasets`, streaming", ("datasets==5.2.0",), "datasets"),
    "mosaic": Contender("mosaicml-streaming", (TORCH, "mosaicml-streaming==0.13.0"), "mosaicml-streaming"),
}


class Failed(Exception):
    """A contender could not be installed or run; the message is the last line that says why."""


def call(command, **options):
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if ran.returncode:
        lines = [line.strip() for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
        raise Failed(lines[-1][:300] if lines else f"exit status {ran.returncode}")
    return ran.stdout


@dataclass(frozen=True)
class Ready:
    """An installed contender. `version` as pip says it."""

    name: str
    python: Path
    version: str

    def run(self, what, folder, context, **options):
        command = [self.python, SCRIPTS / f"read_{self.name}.py", what, "--folder", folder, "--context", context]
        for key, value in options.items():
            command += [f"--{key}"] if value is True else [f"--{key}", value] if value is not False else []
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(ROOT)} if self.name == "ours" else {})
        out = call(command, env=env)
        return json.loads(out.splitlines()[-1]) if what != "convert" else None


def install(name, args):
    """The contender's environment, made if it is not there. Raises Failed."""
    contender = CONTENDERS[name]
    if not contender.requirements:
        return Ready(name, Path(sys.executable), "")
    folder = args.environments / name
    mark, python = folder / ".ready", folder / "bin" / "python"
    if not mark.exists() or mark.read_text() != repr(contender.requirements):
        print(f"  installing {', '.join(contender.requirements)} in {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        call([args.python, "-m", "venv", folder])
        pip = [python, "-m", "pip", "install", "--quiet", *args.pip_args.split()]
        for number in range(len(contender.requirements)):  # torch first: what comes after must be content with it
            call([*pip, *contender.requirements[: number + 1]])
        mark.write_text(repr(contender.requirements))
    ask = f"from importlib.metadata import version; print(version({contender.package!r}))"
    return Ready(name, python, call([python, "-c", ask]).strip())


def make_corpus(args):
    folder = args.data / f"corpus-{args.tokens}"
    if not folder.exists():
        sys.path.insert(0, str(SCRIPTS))
        from frame import make_corpus

        part = folder.with_name(folder.name + ".partial")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make_corpus(part, args.tokens)
        part.rename(folder)
    return folder


def convert(ready, corpus, context, args):
    """The corpus in the contender's format; ours is always made anew. Raises Failed."""
    scripts = b"".join((SCRIPTS / f"{name}.py").read_bytes() for name in ("frame", f"read_{ready.name}"))
    key = hashlib.sha256(scripts + f"{ready.version} {args.depth}".encode()).hexdigest()[:12]
    folder = args.data / f"{ready.name}-{args.tokens}-{context}-{key}"
    mark = folder / ".ready"
    if ready.name == "ours" or not mark.exists():
        for old in args.data.glob(f"{ready.name}-{args.tokens}-{context}-*"):
            shutil.rmtree(old)
        folder.mkdir()
        print(f"  {ready.name}: converting for {context}", file=sys.stderr)
        ready.run("convert", folder, context, corpus=corpus, depth=args.depth)
        mark.touch()
    return folder


def race(runners, folders, context, masks, args):
    """Tokens per CPU-second and per second of every round, by name; a contender that fails is out, with its reason."""
    rates, walls, failures = {name: [] for name in runners}, {name: [] for name in runners}, {}
    for number in range(args.rounds):
        for name in list(runners) if number % 2 == 0 else list(runners)[::-1]:
            if name in failures:
                continue
            try:
                told = runners[name].run("read", folders[name], context, masks=masks, seconds=args.seconds)
            except Failed as failure:
                failures[name] = str(failure)
                continue
            rates[name].append(told["tokens"] / told["cpu_seconds"])
            walls[name].append(told["tokens"] / told["seconds"])
            print(f"  {context}, round {number + 1}, {name}: {rates[name][-1] / 1e6:.1f} M", file=sys.stderr)
    return rates, walls, failures


def print_race(rates, walls, failures, context, masks, args):
    what = "with document masks" if masks else "without document masks, rows as they come"
    print(f"\n{context} tokens a row, {what}, medians of {args.rounds} rounds of {args.seconds:g} CPU-seconds:\n")
    print("| | tokens per CPU-second | Mikoshi's speed | tokens/s |\n|---|---|---|---|")
    ours = rates.get("ours", [])
    order = sorted((name for name in rates if name not in failures), key=lambda name: -statistics.median(rates[name]))
    for name in order:
        ratios = [a / b for a, b in zip(ours, rates[name], strict=False)]
        told = (
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}x to {max(ratios):.2f}x)" if name != "ours" and ratios else ""
        )
        rate, wall = statistics.median(rates[name]) / 1e6, statistics.median(walls[name]) / 1e6
        print(f"| {CONTENDERS[name].title} | {rate:.1f} M | {told} | {wall:.1f} M |")
    best = next((name for name in order if name != "ours"), None)
    if best and ours and "ours" not in failures:
        ratio = statistics.median(a / b for a, b in zip(ours, rates[best], strict=False))
        print(f"\nagainst the best of the others, {CONTENDERS[best].title}: {ratio:.2f}x")
    for name, reason in failures.items():
        print(f"\n{CONTENDERS[name].title}: not measured: {reason}")


def print_resume(runners, folders, context, args):
    rounds = range(min(args.rounds, 3))
    print(f"\nresuming, {context} tokens a row, document masks, medians of {len(rounds)}:\n")
    print(f"| | first batch | first batch after {args.depth:,} samples | the very rows that an uninterrupted run reads |")
    print("|---|---|---|---|")
    for name, ready in runners.items():
        try:
            options = {"masks": True, "depth": args.depth}
            fresh = [ready.run("resume", folders[name], context, masks=True) for _ in rounds]
            later = [ready.run("resume", folders[name], context, **options) for _ in rounds]
            through = ready.run("through", folders[name], context, **options)
        except Failed as failure:
            print(f"| {CONTENDERS[name].title} | not measured: {failure} | | |")
            continue
        same = "yes" if all(one["rows"] == through["rows"] for one in later) else "no"
        begin, then = (statistics.median(one["seconds"] for one in many) for many in (fresh, later))
        print(f"| {CONTENDERS[name].title} | {begin:.3f} s | {then:.3f} s | {same} |")
    if "ours" in runners:
        for depth in (10**3, 10**6, DEEP):
            runs = [
                runners["ours"].run("resume", folders["ours"], context, masks=True, depth=depth) for _ in range(args.rounds)
            ]
            told = statistics.median(run["seconds"] for run in runs)
            print(f"\nMikoshi, first batch after {depth:,} samples: {told:.3f} s")


def machine():
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = ""
    if shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = asked.stdout.strip()
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores; commit {commit or 'unknown'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=160_000_000, help="of the corpus")
    parser.add_argument("--seconds", type=float, default=2.0, help="of CPU a contender and round")
    parser.add_argument("--depth", type=int, default=20_000, help="samples after which others resume; a multiple of 8")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--python", default=sys.executable, help="for the environments; megatron-core past 0.16.1 wants 3.12")
    parser.add_argument("--pip-args", default="", help="such as an index to take a CPU build of torch from")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "bench-envs")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "bench-data")
    args = parser.parse_args()
    corpus, runners, missing = make_corpus(args), {}, {}
    for name in args.only:
        try:
            runners[name] = install(name, args)
        except Failed as failure:
            missing[name] = str(failure)
    versions = ", ".join(f"{ready.name} {ready.version}" for ready in runners.values() if ready.version)
    asked = subprocess.run([args.python, "--version"], capture_output=True, text=True).stdout.strip()
    print(f"{machine()}; {asked}, {versions}; {args.tokens / 1e6:,.0f} M tokens of two sources, documents of 600 on average")
    for name, reason in missing.items():
        print(f"\n{CONTENDERS[name].title}: cannot be installed here: {reason}")
    for context in args.contexts:
        folders, able = {}, {}
        for name, ready in runners.items():
            try:
                folders[name] = convert(ready, corpus, context, args)
                able[name] = ready
            except Failed as failure:
                print(f"\n{CONTENDERS[name].title}: cannot convert the corpus: {failure}")
        for masks in (True, False):
            print_race(*race(able, folders, context, masks, args), context, masks, args)
        if context == args.contexts[0]:
            print_resume(able, folders, context, args)


if __name__ == "__main__":
    main()
