"""How much silence is normal: never less than a healthy rank may need, and soon little enough to see one that hangs."""

import pytest

from mikoshi.parallel.process import heartbeat

SILENCE, PATIENCE = 60.0, 900.0


class Rank:
    """A rank's steps, on a clock that only they move."""

    def __init__(self, path):
        self.path, self.now, self.step = path, 100.0, 0

    def does(self, phase, seconds, step=None):
        """Begin a phase and stay in it for so long: what of that would count as a hang, in seconds past the limit."""
        heartbeat.send_heartbeat(phase, step)
        self.now += seconds
        return max(0.0, seconds - self.limit)

    @property
    def limit(self):
        return heartbeat.read_page(self.path).limit

    def makes(self, count, seconds, more=()):
        """Steps whose main thread waits in `reduce` for most of the time; whether none of it would count as a hang."""
        late = 0.0
        for _ in range(count):
            self.step += 1
            late += self.does("data", 0.01, self.step)
            for phase in ("forward", "backward", "forward", "backward"):
                late += self.does(phase, 0.01)
            late += self.does("reduce", seconds) + self.does("update", 0.01) + self.does("agree", 0.01)
            for phase, long in more:
                late += self.does(phase, long)
        return not late


@pytest.fixture
def rank(tmp_path, monkeypatch):
    made = Rank(tmp_path / "page")
    monkeypatch.setattr(heartbeat, "_state", heartbeat._HeartbeatState())
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: made.now)
    heartbeat.open_page(made.path)
    heartbeat.set_limits(SILENCE, PATIENCE)
    return made


@pytest.mark.parametrize("seconds", [0.1, 5.1, 50.0, 300.0, 800.0])
def test_steps_that_are_slow_from_the_first_one_on_are_no_hang(rank, seconds):
    assert rank.makes(40, seconds)
    assert rank.limit == pytest.approx(max(SILENCE, 12 * seconds), rel=0.1), "one that then hangs is found"


@pytest.mark.parametrize("seconds", [0.1, 3.0, 5.9, 6.1, 50.0, 200.0])
def test_a_step_time_that_grows_tenfold_is_no_hang_and_neither_is_its_return(rank, seconds):
    for factor in (1, 10, 1, 10, 100 if seconds < 0.5 else 10):
        assert rank.makes(30, factor * seconds)


def test_until_enough_undisturbed_steps_are_known_patience_holds(rank):
    limits = []
    for _ in range(14):
        rank.makes(1, 0.2)
        limits.append(rank.limit)
    assert limits == [PATIENCE] * 10 + [SILENCE] * 4
    assert not rank.makes(1, 61.0)


@pytest.mark.parametrize("phase", ["compile", "evaluate", "save", "load"])
def test_a_step_after_something_else_is_not_like_the_others(rank, phase):
    assert rank.makes(20, 0.2)
    assert rank.makes(1, 0.2, more=[(phase, 700.0)])
    assert rank.makes(1, 600.0), "it may take its time"
    assert rank.makes(1, 0.2)
    assert rank.limit == SILENCE, "and is no measure of those that follow"
    assert rank.makes(1, 0.2, more=[(phase, 0.1), ("agree", 600.0)]), "nor is the rest of the interrupted one"


def test_a_compilation_within_a_step_is_given_the_time(rank):
    assert rank.makes(20, 0.2)
    rank.step += 1
    for phase, seconds in (("data", 0.1), ("forward", 1.0), ("compile", 500.0), ("forward", 100.0), ("reduce", 300.0)):
        assert not rank.does(phase, seconds, rank.step)


def test_new_limits_forget_the_steps_of_another_kind(rank):
    assert rank.makes(20, 0.2)
    heartbeat.set_limits(SILENCE, PATIENCE)  # after going back, or from where rows are read in longer pieces
    assert rank.makes(30, 80.0)
    heartbeat.set_limits(SILENCE, PATIENCE)
    assert rank.makes(12, 0.2)
    assert rank.limit == SILENCE


def test_a_run_that_is_interrupted_in_every_step_keeps_its_patience(rank):
    assert rank.makes(50, 0.2, more=[("save", 0.1)])
    assert rank.makes(50, 100.0, more=[("evaluate", 800.0)])


@pytest.mark.parametrize("phase", ["evaluate", "save"])
@pytest.mark.parametrize("seconds", [0.2, 100.0])
def test_of_a_run_that_is_interrupted_in_every_second_step_the_others_are_judged(rank, phase, seconds):
    for _ in range(20):
        assert rank.makes(1, seconds)
        assert rank.limit == PATIENCE or len(heartbeat._state.known) >= 8
        assert rank.makes(1, seconds, more=[(phase, 800.0)])
    assert rank.makes(1, 800.0), "the first one after it"
    rank.makes(1, seconds)
    assert rank.limit == pytest.approx(max(SILENCE, 12 * seconds), rel=0.1)


def test_waiting_for_data_from_afar_is_no_measure_of_a_step(rank):
    heartbeat.set_limits(SILENCE, PATIENCE, slow=("data",))
    for _ in range(20):
        rank.step += 1
        assert not rank.does("data", 500.0, rank.step)
        assert not rank.does("forward", 1.0)
        assert not rank.does("reduce", 1.0)
    assert rank.limit == SILENCE


def test_outside_of_steps_is_never_judged_more_strictly_than_within(rank):
    assert rank.makes(20, 200.0)
    assert rank.makes(1, 200.0, more=[("save", 2300.0)])
