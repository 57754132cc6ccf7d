"""Every mistake a user can make ends in one line that says what to do, exit code 2, and nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disks import small_disk
from mikoshi.parallel.process.process_group import World
from mikoshi.trainer.checkpoint.verify import steps_in, verify
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.train.rank import launched_world
from runs import VOCAB, run_config, text_folder


@pytest.fixture
def run(mikoshi):
    return mikoshi


@pytest.fixture
def config_file(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    config = run_config(
        tmp_path / "data", tmp_path / "runs", train={"steps": 3, "global_batch": 4}, eval={"batches": 1},
        checkpoint={"every": 1, "keep": 3}, log={"tensorboard": False}, data={"source": str(tmp_path / "text")},
        recovery={"restarts": 0},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))
    return tmp_path / "run.toml"


def one_error(result, *words):
    code, _, errors = result
    assert code == 2
    assert len(errors) == 1, errors
    for word in words:
        assert word in errors[0]


def left_over(folder):
    return sorted(p.name for p in folder.rglob("*") if "partial" in p.name or "probe" in p.name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_missing_data(run, config_file, tmp_path, ranks):
    shutil.rmtree(tmp_path / "data")
    one_error(run("train", config_file, "--ranks", ranks), "no prepared dataset at", "mikoshi prepare")
    assert not (tmp_path / "runs").exists()


def test_missing_and_empty_source(run, config_file, tmp_path):
    one_error(run("prepare", config_file, "data.path=new"), "data.source", "is neither a file, folder or glob here")
    (tmp_path / "text").mkdir()
    one_error(run("prepare", config_file, "data.path=new"), "holds no files to read")
    (tmp_path / "text" / "a.txt").write_text("")
    one_error(run("prepare", config_file, "data.path=new"), "no document of", "1 empty", "it is empty")
    (tmp_path / "text" / "b.jsonl").write_text('{"content": "x"}\n')
    wrong_key = run("prepare", config_file, "data.path=new", "data.on_invalid=skip")
    one_error(wrong_key, "(1 skipped, 1 empty)", "b.jsonl:1: no column: 'text' is not there; it has content")
    (tmp_path / "text" / "gone").symlink_to(tmp_path / "nowhere")
    one_error(run("prepare", config_file, "data.path=new"), "gone cannot be read", "leads nowhere")
    (tmp_path / "text" / "gone").unlink()
    (tmp_path / "taken").mkdir()
    one_error(run("prepare", config_file, "data.path=taken"), "exists and is not a prepared dataset")
    one_error(run("prepare", config_file, "data.path=new", 'data.source=""'), "data.source: missing")
    assert not (tmp_path / "new").exists()
    assert not left_over(tmp_path)


def test_text_that_is_not_utf8(run, config_file, tmp_path):
    text_folder(tmp_path / "text")
    (tmp_path / "text" / "bad.txt").write_bytes(b"caf\xe9")
    one_error(run("prepare", config_file, "data.path=new"), "bad.txt: not UTF-8: byte 3", 'on_invalid = "skip"')
    assert not (tmp_path / "new").exists()
    assert not left_over(tmp_path)
    code, out, _ = run("prepare", config_file, "data.path=new", "data.on_invalid=skip", f"data.tokenizer_vocab={VOCAB}")
    assert code == 0
    assert "1 skipped" in out
    assert "bad.txt" in out


def test_data_made_from_something_else_is_not_overwritten(run, config_file, tmp_path):
    text_folder(tmp_path / "text")
    before = (tmp_path / "data" / "dataset.json").read_bytes()
    one_error(run("prepare", config_file), "made from another source or settings")
    assert (tmp_path / "data" / "dataset.json").read_bytes() == before


def test_truncated_and_altered_shard(run, config_file, tmp_path):
    shard = tmp_path / "data" / "train-00000.shard"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    one_error(run("train", config_file), "train-00000.shard", "truncated", "prepare the data again")
    shard.write_bytes(content[:20])
    one_error(run("train", config_file), "train-00000.shard", "20 bytes", f"{len(content)} are listed")
    shard.write_bytes(b"GARBAGE!" + content[8:])
    one_error(run("train", config_file), "train-00000.shard", "not a token shard")
    shard.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    one_error(run("train", config_file), "train-00000.shard", "not the shard that dataset.json lists")
    shard.unlink()
    one_error(run("train", config_file), "train-00000.shard", "no such file")


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1}', b'{"format": 99}', b'{"a": "\xff"}', b"[]"])
def test_damaged_index(run, config_file, tmp_path, content):
    (tmp_path / "data" / "dataset.json").write_bytes(content)
    one_error(run("train", config_file), "dataset.json", "prepare the data again")


def test_world_size_that_does_not_divide_the_batch(run, config_file):
    one_error(
        run("train", config_file, "--ranks", 3, "model.moe={experts=4, top_k=2}"),
        "train.global_batch 4 cannot be shared evenly by 3 data ranks", "start 1, 2 or 4 ranks", "train.global_batch=6",
    )  # fmt: skip


def test_vocabulary_smaller_than_the_tokenizers(run, config_file):
    one_error(run("train", config_file, "model.vocab=300"), "model.vocab = 300", f"smaller than the {VOCAB} tokens")


def test_context_longer_than_the_data(run, config_file):
    one_error(run("train", config_file, "train.context=10000000"), "less than one row of 10000000")


def test_bad_settings_name_key_value_file_and_line(run, config_file):
    line = next(n for n, text in enumerate(config_file.read_text().splitlines(), 1) if text.startswith("lr ="))
    config_file.write_text(config_file.read_text().replace("lr = 0.003", 'lr = "fast"'))
    one_error(run("train", config_file), f'{config_file}:{line}: optim.lr = "fast"', "valid number")
    one_error(run("train", config_file, "optim.lr=1", "model.widht=3"), "model.widht: unknown key; did you mean model.width?")
    one_error(run("train", config_file, "optim.lr=1", "train.lr=3"), "train.lr: unknown key; did you mean optim.lr?")
    one_error(run("train", config_file, "optim.lr"), "an override is written section.key=value")
    one_error(run("train", config_file, ".=3"), "an override is written section.key=value")
    one_error(run("train", config_file, "optim.lr=1", "data.bos=false"), 'data.bos = "false"', '"none" with no token')
    one_error(run("train", config_file, "optim.lr=1", "data.separator=auto"), 'data.separator = "auto"', "leave it out")
    one_error(run("train", "nowhere.toml"), "nowhere.toml: cannot read the config")
    config_file.write_text("[run\n")
    one_error(run("train", config_file), "not TOML", "line 1")


def test_wandb_that_is_not_installed(run, config_file, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    one_error(run("train", config_file, "log.wandb=project"), "wandb is not installed", 'pip install "mikoshi[wandb]"')


def test_cuda_that_is_not_there(run, config_file):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    one_error(run("train", config_file, "engine.device=cuda"), 'device "cuda" (engine.device): torch sees no GPU')


def trained(run, config_file):
    code, out, errors = run("train", config_file)
    assert code == 0, (out, errors)
    return config_file.parent / "runs" / "test"


def test_a_checkpoint_with_an_altered_or_missing_byte_falls_back_and_says_so(run, config_file):
    folder = trained(run, config_file)
    newest, older, _ = steps_in(folder / "checkpoints")
    file = newest / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (older / "rank-00000.safetensors").write_bytes((older / "rank-00000.safetensors").read_bytes()[:-1])
    code, out, _ = run("train", config_file)
    assert code == 0
    assert "checkpoint refused" in out
    assert "step-00000003/rank-00000.safetensors: altered" in out.replace("\n", "")
    assert "step-00000002/rank-00000.safetensors: has" in out.replace("\n", "")
    assert "resumed after step 1" in out
    assert steps_in(folder / "checkpoints")[0].name == "step-00000003"


def test_no_checkpoint_left_is_not_a_silent_start(run, config_file):
    folder = trained(run, config_file)
    for path in steps_in(folder / "checkpoints"):
        (path / "manifest.json").unlink()
    for _ in range(2):
        one_error(run("train", config_file), "no valid checkpoint is left", "manifest.json", "start from step 0")
    assert (folder / "metrics.jsonl").read_text(), "the record of what was is kept"


def test_another_model_or_other_data_is_not_gone_on_with(run, config_file, tmp_path):
    trained(run, config_file)
    one_error(run("train", config_file, "model.width=64"), "model.width = 64", "begun with 32", "run.name")
    one_error(run("train", config_file, "run.seed=2"), "run.seed = 2", "begun with 1")
    text_folder(tmp_path / "text")
    other = ("prepare", config_file, f"data.tokenizer_vocab={VOCAB}", "data.held_out=0.2")
    assert run(*other, "data.path=other", "data.tokenizer=data/tokenizer.json")[0] == 0
    one_error(
        run("train", config_file, "data.path=other"), "data.path: the data is not what the run", "fingerprint", "run.name"
    )
    assert run(*other, "data.path=foreign")[0] == 0
    one_error(run("train", config_file, "data.path=foreign"), "data.tokenizer: the data's tokenizer is not the one", "run.name")


def test_fewer_steps_than_are_done_is_not_a_stop(run, config_file):
    trained(run, config_file)
    one_error(run("train", config_file, "train.steps=2"), "train.steps = 2", "is at step 3 already")


def test_a_run_is_trained_by_one_process_at_a_time(run, config_file, monkeypatch):
    from mikoshi.trainer.record.run_folder import RunFolder

    folder = RunFolder(trained(run, config_file))
    monkeypatch.setattr(RunFolder.lock, "__defaults__", (0.2,))
    with folder.lock():
        one_error(run("train", config_file, "train.steps=9"), "another process is training this run")
    assert run("train", config_file, "train.steps=4")[0] == 0


def test_a_lone_rank_under_a_launcher_is_checked_like_any(config_file, tmp_path):
    shutil.rmtree(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mikoshi", "train", str(config_file)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "no prepared dataset" in done.stderr
    assert "Traceback" not in done.stderr


LONE = {"RANK": "0", "WORLD_SIZE": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-4]"}


@pytest.mark.parametrize(
    ("env", "command", "said"),
    [
        (LONE, "train --ranks 2", "--ranks 2: RANK=0 WORLD_SIZE=1 say that a launcher started this process as rank 0 of 1"),
        (LONE, "train --ranks 2", "leave out --ranks, or unset `RANK` and `WORLD_SIZE` to have 2 ranks started here"),
        (SRUN, "train --ranks 1", "--ranks 1: SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=4 say"),
        (LONE, "generate --ranks 2", "--ranks 2: RANK=0 WORLD_SIZE=1 say"),
        (
            SRUN,
            "compare --ranks 4",
            "SLURM_STEP_NUM_TASKS=4: `mikoshi compare` starts its ranks itself: run it once",
        ),
        (SRUN, "chaos", "`mikoshi chaos` starts its ranks itself"),
        (SRUN, "fit-batch", "`mikoshi fit-batch` starts its ranks itself"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "train", "RANK is empty"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "generate", "RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "fit-batch", "RANK=x"),
    ],
)
def test_a_launcher_that_contradicts_the_command_is_refused(run, config_file, tmp_path, monkeypatch, env, command, said):
    verb, *options = command.split()
    target = config_file
    if verb == "generate":
        target = tmp_path / "test"
        target.mkdir()
        shutil.copy(config_file, target / "config.toml")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    one_error(run(verb, target, *options), said)
    assert not (tmp_path / "runs").exists()


def test_ranks_that_agree_with_the_launcher_are_its_ranks(monkeypatch):
    for name, value in LONE.items():
        monkeypatch.setenv(name, value)
    assert launched_world() == launched_world(1) == World(0, 1, None, ("127.0.0.1", 29500))


@pytest.mark.parametrize(
    "other",
    [
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a[1-2]"},
    ],
)
def test_a_lone_place_among_the_ranks_of_another_launcher_is_refused(monkeypatch, other):
    for name, value in {**LONE, **other}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="two launchers"):
        launched_world()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one torchrun for each task")
    assert launched_world() == World(0, 1, None, ("127.0.0.1", 29500))


def test_a_changed_tokenizer_is_noticed(run, config_file, tmp_path):
    file = tmp_path / "data" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "</s>"))
    one_error(run("train", config_file), "tokenizer.json", "not the tokenizer that made the data")
    file.write_text("{")
    one_error(run("train", config_file), "is not a tokenizer.json")


def test_a_damaged_shard_is_found_when_preparing_again(run, config_file, tmp_path):
    text_folder(tmp_path / "text")
    again = ("prepare", config_file, "data.path=new", f"data.tokenizer_vocab={VOCAB}", "data.held_out=0.2")
    assert run(*again)[0] == 0
    assert "already prepared" in run(*again)[1]
    shard = tmp_path / "new" / "train-00000.shard"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    one_error(run(*again), "train-00000.shard", "do not match its digest")


def test_generate_and_report_of_what_is_not_there(run, config_file, tmp_path):
    one_error(run("generate", tmp_path / "runs" / "nothing"), "not a run folder")
    one_error(run("report", tmp_path / "runs" / "nothing"), "not a run folder")
    folder = trained(run, config_file)
    one_error(run("report", folder, "--out", tmp_path), "the report cannot be written there")
    one_error(run("report", folder, "--out", "/nosuch/x.html"), "the report cannot be written there")
    one_error(run("generate", folder, "--prompt", "\udcff"), "--prompt is not UTF-8 text")
    assert run("generate", folder, "--device", "tpu")[0] == 2
    assert run("generate", folder, "--seed", "9" * 30)[0] == 2
    one_error(run("generate", folder, "--top-p", "0"), "--top-p must be above 0")
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    one_error(run("generate", folder), "no checkpoint yet")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tp 2", "--tp 2: --ranks must be a multiple of 2, not 1: use --ranks 2, or leave out --tp"),
        ("--pp 2 --ranks 1", "--pp 2: --ranks must be a multiple of 2, not 1: use --ranks 2, or leave out --pp"),
        ("--tp 2 --pp 2 --ranks 6",
         "--tp 2 --pp 2: --ranks must be a multiple of 4, not 6: use --ranks 8, or leave out --tp and --pp"),
        ("--tp 3 --ranks 3", "parallel.tp 3 does not divide model.heads 4; nearest that work: parallel.tp=1"),
    ],
)  # fmt: skip
def test_generation_by_ranks_that_cannot_be_laid_out(run, config_file, tmp_path, options, said):
    (tmp_path / "test").mkdir()
    shutil.copy(config_file, tmp_path / "test" / "config.toml")
    one_error(run("generate", tmp_path / "test", *options.split()), f"error: {said}")


def test_full_disk_while_preparing(run, config_file, tmp_path):
    text_folder(tmp_path / "text")
    with small_disk(tmp_path / "small", 64 << 10) as disk:
        one_error(run("prepare", config_file, f"data.path={disk}/new"), "cannot write", os.strerror(errno.ENOSPC))
        assert not list(disk.iterdir())


def test_full_disk_while_saving(run, config_file, tmp_path):
    with small_disk(tmp_path / "small", 1 << 20) as disk:
        result = run("train", config_file, f"run.folder={disk}", "train.steps=9", "checkpoint.keep=20")
        one_error(result, "cannot be saved", os.strerror(errno.ENOSPC), "make room")
        assert "training goes on" in result[1]
        assert not left_over(disk)
        for path in steps_in(disk / "test" / "checkpoints"):
            verify(path)


def test_read_only_disk(run, config_file, tmp_path):
    with small_disk(tmp_path / "small", 1 << 20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        one_error(run("train", config_file, f"run.folder={disk}"), "cannot write to", os.strerror(errno.EROFS))
        text_folder(tmp_path / "text")
        one_error(run("prepare", config_file, f"data.path={disk}/new"), "cannot write", os.strerror(errno.EROFS))


def test_jsonl_and_parquet_sources_and_their_mistakes(run, config_file, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = text_folder(tmp_path / "text")
    rows = [{"body": path.read_text()} for path in sorted(text.iterdir())]
    shutil.rmtree(text)
    text.mkdir()
    (text / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    pq.write_table(pa.Table.from_pylist(rows[9:]), text / "b.parquet")
    prepare = ("prepare", config_file, f"data.tokenizer_vocab={VOCAB}", "data.text_column=body", "data.held_out=0.2")
    code, out, _ = run(*prepare, "data.path=good")
    assert code == 0
    assert f"{len(rows)} documents" in out
    one_error(run("prepare", config_file, "data.path=new"), "a.jsonl:1: no column: 'text'", "it has body")
    (text / "a.jsonl").write_text('{"body": "x"}\n{"body": \n')
    one_error(run(*prepare, "data.path=new"), "a.jsonl:2: not JSON")
    (text / "a.jsonl").write_text('{"body": "ab \\ud83d cd"}\n')
    one_error(run(*prepare, "data.path=new"), "a.jsonl:1: not text: half of a surrogate pair")
    assert run(*prepare, "data.path=skipped", "data.on_invalid=skip")[0] == 0
    (text / "a.jsonl").unlink()
    one_error(run("prepare", config_file, "data.path=new"), "b.parquet: no column: 'text'", "it has body")
    (text / "b.parquet").write_bytes(b"PAR1 no")
    one_error(run(*prepare, "data.path=new"), "b.parquet: unreadable file: not a whole Parquet file")


def test_help_and_schema(run):
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("prepare", "train", "generate", "layout", "dryrun", "report", "config"):
        assert verb in out
    code, out, _ = run("config", "--schema")
    assert "RunConfig" in json.loads(out)["title"]


def test_the_resolved_config_reads_back_to_itself(run, config_file):
    code, out, _ = run("config", config_file, "optim.lr=1e-3")
    assert code == 0
    Path("again.toml").write_text(out)
    assert run("config", "again.toml")[1] == out
