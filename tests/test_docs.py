"""The pages are true where a machine can tell: every command parses, every link leads somewhere, keys are as in the schema."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *sorted(DOCS.glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
COMMAND = re.compile(r"(?:^|\s)mikoshi (?=[a-z])")


def module(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def boxes(text):
    """The lines of a page that stand in a box: fenced, or indented after an empty line."""
    fenced, before, indented = False, "", False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced:
            yield line
        else:
            indented = line.startswith("    ") and (indented or not before.strip())
            if indented:
                yield line.strip()
        before = line


def in_boxes(text):
    """The words of every command in a box, without `mikoshi`."""
    for line in boxes(text):
        if places := list(COMMAND.finditer(line)):
            words = shlex.split(line[places[-1].end() :], comments=True)
            ends = [at for at, word in enumerate(words) if word in (">", "|", "&&", "\\")]
            yield words[: ends[0]] if ends else words


def in_sentences(text):
    """The same of those within sentences, which may be cut short."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`(mikoshi [a-z][^`]*)`", plain):
        yield shlex.split(code.replace("\\|", "|"))[1:]


def command_of(words):
    """The verb's command and the words behind it."""
    from typer.main import get_command

    from mikoshi.launch.cli.main import app

    found, rest = get_command(app), list(words)
    while isinstance(found, click.Group) or hasattr(found, "commands"):
        if not rest:
            return found, []
        verb = rest.pop(0)
        assert verb in found.commands, f"mikoshi {' '.join(words)}: no verb {verb}"
        found = found.commands[verb]
    return found, rest


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_in_a_box_parses(page):
    from mikoshi.launch.config.cluster import KINDS
    from mikoshi.trainer.config.run import RunConfig
    from mikoshi.trainer.config.toml import _fields, _kind_of

    kinds = dict(_fields(RunConfig))
    for words in in_boxes(page.read_text()):
        command, rest = command_of(words)
        told = command.make_context(command.name, rest).params
        for setting in told.get("overrides") or []:
            key, equals, _ = setting.partition("=")
            assert equals and _kind_of(kinds, key) is not None, f"mikoshi {' '.join(words)}: {setting}"
        for setting in told.get("settings") or []:
            key = setting.partition("=")[0].removeprefix("cluster.")
            assert any(key in kind.model_fields for kind in KINDS.values()), f"mikoshi {' '.join(words)}: {setting}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_in_a_sentence_has_its_verb_and_options(page):
    for words in in_sentences(page.read_text()):
        command, rest = command_of(words)
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
        for word in rest:
            assert not word.startswith("-") or word.partition("=")[0] in options, f"mikoshi {' '.join(words)}: {word}"


def test_commands_are_found():
    """The tests above look at many."""
    found = [words for page in PAGES for words in in_boxes(page.read_text())]
    assert len(found) >= 50
    assert ["train", "configs/runs/gpt2-124m.toml"] in found, "under torchrun"
    assert len([words for page in PAGES for words in in_sentences(page.read_text())]) >= 40


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    plain = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_has_its_place():
    """In the README, and in the site."""
    pages = {page.name for page in DOCS.glob("*.md")}
    assert set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text())) == pages
    elsewhere = {"index.md", "contributing.md", "tests.md"}
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert set(re.findall(r"[\w-]+\.md", str(nav))) == pages | elsewhere


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason='needs pip install "mikoshi[docs]"')
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) == len(list(DOCS.glob("*.md"))) + 4  # the three of elsewhere, and that of a page that is not there
    for page in pages:
        loaded = re.findall(r'<(?:script|img|link)[^>]*?(?:src|href)="?(https?:[^" >]+)', page.read_text())
        assert not loaded, f"{page.name} loads {loaded} from the network"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_reference_is_the_schemas():
    """After a change: python docs/reference.py."""
    for path, text in module("reference").pages().items():
        assert path.read_text() == text, path.name


def test_files_that_the_design_names_are_there():
    """Whatever looks like a file of a room, or stands beside one in the same line."""
    rooms = ("launch", "trainer", "parallel", "data", "tests", "configs", "docs")
    text = (DOCS / "design.md").read_text()
    for name in re.findall(r"`((?:" + "|".join(rooms) + r")/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
    files = {path.name for room in rooms for path in (ROOT / room).rglob("*.*")} | {"mkdocs.yml", "pyproject.toml"}
    for name in re.findall(r"`([\w]+\.(?:py|md|toml|yml))`", text):
        assert name in files, name
