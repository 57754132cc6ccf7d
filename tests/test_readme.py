"""Every `mikoshi` command in a sh block of the README and the pages is run as written, where the quick start is a small one."""

import itertools
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runs import VOCAB, text_folder

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("quickstart", "config", "layouts", "plan", "engines", "data", "recovery", "local")]
"""In this order: what one page makes, a later one looks at."""
ELSEWHERE = {"accelerate.md", "compare.md"}  # tests of their own run their commands
MAKING = ("prepare", "train", "submit", "fit-batch")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands():
    return [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if line]


def test_no_page_is_forgotten():
    with_commands = {page.name for page in [ROOT / "README.md", *DOCS.glob("*.md")] if blocks(page, "sh")}
    assert with_commands == {page.name for page in PAGES} | ELSEWHERE


@pytest.mark.slow
def test_the_commands_run_as_written(tmp_path):
    runs, models = tmp_path / "configs/runs", tmp_path / "configs/models"
    runs.mkdir(parents=True)
    models.mkdir()
    quickstart = (ROOT / "configs/runs/quickstart.toml").read_text()
    small = {
        r'source = ".*"': f'source = "{text_folder(tmp_path / "text")}"', r"\nsteps = \d+": "\nsteps = 8",
        r"tokenizer_vocab = \d+": f"tokenizer_vocab = {VOCAB}", r"held_out = [\d.]+": "held_out = 0.1",
        r"warmup = \d+": "warmup = 2", r"every = 100": "every = 4",
    }  # fmt: skip
    for pattern, value in small.items():
        quickstart, count = re.subn(pattern, value, quickstart)
        assert count == 1, pattern
    quickstart += "\n[recovery]\nrestarts = 0\n"  # one rank then needs no process beside this one
    (runs / "quickstart.toml").write_text(quickstart)
    model = (ROOT / "configs/models/gpt-5m.toml").read_text()
    (models / "gpt-5m.toml").write_text(model.replace("width = 256", "width = 32").replace("layers = 4", "layers = 2"))
    text_folder(tmp_path / "my" / "texts")
    clusters = tmp_path / "configs/clusters"
    clusters.mkdir()
    local = (ROOT / "configs/clusters/local.toml").read_text()
    (clusters / "local.toml").write_text(f'{local}\n[env]\nOMP_NUM_THREADS = "1"\n')  # as for all that tests start

    found = commands()
    assert len(found) >= 29

    def run(line):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mikoshi", *shlex.split(line, comments=True)[1:]],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        # What only looks comes two at a time, between the commands that make something.
        for making, lines in itertools.groupby(found, lambda line: line.split()[1] in MAKING):
            together = list(lines)
            list(map(run, together) if making else pool.map(run, together))
    assert all(line.startswith("mikoshi ") for line in found)
    assert (tmp_path / "runs/quickstart/report.html").exists()


def test_the_quick_start_itself_takes_their_settings():
    """Where it is trained in the test above it is a small one, with other steps."""
    from mikoshi.trainer.config.run import load_config

    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    lines = [line.strip() for page in pages for line in page.read_text().splitlines()]
    found = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("mikoshi ") and " configs/runs/" in line]
    assert len(found) >= 20
    for place, *words in found:
        settings = [word for word in words if re.fullmatch(r"[a-z_]+\.[\w.]+=.*", word)]
        assert load_config(ROOT / (place if place.startswith("configs/") else words[0]), settings).run.name


def test_the_pages_settings_are_settings(tmp_path):
    from mikoshi.trainer.config.run import load_config

    found = {page.name: blocks(page, "toml") for page in [ROOT / "README.md", *DOCS.glob("*.md")]}
    assert {name for name, texts in found.items() if texts} >= {"data.md", "engines.md"}
    for name, texts in found.items():
        for text in texts:
            base = (ROOT / "configs/runs/quickstart.toml").as_posix()
            lone = text.replace("[data]\n", '[data]\nsource = ""\n')
            (tmp_path / "run.toml").write_text(f'base = "{base}"\n{lone}')
            config = load_config(tmp_path / "run.toml")
            assert config.data.mixture or name != "data.md"
