"""What others can write, configs, records of checkpoints and documents, is read as data: nothing of it runs, and nothing
outside of what it was given for is opened. Watched by the interpreter's own audit events."""

import hashlib
import json
import subprocess
import sys

import pytest

from mikoshi.trainer.checkpoint.verify import step_folder
from mikoshi.trainer.config.run import to_toml
from runs import run_config

# Audit events that mean that something runs, and every path that is opened; reported at the end.
WATCH = r"""
import os, sys
ran, opened = [], set()
def hook(event, args):
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "pty.spawn"):
        ran.append((event, repr(args)[:200]))
    elif event in ("exec", "compile"):
        source = args[0] if event == "compile" else getattr(args[0], "co_filename", "")
        if isinstance(source, (str, bytes)) and b"MIKOSHI_PAYLOAD" in (source.encode() if isinstance(source, str) else source):
            ran.append((event, repr(source)[:200]))
    elif event == "open" and isinstance(args[0], (str, bytes)):
        opened.add(os.fsdecode(args[0]))
import mikoshi.launch.cli.main, mikoshi.trainer.train.loop, mikoshi.trainer.train.preflight, mikoshi.trainer.train.rank
import mikoshi.data.prepare.prepare, mikoshi.data.prepare.piece, mikoshi.data.sources.formats, jinja2.sandbox, json
sys.addaudithook(hook)
code = 0
sys.argv = ["mikoshi", *sys.argv[1:]]
try:
    mikoshi.launch.cli.main.main()
except SystemExit as end:
    code = end.code or 0
print("AUDIT " + json.dumps({"code": code, "ran": ran, "opened": sorted(opened)}))
"""


def watched(folder, *arguments):
    """Run the command; its exit code, the audit's findings and what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", WATCH, *map(str, arguments)], capture_output=True, text=True, cwd=folder, timeout=120
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("AUDIT ")]
    told = json.loads(line[6:])
    return told["code"], told["ran"], set(told["opened"]), done.stdout + done.stderr


@pytest.fixture
def trap(tmp_path):
    """A file that nobody may open, and what would betray that code was run."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("SECRET-CONTENT")
    return tmp_path / "outside" / "secret.txt"


def assert_harmless(ran, opened, out, trap, tmp_path):
    assert not ran
    assert str(trap) not in opened
    assert not any("outside" in name for name in opened)
    assert "SECRET-CONTENT" not in out
    assert not (tmp_path / "executed").exists()


CODE = "__import__('os').system('touch executed') # MIKOSHI_PAYLOAD"


CONFIGS = {
    "shell": '[run]\nname = "$(touch executed)"\n',
    "leaves": '[run]\nname = "../outside/x"\n',
    "python": f'[run]\nname = "x"\n[model]\nlayers = "{CODE}"\n',
    "dunder": f'[model]\n"__class__" = "{CODE}"\n',
    "yaml": '[run]\nseed = "!!python/object/apply:os.system [touch executed]"\n',
    "long": '[run]\nname = "' + "a" * 100_000 + '"\n',
    "deep": "x = " + "[" * 5_000 + "]" * 5_000 + "\n",
}


