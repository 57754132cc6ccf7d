"""How long `mikoshi runs` takes over 1,000 runs with long logs: python -P tests/bench/board.py"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mikoshi.launch.config.cluster import LocalCluster
from mikoshi.launch.runs.record import Attempt, Request, Result, Started, Status, create_run, new_spec
from mikoshi.trainer.config.run import RunConfig

ROUNDS = 5


def make_runs(folder: Path, count: int, steps: int = 2000) -> None:
    """Runs as they lie in a folder after some weeks: every tenth one claims to run, the rest have ended."""
    model = {"vocab": 384, "context": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48}
    metrics = "".join(
        json.dumps({"step": n + 1, "time": 1e9 + n, "loss": 4.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 512, "applied": True,
                    "step_seconds": 0.1, "data_seconds": 0.01, "tokens_per_second": 5120.0, "memory_bytes": 10**8}) + "\n"
        for n in range(steps)
    )  # fmt: skip
    events = "".join(json.dumps({"time": 1e9 + n, "event": "save", "step": n, "path": "x"}) + "\n" for n in range(0, steps, 10))
    for number in range(count):
        config = RunConfig.model_validate(
            {"run": {"name": f"run-{number:04d}", "folder": folder}, "model": model, "data": {"path": "x"},
             "train": {"steps": steps, "global_batch": 8, "context": 64}}
        )  # fmt: skip
        run = create_run(new_spec(config, LocalCluster(kind="local"), folder))
        (run.folder.path / "metrics.jsonl").write_text(metrics)
        (run.folder.path / "events.jsonl").write_text(events)
        attempt = run.add(Request(nodes=1, min_nodes=1, time=1e9))
        attempt.write_job({"kind": "local", "host": socket.gethostname(), "pid": str(os.getpid()), "began": "1.0"})
        _write(attempt, done=number % 10 != 0)


def _write(attempt: Attempt, done: bool) -> None:
    now = time.time()
    attempt.write(Started(host="here", pid=1, began=1.0, nodes=["here"], ranks_per_node=1, time=now))
    attempt.write(Status(time=now, phase="running", nodes=["here"]))
    if done:
        attempt.write(Result(state="done", code=0, why="", time=now))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        make_runs(Path(name), count)
        command = [sys.executable, "-P", "-m", "mikoshi", "runs", "--folder", name]
        taken = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            taken.append(time.perf_counter() - begin)
        assert len(told.splitlines()) == count + 1
    taken.sort()
    middle, told = taken[len(taken) // 2], f"from {taken[0]:.2f} to {taken[-1]:.2f} s, the process's start included"
    print(f"mikoshi runs over {count} runs: {middle:.2f} s, {told}")


if __name__ == "__main__":
    main()
