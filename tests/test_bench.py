"""Nothing of ours waits for ever at its end: contenders of the benchmark, ranks, users' scripts; one that is late is named."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENDLESS = """
import sys, threading, time
def work():
    print("told")
    threading.Thread(target=time.sleep, args=(600,)).start()  # an interpreter waits for it at its end
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import run

    yield run
    del sys.modules["run"]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("import contender; contender.main = work; contender.run()", 0),
        ("import contender; contender.main = lambda: [work(), 1 / 0]; contender.run()", 1),
        ("from mikoshi.launch.cli import main as cli; from mikoshi.parallel.process import process_group\n"
         "process_group._joined = True; cli.main = lambda: [work(), sys.exit(75)]; cli.command()", 75),
        ("from mikoshi.trainer.interop.accelerate.prepare import finish; work(); finish(3)", 3),
    ],
)  # fmt: skip
def test_a_process_that_was_a_rank_ends_whatever_its_threads_do(end, code):
    program = f"{ENDLESS}\nsys.path.insert(0, {str(ROOT / 'tests' / 'bench')!r})\n{end}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "told\n"), done.stderr


def contender(folder, text):
    (folder / "contender.py").write_text(
        "import sys, time\nfrom datetime import timedelta\nfrom torch.distributed import TCPStore\n"
        "store = TCPStore('127.0.0.1', int(sys.argv[sys.argv.index('--turns') + 1]), is_master=False, wait_for_workers=False)\n"
        "print('{\"seconds\": []}', flush=True)\n" + text
    )


def test_a_race_names_who_is_late_with_a_step(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    contender(tmp_path, "time.sleep(600)")
    with pytest.raises(SystemExit, match=r"plain: rank 0: late: step 0 took over 0\.2 s"):
        bench.race(["plain"], "cpu", 1, 1, "fp32", limit=0.2)


def test_a_race_names_who_does_not_end(bench):
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    with pytest.raises(SystemExit, match="plain: late: it does not end after its last step"):
        bench.code_of("plain", process, 0.0)
    bench.end(process)
    assert process.returncode < 0


def test_a_race_that_ends_has_what_was_told(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    contender(tmp_path, "for n in range(3): store.set(f'plain/{n}/0', '')")
    assert bench.race(["plain"], "cpu", 1, 1, "fp32") == {"plain": {"seconds": []}}
