import threading
import time

import pytest

from mikoshi.launch.config.cluster import LocalCluster
from mikoshi.launch.runs.logs import LogSource, choose_attempt, follow_log, job_log, last_line, read_log
from mikoshi.launch.runs.record import Attempt, Request, Started, create_run, new_spec
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import LaunchError
from runs import TINY_MODEL

REQUEST = Request(nodes=1, min_nodes=1, time=1.0)
STARTED = Started(host="h", pid=1, began=1.0, nodes=["n1"], ranks_per_node=2, time=1.0)


@pytest.fixture
def run(tmp_path):
    config = RunConfig.model_validate(
        {"run": {"name": "test", "folder": tmp_path}, "model": TINY_MODEL, "data": {"path": "x"},
         "train": {"steps": 5, "global_batch": 8, "context": 64}}
    )  # fmt: skip
    return create_run(new_spec(config, LocalCluster(kind="local"), tmp_path))


class Follower:
    """Someone who follows in a thread, until `over`."""

    def __init__(self, run, source=None, lines=None):
        self.over, self.heard, self.messages = threading.Event(), bytearray(), []
        self.thread = threading.Thread(target=self._follow, args=(run, source or LogSource(), lines), daemon=True)
        self.thread.start()

    def _follow(self, run, source, lines):
        for piece in follow_log(run, source, lines, self.over.is_set, self.messages.append):
            self.heard += piece

    def wait_for(self, text):
        deadline = time.monotonic() + 10
        while text not in bytes(self.heard) and not any(text.decode() in line for line in self.messages):
            assert time.monotonic() < deadline, (bytes(self.heard), self.messages)
            time.sleep(0.01)

    def end(self):
        self.over.set()
        self.thread.join(10)
        assert not self.thread.is_alive()
        return bytes(self.heard)


def test_the_newest_attempt_that_has_said_something_is_shown(run):
    first, second = run.add(REQUEST), run.add(REQUEST)
    first.rank_log(0).write_bytes(b"one\n")
    assert choose_attempt(run, LogSource(), None) == first
    second.rank_log(0).write_bytes(b"two\n")
    assert choose_attempt(run, LogSource(), None) == second
    assert b"".join(read_log(LogSource().file(choose_attempt(run, LogSource(), 1)), None)) == b"one\n"


def test_a_log_that_is_not_there_is_told_with_those_that_are(run):
    with pytest.raises(LaunchError, match="never handed to the cluster"):
        choose_attempt(run, LogSource(), None)
    attempt = run.add(REQUEST)
    with pytest.raises(LaunchError, match="not started yet"):
        choose_attempt(run, LogSource(), None)
    attempt.write(STARTED)
    with pytest.raises(LaunchError, match="no log at all"):
        choose_attempt(run, LogSource(), None)
    for path in (attempt.rank_log(0), attempt.rank_log(10), attempt.rank_log(2), attempt.node_log("n1"), attempt.head_log):
        path.write_bytes(b"x")
    with pytest.raises(LaunchError, match=r"rank 7 has said nothing; attempt 1 has --rank 0, 2, 10; --node n1; --head"):
        choose_attempt(run, LogSource(7), None)
    with pytest.raises(LaunchError, match="--attempt 5: the attempts are 1"):
        choose_attempt(run, LogSource(), 5)
    with pytest.raises(LaunchError, match="node n9 has said nothing in attempt 1"):
        choose_attempt(run, LogSource(node="n9"), 1)


def test_only_the_last_lines_are_read(run):
    log = run.add(REQUEST).rank_log(0)
    log.write_bytes(b"".join(b"line %d\n" % n for n in range(50_000)) + b"unfinished")
    assert b"".join(read_log(log, 2)) == b"line 49999\nunfinished"
    assert b"".join(read_log(log, 0)) == b""
    assert len(b"".join(read_log(log, None))) == log.stat().st_size


