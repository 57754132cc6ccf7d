"""What a rank does that has a slow disk, or a bit of bad memory, and trains otherwise as `mikoshi train` does."""

import contextlib
import math
import os
import time

from mikoshi.parallel.process import heartbeat
from mikoshi.parallel.sharding import local
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.feed import feed
from mikoshi.trainer.train import loop, save_schedule
from mikoshi.trainer.train.rank import train_supervised


def on_a_slow_disk(run, seconds):
    """Every file of a checkpoint takes so long to get to the disk. (No slow disk can be had here: this is the one thing
    that is made up.)"""
    create = LocalStore.create

    @contextlib.contextmanager
    def slow(self, step, name):
        with create(self, step, name) as file:
            yield file
            time.sleep(seconds)

    LocalStore.create = slow
    return train_supervised(run)


def saved_soon(run, seconds):
    """Saves by time need not be minutes apart."""
    save_schedule.SOONEST = seconds
    return train_supervised(run)


def evaluates_for_long(run, seconds):
    """The held-out text has a hundred times the batches, and each takes so long."""
    once = feed.Feed.evaluation

    def slow(batches):
        for rows in batches:
            for _ in range(100):
                time.sleep(seconds)
                yield rows

    feed.Feed.evaluation = lambda self, *place: {name: slow(rows) for name, rows in once(self, *place).items()}
    return train_supervised(run)


def with_bad_memory(run, step):
    """At a step of the first attempt one weight becomes NaN, on rank 0, between two uses of it."""
    build = loop.build_engine

    def built(*args, **kwargs):
        engine = build(*args, **kwargs)

        def spoil(now, phase):
            if (now, phase) == (step, "data"):
                local(engine.parameters[-1]).detach().reshape(-1)[0] = math.nan

        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "0":
            heartbeat.set_listener(spoil)
        return engine

    loop.build_engine = built
    return train_supervised(run)
