"""The rules of the house, checked like everything else: lint, types, directions of import."""

import ast
import graphlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("trainer", "parallel", "data", "launch")


def tool(name, *arguments):
    beside = Path(sys.executable).parent / name
    path = beside if beside.exists() else shutil.which(name)
    if path is None:
        pytest.fail(f'{name} is not installed: pip install -e ".[dev]"')
    done = subprocess.run([str(path), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint():
    tool("ruff", "check", "--no-cache", ".")
    tool("ruff", "format", "--no-cache", "--check", ".")


def test_types():
    tool("mypy")


def test_import_directions():
    tool("lint-imports", "--no-cache")


def ours():
    """Every file of the house, by its module's name."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = ("mikoshi", *path.relative_to(ROOT).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(path):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_circle_of_files():
    """Not even one that is closed within a function: what two files need of each other has a place of its own."""
    files = dict(ours())
    graph = {name: {found for found in imported(path) if found in files and found != name} for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_a_folder_is_small_and_says_what_it_is_for():
    for folder in {path.parent for _, path in ours()}:
        assert len(list(folder.glob("*.py"))) <= 14, f"{folder}: divide it"
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_everything_is_imported_as_mikoshi():
    """Under its bare name a module would be there twice, or be somebody else's."""
    for path in [*(path for _, path in ours()), *(ROOT / "tests").rglob("*.py")]:
        assert not {name for name in imported(path) if name and name.partition(".")[0] in ROOMS}, path


def test_modules_that_are_named_in_strings_are_there():
    """What a fork server is to import in advance, and what is looked up among loaded modules, fails in silence."""
    from mikoshi.launch.agent import fork_server

    named = [*fork_server._PRELOADED, "mikoshi.parallel.process.process_group"]
    assert "mikoshi.parallel.process.process_group" in (ROOT / "launch" / "cli" / "main.py").read_text()
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


def test_the_model_knows_nothing_distributed():
    for path in (ROOT / "trainer" / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = getattr(node, "module", None) or ""
            assert not any("distributed" in name for name in [*names, module]), f"{path}:{node.lineno}"


def test_nothing_unsafe_is_loaded_or_run():
    """No pickle from disk, no remote code, no string given to a shell (tests may look at pickles)."""
    for package in ROOMS:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {a.name for a in node.names} | {getattr(node, "module", None)}
                    assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, f"{path}:{node.lineno}"
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    assert called not in ("eval", "exec", "torch.load", "torch.save", "os.system"), f"{path}:{node.lineno}"
                    assert not any(k.arg in ("shell", "trust_remote_code") for k in node.keywords), f"{path}:{node.lineno}"


def test_help_imports_nothing_heavy():
    """`mikoshi --help` answers at once because torch is not loaded for it."""
    check = (
        "import sys, mikoshi.launch.cli.main as c\n"
        "sys.argv = ['mikoshi', '--help']\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'pydantic', 'numpy', 'plotly'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, cwd=ROOT).returncode == 0


def test_runs_are_shown_without_what_that_does_not_need(tmp_path):
    """`mikoshi runs` and `status` are asked often: no rich, no torch, and no validator of a config that is not read."""
    check = (
        "import sys, mikoshi.launch.cli.main as c\n"
        "sys.argv = ['mikoshi', 'runs', '--folder', sys.argv[1]]\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "from mikoshi.trainer.config.run import RunConfig\n"
        "sys.exit(bool({'torch', 'numpy', 'plotly', 'rich.progress'} & set(sys.modules)) or RunConfig.__pydantic_complete__)"
    )
    done = subprocess.run([sys.executable, "-c", check, str(tmp_path)], capture_output=True, cwd=ROOT, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}: there is no run yet\n"), done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "runs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_run_is_a_valid_config(path):
    from mikoshi.trainer.config.run import load_config

    config = load_config(path)
    assert config.run.name == path.stem
    assert config.train.global_batch % 8 == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_model_has_the_size_it_is_named_after(path):
    import re
    import tomllib

    import torch

    from mikoshi.trainer.model.config import ModelConfig
    from mikoshi.trainer.model.gpt import GPT

    with torch.device("meta"):
        model = GPT(ModelConfig.model_validate_json(__import__("json").dumps(tomllib.loads(path.read_text())["model"])))
    number, unit = re.search(r"-(\d+(?:\.\d+)?)([mb])$", path.stem).groups()
    size = sum(p.numel() for p in model.parameters())
    assert size == pytest.approx(float(number) * {"m": 1e6, "b": 1e9}[unit], rel=0.07), size
