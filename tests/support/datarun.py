"""Runs of the real command on data of several kinds: their files, their configs, and what such a run has consumed."""

import contextlib
import email
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mikoshi.launch.cli import main as cli
from mikoshi.trainer.checkpoint.verify import read_manifest, steps_in
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import VOCAB, run_config


def paragraphs(package=email, least=40):
    """Real text in pieces: what stands between blank lines in the modules of a package."""
    texts = []
    for path in sorted(Path(package.__file__).parent.glob("*.py")):
        texts += [part for part in path.read_text().split("\n\n") if len(part) >= least]
    return texts


def write_jsonl(path, texts, key="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))


def write_sources(root):
    """Three sources of some 50 kB each: JSON lines, Parquet and a folder of text files."""
    import logging

    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = paragraphs()
    third = len(texts) // 2
    for n in range(4):
        write_jsonl(root / "web" / f"{n}.jsonl", texts[:third][n::4], "body")
    (root / "books").mkdir()
    table = pa.Table.from_pylist([{"text": text, "n": n} for n, text in enumerate(texts[third:])])
    pq.write_table(table, root / "books" / "b.parquet", row_group_size=40)
    (root / "code").mkdir()
    for path in sorted([*Path(json.__file__).parent.glob("*.py"), *Path(logging.__file__).parent.glob("*.py")]):
        (root / "code" / f"{path.parent.name}_{path.name}.txt").write_text(path.read_text())
    return root


def mixture(root, **more):
    """The three sources under `root`, with weights that change twice and one that is read little more than once."""
    named = {
        "web": {"source": f"{root}/web/*.jsonl", "text_column": "body", "weight": 5.0},
        "books": {"source": f"{root}/books/b.parquet", "weight": 3.0, "schedule": [[64 * 8 * 10, 1.0]]},
        "code": {"source": f"{root}/code", "weight": 1.0, "schedule": [[64 * 8 * 10, 4.0], [64 * 8 * 20, 2.0]]},
    }
    return {name: {**values, **more.get(name, {})} for name, values in named.items()}


def noisy_sources(root, first, stop, rows=64 * 8):
    """Writes the three sources and one of noise, which alone gives the batches of steps first..stop-1 (1 is the first), each
    of so many tokens; the mixture of them all."""
    rng = random.Random(5)
    letters = [chr(c) for c in range(0x4E00, 0x4E00 + 400)]
    write_sources(root)
    write_jsonl(root / "noise" / "n.jsonl", ["".join(rng.choices(letters, k=400)) for _ in range(200)])
    sources = mixture(root, web={"schedule": []}, books={"schedule": []}, code={"schedule": []})
    schedule = [[(first - 1) * rows, 999.0], [(stop - 1) * rows, 0.0]]
    return sources | {"noise": {"source": f"{root}/noise/*.jsonl", "weight": 0.0, "schedule": schedule}}


def write_run(folder, data_path, steps=40, **sections):
    """A run's TOML, at a rate at which training amplifies no rounding."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "train": {"steps": steps, "global_batch": 8, "context": 64}, "optim": {"lr": 1e-3}, "log": {"tensorboard": False},
        "eval": {"batches": 1}, "checkpoint": {"every": 10, "keep": 99},
    }  # fmt: skip
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    plain["data"] = {"tokenizer_vocab": VOCAB, "held_out": 0.1, **plain.get("data", {})}
    (folder / "run.toml").write_text(to_toml(run_config(data_path, folder / "runs", **plain)))
    return folder / "run.toml"


def command(config_file, verb, *overrides, ranks=1, env=None):
    arguments = [*verb.split(), str(config_file), *map(str, overrides), *(["--ranks", str(ranks)] if verb == "train" else [])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "mikoshi", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=config_file.parent, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip


def finish(process, code=0):
    out, _ = process.communicate(timeout=180)
    assert process.returncode == code, out
    assert "Traceback" not in out, out
    return out


def run(config_file, verb, *overrides, code=0, **how):
    """Call the command as processes of its own; returns what it printed."""
    return finish(command(config_file, verb, *overrides, **how), code)


def inside(config_file, verb, *overrides, code=0):
    """Call the command in this process, as one rank, which spares the time that importing torch takes."""
    told, ended, arguments = io.StringIO(), 0, sys.argv
    with contextlib.chdir(config_file.parent), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        sys.argv = [
            "mikoshi",
            *verb.split(),
            str(config_file),
            *map(str, overrides),
            *(["--ranks=1", "recovery.restarts=0"] if verb == "train" else []),
        ]
        try:
            cli.main()
        except SystemExit as end:
            ended = end.code or 0
        finally:
            sys.argv = arguments
    assert ended == code, told.getvalue()
    return told.getvalue()


def folder_of(config_file, name):
    return config_file.parent / "runs" / name


def records(config_file, name):
    return [r for r in read_jsonl(folder_of(config_file, name) / "metrics.jsonl") if "loss" in r]


def events(config_file, name, kind):
    return [e for e in read_jsonl(folder_of(config_file, name) / "events.jsonl") if e["event"] == kind]


def consumed(config_file, name):
    """What the checkpoints' records say of the data, by step: digests of samples and tokens, or where lanes stand."""
    told = {}
    for path in steps_in(folder_of(config_file, name) / "checkpoints"):
        record = read_manifest(path).record
        state = record["data"]["state"]
        told[record["step"]] = {key: state[key] for key in ("digest", "content", "lanes") if key in state}
    return told


def wait_for_step(process, config_file, name, step):
    deadline = time.monotonic() + 120
    while not any(r["step"] >= step for r in records(config_file, name)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stop_at(process, config_file, name, step):
    wait_for_step(process, config_file, name, step)
    process.send_signal(signal.SIGTERM)
    return finish(process, code=75)


def kill_at(process, config_file, name, step):
    """The launcher is killed, and with it goes every rank."""
    import psutil

    wait_for_step(process, config_file, name, step)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.wait(30)


def assert_same_run(config_file, name, expected_name):
    """Every step is there once with the same loss to rounding, and the same samples and tokens were consumed."""
    found, expected = records(config_file, name), records(config_file, expected_name)
    assert [r["step"] for r in found] == [r["step"] for r in expected] == list(range(1, len(expected) + 1))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["tokens"] == theirs["tokens"], ours["step"]
        for key in ("loss", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
    told, right = consumed(config_file, name), consumed(config_file, expected_name)
    assert max(told) == max(right) == len(expected)
    for step in set(told) & set(right):
        assert told[step] == right[step], step
