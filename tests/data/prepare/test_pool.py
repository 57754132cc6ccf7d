"""Jobs on other processes: every result once, failures in order and in full, nobody left behind."""

import signal
import subprocess
import sys

import psutil
import pytest

from mikoshi.data.errors import DataError
from mikoshi.data.prepare.pool import run_jobs

TASKS = """
import os, time

def double(context, job, tell):
    tell(job)
    return context + 2 * job

def fail(context, job, tell):
    if job == 3:
        raise ZeroDivisionError("three")
    if job == 5:
        time.sleep(1000)
    return job

def refuse(context, job, tell):
    if job >= 4:
        raise OSError(28, "No space left on device", "a/file")
    return job

def vanish(context, job, tell):
    os._exit(7)

def never_end(context, job, tell):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece: another worker writes to the same pipe
    time.sleep(1000)
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    (tmp_path / "tasks_of_a_test.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    import tasks_of_a_test

    yield tasks_of_a_test
    del sys.modules["tasks_of_a_test"]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_gives_its_result_once(tasks, workers):
    told = []
    results = list(run_jobs(tasks.double, 100, list(range(40)), workers, lambda number, what: told.append((number, what))))
    assert sorted(results) == [(n, 100 + 2 * n) for n in range(40)]
    assert sorted(told) == [(n, n) for n in range(40)]
    assert list(run_jobs(tasks.double, 100, [], workers)) == []


def test_a_fault_comes_with_the_workers_traceback_and_nobody_is_waited_for_that_comes_later(tasks):
    with pytest.raises(RuntimeError, match=r"failed at 3:\nTraceback(.|\n)*tasks_of_a_test\.py(.|\n)*ZeroDivisionError: three"):
        list(run_jobs(tasks.fail, None, [3, 5, 0], 2))  # 5 never ends


def test_errors_of_the_disk_arrive_as_they_were(tasks):
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(run_jobs(tasks.refuse, None, list(range(9)), 2))
    assert (caught.value.errno, caught.value.filename) == (28, "a/file")


def test_a_worker_that_dies(tasks):
    with pytest.raises(DataError, match=r"the worker process at \w+ died \(exit code 7"):
        list(run_jobs(tasks.vanish, None, ["here", "there"], 2))
    assert not [
        child for child in psutil.Process().children(recursive=True) if "data.prepare.pool" in " ".join(child.cmdline())
    ]


@pytest.mark.usefixtures("tasks")
def test_workers_end_with_their_parent_also_in_the_middle_of_a_job(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import tasks_of_a_test as tasks
from mikoshi.data.prepare.pool import run_jobs
list(run_jobs(tasks.never_end, None, [1, 2], 2))
"""
    parent = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        parent.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(workers, timeout=20)[1] == []
    finally:
        parent.kill()
        parent.communicate()
