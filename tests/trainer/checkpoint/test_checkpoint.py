"""A checkpoint is whole or not there; any world size restores it; any changed byte is found by name."""

import random
import shutil

import pytest
import torch

from manifests import resigned
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.saver import save
from mikoshi.trainer.checkpoint.verify import step_folder, steps_in, verify
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.errors import CheckpointError
from runs import GPT2_MODEL, data_layout, loader_of, run_config

RECORD = {"config": "x = 1", "fingerprint": "f"}


def tensors(seed=0):
    torch.manual_seed(seed)
    return {"model.w": torch.randn(40, 3), "model.b": torch.randn(5).bfloat16(), "optim.w.step": torch.tensor(7.0)}


def test_round_trip_without_a_process_group(tmp_path):
    state = tensors()
    save(tmp_path, 3, state, RECORD, keep=2)
    path, manifest, rejected = newest_valid(tmp_path)
    assert (manifest.step, manifest.record["config"], rejected) == (3, "x = 1", [])
    found = {name: torch.zeros_like(t) for name, t in state.items()}
    load(path, manifest, found)
    assert all(torch.equal(found[name], state[name]) for name in state)
    for file in step_folder(tmp_path, 3).iterdir():
        assert b"\x80\x04" not in file.read_bytes()[:4], "no pickle"


def trained(config, zero):
    import torch.distributed as dist

    layout = data_layout(config, dist.get_world_size(), zero)
    engine = build_engine(config, layout, torch.device("cpu"))
    loader = loader_of(config, layout, dist.get_rank())
    for step in range(2):
        engine.step(loader.batch(step), 1e-2)
    return engine


def whole(engine):
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in engine.state().items()}


def save_trained(config, zero, folder):
    engine = trained(config, zero)
    save(folder, 2, engine.state(), RECORD, keep=3)
    return whole(engine)


def save_later(config, zero, folder):
    save(folder, 3, trained(config, zero).state(), RECORD, keep=3)


def restore_fresh(config, zero, folder):
    import torch.distributed as dist

    engine = build_engine(config, data_layout(config, dist.get_world_size(), zero), torch.device("cpu"))
    path, manifest, _ = newest_valid(folder)
    state = engine.state()
    load(path, manifest, state)
    engine.load_state(state)
    return whole(engine)


