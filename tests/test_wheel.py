"""What a wheel installs is `mikoshi` alone, and works beside packages and folders that are called as its parts are."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mikoshi.trainer.config.run import to_toml
from runs import run_config

ROOT = Path(__file__).parent.parent
PARTS = ("mikoshi", "trainer", "parallel", "data", "launch", "configs")
FOREIGN = "raise SystemExit('somebody else\\'s: ' + __name__)\n"

pytestmark = pytest.mark.slow


def done(*command, **more):
    found = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **more)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / "source" / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source" / name)
    done(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, folder / "source")
    (found,) = folder.glob("*.whl")
    return found


def test_nothing_else_is_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"mikoshi"}
    for part in ("trainer", "parallel", "data", "launch"):
        assert f"mikoshi/{part}/__init__.py" in names
    assert any(name.endswith("share/mikoshi/hardware/gpus.toml") for name in names)


def test_it_trains_beside_others_of_the_same_names(wheel, dataset, tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    done(sys.executable, "-m", "venv", "--without-pip", home)
    (site,) = home.glob("lib/python*/site-packages")
    done(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet", "--no-deps", wheel)
    beneath = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz-beneath.pth").write_text("\n".join(beneath))  # torch and the rest
    for folder in (site, here):
        for name in ("trainer", "data", "launch", "parallel"):
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text(FOREIGN)
    config = run_config(dataset, here / "runs", train={"steps": 2, "global_batch": 4}, log={"tensorboard": False})
    (here / "run.toml").write_text(to_toml(config))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    where = "import mikoshi.data, mikoshi.trainer.hardware as h; print(mikoshi.__file__, len(h.table()) > 3)"
    assert done(home / "bin" / "python", "-c", where, cwd=here, env=env).split() == [f"{site}/mikoshi/__init__.py", "True"]
    assert "finished 2 steps" in done(home / "bin" / "mikoshi", "train", "run.toml", "--ranks", "2", cwd=here, env=env)
    again = ("-m", "mikoshi", "train", "run.toml", "run.name=again")
    assert "finished 2 steps" in done(home / "bin" / "python", *again, cwd=here, env=env)
