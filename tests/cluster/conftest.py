import shutil
import tempfile
from pathlib import Path

import pytest

import slurmcluster


@pytest.fixture(scope="session")
def slurm_session():
    """A real Slurm for the whole session, where one can be."""
    if why := slurmcluster.missing():
        pytest.skip(f"no real Slurm here: {why}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets are in it
    made = slurmcluster.up(folder)
    yield made
    slurmcluster.down(made)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm(slurm_session, monkeypatch):
    """The session's Slurm with nothing running on it; commands find it."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_session.conf))
    slurm_session.quiet()
    yield slurm_session
    slurm_session.quiet()