@pytest.mark.parametrize(
    ("optim", "model"),
    [
        pytest.param("adamw", GPT2_MODEL, id="adamw-gpt2"), pytest.param("muon", {}, id="muon-llama"),
        pytest.param("adamw", {}, id="adamw-llama", marks=pytest.mark.slow),
        pytest.param("muon", GPT2_MODEL, id="muon-gpt2", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_any_layout_restores_any_other_to_the_bit(ranks, dataset, tmp_path, model, optim):
    config = run_config(dataset, tmp_path, model=model, optim={"kind": optim})
    for saver, zero in [(4, 3), (2, 0)]:
        folder = tmp_path / f"{saver}-{zero}"
        saved = ranks.run(save_trained, config, zero, folder, world=saver)[0]
        for world, other in [(1, 0), (2, 2), (4, 1), (4, 3)]:
            for found in ranks.run(restore_fresh, config, other, folder, world=world):
                assert found.keys() == saved.keys()
                for name, tensor in found.items():
                    assert torch.equal(tensor, saved[name]), name


def damage(path, how, rng):
    file = path if path.is_file() else rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    if how == "flip":
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del content[rng.randrange(len(content)) :]
    elif how == "zero":
        at = rng.randrange(len(content) - 16)
        content[at : at + 16] = b"\0" * 16 if any(content[at : at + 16]) else b"\1" * 16
    elif how == "delete":
        file.unlink()
        return file
    elif how == "stray":
        file = path / "extra.safetensors"
        content = b"surprise"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("how", ["flip", "truncate", "zero", "delete", "stray"])
def test_any_damage_is_refused_by_name_and_the_older_step_is_used(tmp_path, how):
    rng = random.Random(how)
    pristine = tmp_path / "pristine"
    for step in (1, 2):
        save(pristine, step, tensors(step), RECORD, keep=5)
    for number in range(24):
        folder = tmp_path / f"{number}"
        shutil.copytree(pristine, folder)
        hurt = damage(step_folder(folder, 2), how, rng)
        _path, manifest, rejected = newest_valid(folder)
        assert manifest.step == 1
        assert len(rejected) == 1
        assert hurt.name in rejected[0]
        assert (folder / "damaged-step-00000002").exists()


def save_on_ranks(folder, steps):
    """Two files a rank: the second holds what did not fit in the first."""
    from mikoshi.trainer.checkpoint import plan

    whole, plan.FILE_BYTES = plan.FILE_BYTES, 500
    try:
        for step in steps:
            save(folder, step, {**tensors(step), "model.c": torch.full((40, 3), float(step))}, RECORD, keep=5)
    finally:
        plan.FILE_BYTES = whole


def test_swapped_files_are_refused_by_name_whether_of_one_step_or_two(ranks, tmp_path):
    ranks.run(save_on_ranks, tmp_path / "pristine", [1, 2, 3], world=2)
    names = sorted(p.name for p in (tmp_path / "pristine" / "step-00000003").iterdir())
    assert len(names) >= 3
    swaps = [(one, 3, other, 3) for one in names for other in names if one < other]
    swaps += [(name, 3, name, 2) for name in names]
    for number, (one, step, other, beside) in enumerate(swaps):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "pristine", folder)
        here, there = step_folder(folder, step) / one, step_folder(folder, beside) / other
        mine, theirs = here.read_bytes(), there.read_bytes()
        assert mine != theirs
        here.write_bytes(theirs)
        there.write_bytes(mine)
        saved, manifest, rejected = newest_valid(folder)
        assert manifest.step == saved.step == (2 if beside == 3 else 1)
        assert any(name in rejected[0] for name in (one, other))
        assert len(rejected) == (1 if beside == 3 else 2)


def test_by_sizes_alone_a_changed_byte_passes_and_a_missing_one_does_not(tmp_path):
    save(tmp_path, 1, tensors(), RECORD, keep=5)
    file = step_folder(tmp_path, 1) / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert newest_valid(tmp_path, digests=False)[1].step == 1
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: has"):
        newest_valid(tmp_path, digests=False)


def test_every_load_compares_xxh3_and_leaves_sha256_to_who_asks_for_it(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, tensors(), RECORD, keep=5)
    newest = step_folder(tmp_path, 2)
    resigned(newest, digests={"sha256": "0" * 64})
    assert newest_valid(tmp_path)[1].step == 2
    resigned(newest, digests={"xxh3": "0" * 32})
    _, manifest, rejected = newest_valid(tmp_path)
    assert (manifest.step, len(rejected)) == (1, 1)
    assert "rank-00000.safetensors: altered: its bytes do not match the manifest's XXH3" in rejected[0]


def test_without_a_valid_one_nothing_starts_over_silently(tmp_path):
    save(tmp_path, 1, tensors(), RECORD, keep=5)
    (step_folder(tmp_path, 1) / "rank-00000.safetensors").unlink()
    for _ in range(2):  # a restart must not take the refusal for an empty folder
        with pytest.raises(CheckpointError, match=r"no valid checkpoint is left.*rank-00000.*missing.*start from step 0"):
            newest_valid(tmp_path)


def test_a_reader_beside_a_live_run_moves_nothing(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, tensors(), RECORD, keep=5)
    (step_folder(tmp_path, 2) / "rank-00000.safetensors").unlink()
    before = sorted(p.name for p in tmp_path.iterdir())
    _, manifest, rejected = newest_valid(tmp_path, set_aside=False)
    assert (manifest.step, len(rejected)) == (1, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def verdict(folder):
    _, manifest, rejected = newest_valid(folder)
    return manifest.step, rejected


def test_the_ranks_share_out_the_verification_and_agree(ranks, dataset, tmp_path):
    config = run_config(dataset, tmp_path)
    ranks.run(save_trained, config, 3, tmp_path / "c", world=4)
    ranks.run(save_later, config, 3, tmp_path / "c", world=4)
    file = tmp_path / "c" / "step-00000003" / "rank-00003.safetensors"  # read by the last rank alone
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for step, rejected in ranks.run(verdict, tmp_path / "c", world=4):
        assert step == 2
        assert "rank-00003.safetensors: altered" in rejected[0]


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path):
    stale = tmp_path / ".step-00000033.partial"
    stale.mkdir()
    (stale / "rank-00000.safetensors").write_bytes(b"half")
    save(tmp_path, 40, tensors(), RECORD, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000040"]


def test_a_linked_file_is_refused(tmp_path):
    save(tmp_path, 1, tensors(), RECORD, keep=5)
    file = step_folder(tmp_path, 1) / "rank-00000.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify(file.parent)


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, tensors(), RECORD, keep=2)
    assert [p.name for p in steps_in(tmp_path)] == ["step-00000005", "step-00000004"]
    assert len(list(tmp_path.iterdir())) == 2


def test_never_written_over_another(tmp_path):
    save(tmp_path, 1, tensors(), RECORD, keep=2)
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path, 1, tensors(), RECORD, keep=2)
    verify(step_folder(tmp_path, 1))


def failing_save(folder, failing_rank):
    import resource

    import torch.distributed as dist

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        mine = {f"model.{dist.get_rank()}": torch.ones(400), "model.shared": torch.ones(100)}
        save(folder, 1, mine, RECORD, keep=2)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_what_one_rank_cannot_write_is_told_to_all_and_leaves_nothing(ranks, tmp_path, failing_rank):
    for message in ranks.run(failing_save, tmp_path / "c", failing_rank, world=2):
        assert f"rank {failing_rank}: File too large; nothing was left behind" in message
    assert not list((tmp_path / "c").iterdir())


def test_a_missing_tensor_is_named(tmp_path):
    save(tmp_path, 1, tensors(), RECORD, keep=2)
    path, manifest, _ = newest_valid(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.other"):
        load(path, manifest, {"model.other": torch.zeros(2)})
