"""What one rank finds out, all act on, whatever it is: no rank is left waiting for another's result, error or end."""

import errno

import pytest

from mikoshi.data.errors import DataError
from mikoshi.trainer.checkpoint.agree import all_gather_json, gather_json, on_first_rank, scatter_json
from mikoshi.trainer.errors import CheckpointError, RunError

ERRORS = {
    "user": (CheckpointError("a: b"), CheckpointError, "a: b"),
    "data": (DataError("c"), DataError, "c"),
    "run": (RunError("ü \n\udc80"), RunError, "ü \n\udc80"),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "/x"), OSError, "[Errno 28] No space left on device: '/x'"),
    "missing": (FileNotFoundError("s3://x: not there"), FileNotFoundError, "s3://x: not there"),
    "by number": (OSError(errno.ENOENT, "gone", "y"), FileNotFoundError, "[Errno 2] gone: 'y'"),
    "bug": (ZeroDivisionError("division by zero"), RuntimeError, "ZeroDivisionError: division by zero"),
    "text": (UnicodeDecodeError("utf8", b"x", 0, 1, "odd"), RuntimeError, "UnicodeDecodeError: 'utf8' codec can't decode"),
    "memory": (MemoryError(), RuntimeError, "MemoryError"),
    "end": (SystemExit(3), RuntimeError, "SystemExit: 3"),
    "key": (KeyboardInterrupt(), RuntimeError, "KeyboardInterrupt"),
}


class Strange(Exception):
    """Which no other process could build again."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")
        self.handle = (n for n in range(3))


def raising(error):
    raise error


def each_way(name):
    """How an error of the first rank ends each way of telling here; whether the ranks still understand each other after."""
    import torch.distributed as dist

    error, results = Strange("a", "b") if name == "strange" else ERRORS[name][0], []
    for way in (on_first_rank, scatter_json):
        try:
            way(lambda: raising(error))
        except BaseException as raised:
            results.append((type(raised).__name__, str(raised), raised is error))
        assert all_gather_json(dist.get_rank()) == [0, 1, 2]
    return results


@pytest.mark.parametrize("name", [*ERRORS, "strange"])
def test_whatever_the_first_rank_raises_is_raised_on_all(ranks, name):
    error, kind, text = ERRORS.get(name, (Strange("a", "b"), RuntimeError, "Strange: a b"))
    first, *others = ranks.run(each_way, name, world=3)
    assert first == [(type(error).__name__, str(error), True)] * 2
    for other in others:
        assert len(other) == 2
        for found, message, same in other:
            assert found == kind.__name__
            assert message.startswith(text)
            assert not same


VALUE = {"a": [1, -2.5, "ü", None, True, (3, [])], "big": "x" * 100_000, "inf": float("inf"), "b": {"c": {}}}
HEARD = {**VALUE, "a": [1, -2.5, "ü", None, True, [3, []]]}


def exchange():
    import torch.distributed as dist

    rank = dist.get_rank()
    return (
        on_first_rank(lambda: VALUE if rank == 0 else raising(AssertionError("only the first acts"))),
        all_gather_json([rank, "y" * 10 ** (2 * rank)]),
        gather_json({"rank": rank, "more": [None] * rank}),
        scatter_json(lambda: [VALUE, (), "z"]),
    )


def test_plain_values_arrive_as_they_are_whatever_their_length(ranks):
    for rank, (one, everyone, gathered, own) in enumerate(ranks.run(exchange, world=3)):
        assert one == HEARD
        assert everyone == [[n, "y" * 10 ** (2 * n)] for n in range(3)]
        assert gathered == ([{"rank": n, "more": [None] * n} for n in range(3)] if rank == 0 else None)
        assert own == [HEARD, [], "z"][rank]


def test_without_a_process_group_it_is_the_same():
    assert on_first_rank(lambda: (1, 2)) == [1, 2]
    assert all_gather_json((1, 2)) == gather_json((1, 2)) == [[1, 2]]
    assert scatter_json(lambda: [(1, 2)]) == [1, 2]
    error = Strange(1, 2)
    for way in (on_first_rank, scatter_json):
        with pytest.raises(Strange) as caught:
            way(lambda: raising(error))
        assert caught.value is error


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def telling_what_is_no_json(path):
    import torch.distributed as dist

    results = []
    for way in (on_first_rank, scatter_json):
        try:
            way(lambda: [Payload(path)] * 3)
        except (TypeError, RuntimeError) as error:
            results.append(str(error))
    for way in (all_gather_json, gather_json):
        try:
            way(Payload(path) if dist.get_rank() == 1 else 0)
        except (TypeError, RuntimeError) as error:
            results.append(str(error))
    return results


def test_what_is_no_json_is_an_error_and_no_pickle(ranks, tmp_path):
    results = ranks.run(telling_what_is_no_json, tmp_path / "made", world=3)
    assert [len(one) for one in results] == [4, 4, 4]
    assert all("not JSON serializable" in word for one in results for word in one)
    assert not (tmp_path / "made").exists()