@pytest.mark.parametrize("name", [n if n in ("leaves", "python") else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_a_config_is_only_values(tmp_path, trap, name):
    (tmp_path / "run.toml").write_text(CONFIGS[name])
    code, ran, opened, out = watched(tmp_path, "train", "run.toml")
    assert code == 2, out
    assert "Traceback" not in out
    assert_harmless(ran, opened, out, trap, tmp_path)


@pytest.fixture
def trained(dataset, tmp_path, mikoshi):
    config = run_config(
        dataset, tmp_path / "runs", train={"steps": 3, "global_batch": 4}, eval={"batches": 1}, recovery={"restarts": 0},
        checkpoint={"every": 3}, log={"tensorboard": False},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))
    code, out, errors = mikoshi("train", "run.toml", "run.name=test")
    assert code == 0, out + "\n".join(errors)
    return step_folder(tmp_path / "runs" / "test" / "checkpoints", 3)


def rewrite(path, change):
    """Alter a manifest as an attacker would, who can compute its digest."""
    content = json.loads((path / "manifest.json").read_text())["content"]
    change(content)
    body = json.dumps(content, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    (path / "manifest.json").write_text(f'{{"sha256":"{digest}","content":{body}}}\n')


RECORDS = {
    "config-is-code": lambda c: c["record"].update(config=CODE),
    "config-names-a-base": lambda c: c["record"].update(config='base = "../outside/secret.txt"\n' + c["record"]["config"]),
    "config-is-a-list": lambda c: c["record"].update(config=[1]),
    "config-is-missing": lambda c: c["record"].pop("config"),
    "data-is-a-word": lambda c: c["record"].update(data="x"),
    "data-is-empty": lambda c: c["record"].update(data={}),
    "state-is-code": lambda c: c["record"]["data"].update(state=CODE),
    "state-is-empty": lambda c: c["record"]["data"].update(state={}),
    "digest-is-a-number": lambda c: c["record"]["data"]["state"].update(digest=7),
    "earlier-is-huge": lambda c: c["record"]["data"]["state"]["earlier"].update(step=-(10**30)),
    "skipped-is-huge": lambda c: c["record"]["data"].update(skipped=[[0, 10**40]]),
    "position-is-a-word": lambda c: c["record"]["data"].update(position=CODE),
    "identity-is-a-list": lambda c: c["record"]["data"].update(identity=[]),
    "sources-are-code": lambda c: c["record"]["data"]["identity"].update(sources=CODE),
    "curriculum-is-deep": lambda c: c["record"]["data"].update(curriculum=[[[[{}]]]]),
    "guard-is-code": lambda c: c["record"].update(guard=CODE),
    "guard-has-words": lambda c: c["record"].update(guard={"losses": [CODE], "norms": ["nan"], "known": CODE}),
    "step-is-a-word": lambda c: c["record"].update(step=CODE),
    "step-is-another": lambda c: c["record"].update(step=2),
}


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_lies_is_refused_by_name(trained, tmp_path, name, mikoshi):
    rewrite(trained, RECORDS[name])
    code, out, errors = mikoshi("train", "run.toml", "run.name=test", "train.steps=4")
    assert code == 2, out
    assert len(errors) == 1, errors
    assert any(name in errors[0] for name in ("step-00000003", "data.", "config", "record")), errors
    assert not (tmp_path / "executed").exists()
    assert "SECRET" not in out + errors[0]


@pytest.mark.slow
def test_records_that_lie_run_nothing_and_open_nothing_outside(trained, tmp_path, trap):
    for name in ("config-is-code", "config-names-a-base", "state-is-code"):
        rewrite(trained, RECORDS[name])
        code, ran, opened, out = watched(tmp_path, "train", "run.toml", "run.name=test", "train.steps=4")
        assert code == 2, out
        assert_harmless(ran, opened, out, trap, tmp_path)


def test_documents_are_only_text(tmp_path, trap):
    payloads = [
        CODE, "{text.__class__.__mro__}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", f"{{% include '{trap}' %}}",
        "$(touch executed)", "../outside/secret.txt", "cos\nsystem\n(S'touch executed'\ntR.", "\\u0000", "<|endoftext|>",
    ]  # fmt: skip
    lines = [
        json.dumps({"text": payload + " " + "word " * 60, "__class__": payload, "path": str(trap)}) for payload in payloads
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines * 8) + "\n")
    config = run_config(
        tmp_path / "prepared", tmp_path / "runs", data={"source": str(tmp_path / "docs.jsonl"), "template": "{path}\n{text}",
        "tokenizer": "bytes", "held_out": 0.1},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))
    code, ran, opened, out = watched(tmp_path, "prepare", "run.toml", "--workers", "1")
    assert code == 0, out
    assert_harmless(ran, opened, out, trap, tmp_path)
