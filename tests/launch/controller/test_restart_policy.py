"""What follows from a fault: restarts by cause, pauses, and where a bug is told from a fault."""

import pytest

from mikoshi.launch.controller.restart_policy import Fault, FaultStreak, decide, pause_before
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.exit_codes import FAULT, HANG, USER_ERROR

POLICY = RecoverySection(restarts=3, backoff=2.0)


def fault(cause="killed", step=7, error="", rank=1, refused=False):
    return Fault(cause, rank, step, "forward", "was killed (SIGKILL)", error, refused)


def judged(*faults, policy=POLICY):
    """The verdict on each of (fault, whether a checkpoint was saved since the one before)."""
    streak, verdicts = FaultStreak(), []
    for one, saved in faults:
        streak, verdict = decide(streak, one, saved, policy)
        verdicts.append(verdict)
    return verdicts


def test_the_first_restart_is_at_once_then_pauses_double_up_to_a_minute():
    assert [pause_before(n, 1.0) for n in range(1, 10)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert pause_before(10_000, 1.0) == 60
    assert [pause_before(n, 0.0) for n in (1, 2, 50)] == [0, 0, 0]


def test_restarts_are_used_up_without_progress():
    verdicts = judged(*[(fault(step=n), False) for n in range(4)])
    assert [v.restart for v in verdicts] == [True, True, True, False]
    assert [(v.number, v.pause) for v in verdicts[:3]] == [(1, 0), (2, 2), (3, 4)]
    assert verdicts[3].code == FAULT
    assert "recovery.restarts = 3" in verdicts[3].why


def test_each_cause_has_its_own_limit_and_all_share_the_pause():
    causes = ["killed", "hang", "lost", "diverged", "killed", "hang"]
    verdicts = judged(*[(fault(cause), False) for cause in causes])
    assert [v.number for v in verdicts] == [1, 1, 1, 1, 2, 2]
    assert [v.pause for v in verdicts] == [0, 2, 4, 8, 16, 32]


def test_a_checkpoint_saved_is_progress_and_the_count_begins_anew():
    verdicts = judged(*[(fault(step=n), n % 2 == 0) for n in range(12)])
    assert all(v.restart for v in verdicts)
    assert [v.number for v in verdicts] == [1, 2] * 6


def test_a_later_step_without_a_checkpoint_saved_is_none():
    assert not judged(*[(fault(step=n), n == 100) for n in range(100, 105)])[3].restart


def test_a_users_error_in_a_restart_is_an_outage_that_may_pass_and_comes_alike_each_time():
    outage = fault("crash", 0, "disk: No space left on device", refused=True)
    verdicts = judged(*[(outage, False)] * 4)
    assert [(v.restart, v.pause) for v in verdicts[:3]] == [(True, 0), (True, 2), (True, 4)]
    assert not verdicts[3].restart
    assert verdicts[3].code == USER_ERROR
    crash = fault("crash", 0, "disk: No space left on device")
    assert judged((crash, False), (outage, False))[1].restart
    assert judged((outage, False), (crash, False))[1].restart


def test_a_rank_that_hangs_again_and_again_has_an_exit_code_of_its_own():
    assert [v.code for v in judged(*[(fault("hang"), False)] * 4)][3] == HANG


def test_the_same_error_at_the_same_step_twice_in_a_row_is_a_bug():
    one, other = fault("crash", 7, "KeyError: 'a'", rank=1), fault("crash", 7, "KeyError: 'a'", rank=3)
    first, second = judged((one, False), (other, False))
    assert first.restart
    assert not second.restart
    assert second.code == FAULT
    assert second.why == "step 7 failed twice with KeyError: 'a': this is a bug, not a fault of a machine"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (fault("crash", 7, "KeyError: 'a'"), fault("crash", 8, "KeyError: 'a'")),
        (fault("crash", 7, "KeyError: 'a'"), fault("crash", 7, "KeyError: 'b'")),
        (fault("crash", 7), fault("crash", 7)),
        (fault("killed", 7), fault("killed", 7)),
        (fault("lost", 7), fault("lost", 7)),
    ],
    ids=["another step", "another error", "no error known", "killed", "lost"],
)
def test_what_is_not_the_same_error_is_tried_again(one, other):
    assert judged((one, False), (other, False))[1].restart


@pytest.mark.parametrize(
    ("one", "same", "another"),
    [
        ("RuntimeError: <Thing at 0x7f3a> of [127.0.0.1]:4711 (pid 12) is 3 wide",
         "RuntimeError: <Thing at 0x12bc> of [127.0.0.1]:815 (pid 977) is 4 wide",
         "RuntimeError: <Thing at 0x12bc> of [127.0.0.1]:815 (pid 977) is 4 high"),
        ("ValueError: loss 2.5e-07 in step 9 after 1.25 s", "ValueError: loss 13.0 in step 10 after 12 s",
         "KeyError: loss 13.0 in step 10 after 12 s"),
    ],
)  # fmt: skip
def test_an_error_is_the_same_whatever_numbers_are_in_it(one, same, another):
    faults = [fault("crash", 7, error) for error in (one, same, another)]
    assert not judged((faults[0], False), (faults[1], False))[1].restart
    assert judged((faults[0], False), (faults[2], False))[1].restart


def test_a_bug_after_a_checkpoint_is_one_all_the_same():
    one = fault("crash", 7, "KeyError: 'a'")
    assert not judged((one, False), (one, True))[1].restart


def test_without_restarts_nothing_is_said_of_them():
    (verdict,) = judged((fault(), False), policy=RecoverySection(restarts=0))
    assert (verdict.restart, verdict.code, verdict.why) == (False, FAULT, "")
