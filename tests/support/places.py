"""Stores for tests: a bucket's on the faulty endpoint, and steps saved in any of them."""

from itertools import count

from mikoshi.trainer.checkpoint.storage.bucket import open_remote_store

PART = 5 << 20  # the smallest part that S3 takes
A, B = "rank-00000.safetensors", "rank-00001.safetensors"
numbers = count()


def bucket(s3, scratch, retries=8):
    """A store in a place of its own."""
    s3.forget()
    return open_remote_store(f"{s3.url}/{next(numbers)}", scratch, s3.options, part=PART, retries=retries)


def write(store, step, name=A, body=b"tensor"):
    with store.create(step, name) as file:
        file.write(memoryview(body))


def saved(store, step, manifest=b"{}", **bodies):
    store.begin(step)
    for name, body in ({A: b"tensor"} | bodies).items():
        write(store, step, name, body)
    store.commit(step, manifest)
