import pytest


@pytest.fixture(scope="session")
def s3_server():
    from faulty import faulty_s3
    from stores import BODIES

    with faulty_s3({**BODIES, "dataset.json": b'{"format": 1}'}) as server:
        yield server


@pytest.fixture
def s3(s3_server):
    """The faulty endpoint, serving stores.BODIES, with no plans and an empty log."""
    s3_server.forget()
    yield s3_server
    s3_server.forget()