def test_following_goes_over_to_the_next_attempt_and_loses_nothing(run):
    one = run.add(REQUEST)
    one.rank_log(0).write_bytes(b"old\nstep 1\n")
    follower = Follower(run, lines=1)
    follower.wait_for(b"step 1\n")
    with one.rank_log(0).open("ab", buffering=0) as out:
        out.write(b"step 2\nhalf a li")
        follower.wait_for(b"step 2\n")
        assert b"half" not in follower.heard
        out.write(b"ne\nits last wor")
        follower.wait_for(b"half a line\n")
    two = run.add(REQUEST)
    with two.rank_log(0).open("ab", buffering=0) as out:
        out.write(b"again\n")
        follower.wait_for(b"again\n")
        out.write(b"done")
    assert follower.end() == b"step 1\nstep 2\nhalf a line\nits last wor\nagain\ndone\n"
    assert follower.messages == ["attempt 2:"]


def test_following_waits_for_a_run_that_has_not_started(run):
    follower = Follower(run, LogSource(1))
    follower.wait_for(b"waiting for rank 1 to start")
    attempt = run.add(REQUEST)
    attempt.rank_log(1).write_bytes(b"here\n")
    follower.wait_for(b"here\n")
    assert follower.end() == b"here\n"


def test_what_is_said_just_before_the_end_is_still_read(run):
    attempt = run.add(REQUEST)
    attempt.rank_log(0).write_bytes(b"a\n")
    follower = Follower(run)
    follower.wait_for(b"a\n")
    with attempt.rank_log(0).open("ab") as out:
        out.write(b"b\n")
    assert follower.end() == b"a\nb\n"


@pytest.mark.parametrize("how", ["cut", "replaced"])
def test_a_log_that_is_cut_or_replaced_is_read_from_its_beginning(run, how):
    log = run.add(REQUEST).rank_log(0)
    log.write_bytes(b"a long line of the old file\n")
    follower = Follower(run)
    follower.wait_for(b"old file\n")
    if how == "cut":
        log.write_bytes(b"new\n")
    else:
        other = log.with_name("other")
        other.write_bytes(b"new, and as long as one likes: longer than before\n")
        other.rename(log)
    follower.wait_for(b"new")
    follower.end()
    assert any(how in line for line in follower.messages)


def test_a_run_that_ended_without_a_word_ends_the_following(run):
    run.add(REQUEST)
    assert Follower(run).end() == b""


def test_for_a_head_that_never_spoke_its_job_is_shown(run):
    attempt = run.add(REQUEST)
    attempt.write_job({"id": "12_3"})
    head = LogSource(head=True)
    with pytest.raises(LaunchError, match="not started yet"):
        choose_attempt(run, head, None)
    with pytest.raises(LaunchError, match="the head has said nothing; attempt 1 has no log at all"):
        choose_attempt(run, head, None, lambda: True)
    (run.folder.path / "slurm-9.out").write_bytes(b"older\n")
    assert last_line(attempt) == "older"
    (run.folder.path / "slurm-12_3.out").write_bytes(b"no such python\n")
    assert b"".join(read_log(head.existing_file(choose_attempt(run, head, None)), None)) == b"no such python\n"
    with pytest.raises(LaunchError, match="rank 0 has said nothing; attempt 1 has --head"):
        choose_attempt(run, LogSource(), None, lambda: True)
    assert Follower(run, head).end() == b"no such python\n"
    attempt.head_log.write_bytes(b"here\n")
    assert last_line(attempt) == "here"


def test_the_jobs_of_an_array_speak_in_the_folder_of_its_sweep(tmp_path):
    folder = tmp_path / "name-002" / "attempts" / "1"
    folder.mkdir(parents=True)
    (tmp_path / ".sweep-abc").mkdir()
    (tmp_path / ".sweep-abc" / "slurm-5_2.out").write_text("x")
    attempt = Attempt(folder)
    attempt.write_job({"id": "5_2"})
    assert job_log(attempt) == tmp_path / ".sweep-abc" / "slurm-5_2.out"
