"""The DataLoader for accelerate and transformers: the rows of `mikoshi train`, its loss and gradients, its state."""

import contextlib
import json
import os
import shutil
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, ParallelismConfig
from torch.utils.data import DataLoader

from mikoshi.data.dataset.rows import IGNORED
from mikoshi.data.errors import DataError
from mikoshi.data.loader.resume_state import make_record
from mikoshi.data.prepare.prepare import Recipe, prepare
from mikoshi.data.sources.text import SourceSpec
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.feed.feed import open_feed
from mikoshi.trainer.interop import dataloader
from mikoshi.trainer.interop.dataloader import TrainingBatches, training_batches
from mikoshi.trainer.interop.huggingface import load_into, model_config
from mikoshi.trainer.model.gpt import GPT
from runs import VOCAB, data_layout, loader_of, run_config, text_folder

SMALL = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
LLAMA = hf.LlamaConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                       intermediate_size=48, max_position_embeddings=64)  # fmt: skip
GPT2 = hf.GPT2Config(**SMALL, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
KINDS = [pytest.param(c, a, id=f"{c.model_type}-{a}") for c in (LLAMA, GPT2) for a in ("eager", "sdpa")]
FIT = {"packing": "fit"}
WORDS = ["the", "loss", "of", "a", "token", "says", "what", "its", "model", "knew", "before"]


@pytest.fixture(autouse=True)
def no_accelerate_left():
    yield
    reset_accelerate()


def reset_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)


def launched_by_accelerate():
    """What `accelerate launch --cpu` would tell this rank of the pool."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, ACCELERATE_USE_CPU="true")
    os.environ["OMP_NUM_THREADS"] = "1"


@contextlib.contextmanager
def accelerate_here(**how):
    launched_by_accelerate()
    try:
        yield Accelerator(cpu=True, **how)
    finally:
        reset_accelerate()


def config_of(dataset, folder=Path("runs"), data=(), **train):
    return run_config(
        dataset, folder, data={"path": str(dataset), **dict(data)}, train=train, optim={"schedule": {"warmup": 0}}
    )


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Prompts of all lengths with answers of all lengths, alone learned: several documents a row, and tokens to predict that
    are spread unevenly over the rows."""
    folder, rng = tmp_path_factory.mktemp("chats"), np.random.default_rng(2)
    with (folder / "chats.jsonl").open("w") as out:
        for _ in range(400):
            prompt, answer = (" ".join(rng.choice(WORDS, int(rng.geometric(share)))) for share in (0.08, 0.15))
            out.write(json.dumps({"prompt": prompt, "response": answer}) + "\n")
    prepare(Recipe(SourceSpec(str(folder / "chats.jsonl"), chat="chatml"), vocab=VOCAB, held_out=0.1), folder / "dataset")
    return folder / "dataset"


def tiny(config, attention="sdpa"):
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = hf.AutoModelForCausalLM.from_config(config).float()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model.train()


def native(config, steps=None):
    """The global batches that one rank of `mikoshi train` reads."""
    loader = loader_of(config, data_layout(config, 1, 0), 0)
    return [loader.batch(step) for step in range(config.train.steps if steps is None else steps)]


def joined(parts, key):
    return np.concatenate([p[key].numpy() for p in parts])


def predicted(batch):
    return int((batch.labels != IGNORED).sum())


@pytest.mark.parametrize("data", [{}, FIT, {"document_mask": False}], ids=["cut", "fit", "one-document"])
def test_batches_are_the_rows_that_a_run_reads(dataset, data):
    config = config_of(dataset, data=data, global_batch=10)
    batches = training_batches(config, micro_batches=3, documents=True)
    assert len(batches) == 15
    found = list(batches)
    assert [len(b["input_ids"]) for b in found] == [3, 3, 4] * 5
    for step, expected in enumerate(native(config)):
        parts = found[3 * step : 3 * step + 3]
        assert np.array_equal(joined(parts, "input_ids"), expected.tokens)
        assert np.array_equal(joined(parts, "shift_labels"), expected.labels)
        docs = np.zeros_like(expected.tokens) if expected.docs is None else expected.docs
        positions = np.arange(64)[None].repeat(10, 0) if expected.positions is None else expected.positions
        assert np.array_equal(joined(parts, "document_ids"), docs)
        assert np.array_equal(joined(parts, "position_ids"), positions)
        assert np.array_equal(joined(parts, "labels")[:, 1:], expected.labels[:, :-1])
        assert all(float(p["num_items_in_batch"]) == pytest.approx(predicted(expected) / 3) for p in parts)


def ranks_rows(config):
    return [
        (b["input_ids"].numpy(), b["shift_labels"].numpy(), b["num_items_in_batch"].item()) for b in training_batches(config)
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_of_torch_distributed_share_every_batch(dataset, ranks, world):
    config = config_of(dataset, steps=3)  # 8 rows: the last of three ranks has one of padding
    found = ranks.run(ranks_rows, config, world=world)
    for step, expected in enumerate(native(config)):
        tokens, labels, items = zip(*(rank[step] for rank in found), strict=True)
        assert np.array_equal(np.concatenate(tokens)[:8], expected.tokens)
        assert np.array_equal(np.concatenate(labels)[:8], expected.labels)
        assert (np.concatenate(labels)[8:] == IGNORED).all()
        assert items == pytest.approx([predicted(expected) / world] * world)


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_the_loss_is_that_by_hand_and_that_of_our_model(chats, kind, attention):
    config, model = config_of(chats, data=FIT, steps=1), tiny(kind, attention)
    (batch,), (rows,) = list(training_batches(config)), native(config)
    assert (rows.docs.max(1) > 0).any(), "rows of several documents are what this is about"
    out = model(**batch)
    by_hand = F.cross_entropy(out.logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten(), reduction="sum")
    assert out.loss.item() == pytest.approx(by_hand.item() / predicted(rows), rel=1e-6)

    ours = GPT(model_config(kind))
    load_into(ours, kind.model_type, model.state_dict(), ours.config)
    results = ours(*(torch.from_numpy(a) for a in (rows.tokens, rows.labels, rows.docs, rows.positions)))
    assert out.loss.item() == pytest.approx(results.item() / predicted(rows), rel=1e-5)

    # Where transformers shifts `labels` itself, all but the last token of every row is the same.
    del batch["shift_labels"], batch["num_items_in_batch"]
    rest = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), torch.from_numpy(rows.labels[:, :-1]).flatten())
    assert model(**batch).loss.item() == pytest.approx(rest.item(), rel=1e-6)


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_a_document_does_not_see_the_one_before_it(chats, kind, attention):
    model = tiny(kind, attention)
    (batch,) = training_batches(config_of(chats, data=FIT, steps=1), documents=True)
    documents = batch.pop("document_ids")
    row = int((documents.amax(1) > 0).nonzero()[0])
    later = documents[row] > 0
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][row, ~later] = (other["input_ids"][row, ~later] + 7) % VOCAB
    with torch.no_grad():
        logits, changed = model(**batch).logits[row], model(**other).logits[row]
        assert torch.equal(logits[later], changed[later]) and not torch.equal(logits[~later], changed[~later])
        # It is `use_cache` that does it: with transformers' default, positions alone keep nothing apart.
        del batch["use_cache"], other["use_cache"]
        assert not torch.allclose(model(**batch).logits[row][later], model(**other).logits[row][later], atol=1e-3)


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_a_flat_batch_is_one_row_of_the_same_loss(chats, kind, attention):
    config, model = config_of(chats, data=FIT, steps=1), tiny(kind, attention)
    (rows,), (flat,) = training_batches(config), training_batches(config, flat=True, documents=True)
    assert flat["input_ids"].shape == (1, 8 * 64)
    ids = flat.pop("document_ids")[0]
    begins = flat["position_ids"][0] == 0
    assert len(ids.unique()) == begins.sum() == ids[-1] + 1
    one, all_ = model(**rows), model(**flat)
    torch.testing.assert_close(all_.logits.view_as(one.logits), one.logits, atol=1e-4, rtol=1e-4)
    assert all_.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
    del flat["shift_labels"]  # shifted by transformers over the rows' borders, only the last token of all is lost
    flat["num_items_in_batch"] = flat["num_items_in_batch"] - int(rows["shift_labels"][-1, -1] != IGNORED)
    without_last = rows["shift_labels"].clone()
    without_last[-1, -1] = IGNORED
    expected = F.cross_entropy(one.logits.flatten(0, 1), without_last.flatten())
    assert model(**flat).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def gradients_of_ranks(config, accumulated, mean_of_means=False):
    """Under accelerate: the mean of the first step's losses, and the gradients that DDP leaves on every rank."""
    with accelerate_here(gradient_accumulation_steps=accumulated) as accelerator:
        batches = training_batches(config)
        assert batches.micro_batches == accumulated
        model, prepared = accelerator.prepare(tiny(LLAMA), batches)
        assert prepared is batches
        losses = []
        for batch in prepared:
            if mean_of_means:
                del batch["num_items_in_batch"]
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                losses.append(loss.item())
        assert accelerator.sync_gradients
        grads = {name: p.grad.clone() for name, p in accelerator.unwrap_model(model).named_parameters()}
        return float(np.mean(losses)), grads


@pytest.mark.parametrize(("world", "accumulated"), [(1, 4), (2, 1), (2, 2), (3, 3)])
def test_ranks_and_accumulation_change_neither_loss_nor_gradients(chats, ranks, world, accumulated):
    config = config_of(chats, data=FIT, steps=1)
    (rows,), model = native(config), tiny(LLAMA)
    counts = (rows.labels != IGNORED).sum(1)
    assert counts.max() > 3 * counts.min(), "rows of unlike weight are what this is about"
    tokens, labels, positions = (torch.from_numpy(a) for a in (rows.tokens, rows.labels, rows.positions))
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    found = ranks.run(gradients_of_ranks, config, accumulated, world=world)
    assert np.mean([results for results, _ in found]) == pytest.approx(loss.item(), rel=1e-6)
    for _, grads in found:
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
    if world == 2:  # without the count, the mean of means is another loss
        results = [results for results, _ in ranks.run(gradients_of_ranks, config, accumulated, True, world=world)]
        assert abs(np.mean(results) - loss.item()) > 1e-4


@pytest.fixture(scope="module")
def streaming(tmp_path_factory):
    """Settings of a run straight from text."""
    folder = tmp_path_factory.mktemp("streaming")
    tokenizer = {"tokenizer": "bytes", "held_out": 0.1, "stream": True, "lanes": 8}
    return {"path": str(folder / "apart"), "source": str(text_folder(folder / "text")), **tokenizer}


def read_on(config, state, steps, micro_batches):
    """This rank's tokens of `steps` steps after a state, and the state after them."""
    batches = training_batches(config, micro_batches=micro_batches)
    if state is not None:
        batches.load_state_dict(state)
    rows = [batch["input_ids"].numpy() for _, batch in zip(range(steps * micro_batches), batches, strict=False)]
    return np.concatenate(rows).reshape(steps, -1, 64), batches.state_dict()


@pytest.mark.parametrize("kind", ["prepared", "stream"])
def test_another_number_of_ranks_goes_on_with_the_very_next_sample(dataset, ranks, streaming, kind):
    config = config_of(dataset, data=streaming if kind == "stream" else {}, steps=12)
    whole = [batch["input_ids"].numpy() for batch in training_batches(config)]
    state, step = None, 0
    for world, steps, parts in ((2, 3, 2), (1, 4, 1), (4, 2, 2), (3, 3, 1)):
        found = ranks.run(read_on, config, state, steps, parts, world=world)
        for n in range(steps):
            assert np.array_equal(np.concatenate([rows[n] for rows, _ in found])[:8], whole[step + n])
        states = [json.dumps(message) for _, message in found]
        assert len(set(states)) == 1, "every rank tells the same, and plain values"
        state, step = json.loads(states[0]), step + steps
    assert (state["samples"], state["global_batch"]) == (96, 8)


def test_the_state_is_the_record_of_a_run(dataset):
    config = config_of(dataset)
    batches = training_batches(config)
    read = [batch["input_ids"] for _, batch in zip(range(3), batches, strict=False)]
    feed = open_feed(config)
    loader = loader_of(config, data_layout(config, 1, 0), 0)
    list(loader.stream(0, 3))
    record = make_record(loader, 3, feed.identity, feed.continued(None).history, lambda n: n)
    assert batches.state_dict() == {**record, "global_batch": 8}
    other = training_batches(config)
    other.load_state_dict(record)
    assert len(read) == 3 and len(other) == 2
    going = iter(other)
    assert np.array_equal(next(going)["input_ids"], native(config)[3].tokens)
    other.load_state_dict(record)
    assert not list(going), "what was begun before the state has ended"
    assert np.array_equal(next(iter(other))["input_ids"], native(config)[3].tokens)


def test_a_state_of_other_data_is_refused(dataset, tmp_path):
    config = config_of(dataset)
    batches = training_batches(config, micro_batches=2)
    with pytest.raises(DataError, match=r"1 of the 2 batches of step 1 .* after optimizer\.step"):
        next(iter(batches))
        batches.state_dict()
    next(iter(batches))
    state = batches.state_dict()

    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = next(copy.glob("train*"))
    blob = bytearray(shard.read_bytes())
    middle = slice(len(blob) // 4, len(blob) // 4 * 2)
    blob[middle] = bytes(b ^ 1 for b in blob[middle])
    shard.write_bytes(blob)
    with pytest.raises(DataError):
        training_batches(config_of(copy)).load_state_dict(state)

    for other, named in (
        (config.model_copy(update={"run": config.run.model_copy(update={"seed": 2})}), r"run\.seed"),
        (config_of(dataset, global_batch=4), r"train\.global_batch = 4"),
        (config_of(dataset, steps=0), r"train\.steps = 0"),
        (config_of(dataset, data=FIT), r"data\.packing"),
    ):
        refusing = training_batches(other)
        with pytest.raises(DataError, match=named):
            refusing.load_state_dict(state)
        assert refusing.state_dict()["samples"] == 0, "as it was"
    with pytest.raises(DataError, match="_num_yielded is not one of training_batches"):
        batches.load_state_dict({"_num_yielded": 3})


@pytest.mark.parametrize("kind", ["prepared", "stream"])
def test_an_iterator_goes_on_where_the_last_was_left(dataset, streaming, kind):
    config = config_of(dataset, data=streaming if kind == "stream" else {})
    whole = [b["input_ids"] for b in training_batches(config, micro_batches=2)]
    batches = training_batches(config, micro_batches=2)
    threads = threading.active_count()
    before = torch.get_rng_state()
    left = iter(batches)
    found = [next(left)["input_ids"] for _ in range(3)]
    found += [batch["input_ids"] for _, batch in zip(range(2), batches, strict=False)]
    assert not list(left), "it has ended with the next"
    found += [b["input_ids"] for b in batches]
    assert len(found) == len(whole) == 10 and all(map(torch.equal, found, whole))
    assert not list(batches) and threading.active_count() == threads
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn from the user's generator"


def test_a_later_start(dataset, streaming):
    config = config_of(dataset)
    found = [b["input_ids"].numpy() for b in training_batches(config, start_step=3)]
    assert all(map(np.array_equal, found, [b.tokens for b in native(config)[3:]])) and len(found) == 2
    with pytest.raises(ConfigError, match="start_step = 6"):
        training_batches(config, start_step=6)
    with pytest.raises(ConfigError, match=r"start_step = 3.*load_state_dict"):
        training_batches(config_of(dataset, data=streaming), start_step=3)


@pytest.mark.parametrize("settings", [{}, {"dispatch_batches": False}, {"split_batches": True}], ids=str)
def test_prepare_leaves_it_as_it_is(dataset, settings):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
    batches = training_batches(config_of(dataset))
    assert accelerator.prepare(batches) is batches
    assert accelerator.prepare_data_loader(batches) is batches


def test_another_dataloader_is_refused(dataset, tmp_path):
    accelerator = Accelerator(cpu=True)
    dataset_ = training_batches(config_of(dataset)).dataset
    for other in (DataLoader(dataset_, batch_size=None), DataLoader(dataset_, batch_size=2)):
        for wrapped in (other, accelerator.prepare(other)):
            with pytest.raises(ConfigError, match=r"given to another DataLoader.*the DataLoader that training_batches returns"):
                next(iter(wrapped))
    args = hf.TrainingArguments(tmp_path, use_cpu=True, max_steps=1, report_to=[])
    with pytest.raises(ConfigError, match="Trainer's train_dataset"):
        hf.Trainer(tiny(LLAMA), args, train_dataset=training_batches(config_of(dataset)).dataset).train()
    with pytest.raises(ConfigError, match="leave num_workers at 0"):
        next(iter(DataLoader(dataset_, batch_size=None, num_workers=1)))


def test_what_cannot_be_is_refused_by_name(dataset):
    config = config_of(dataset)
    for how, named in (
        (dict(rank=1), "rank = 1, world = None: give both"),
        (dict(rank=2, world=2), "rank = 2"),
        (dict(rank=0, world=2), "world = 2: the process group is of 1"),
        (dict(micro_batches=9), "micro_batches = 9: a rank has 8 rows"),
        (dict(micro_batches=0), "micro_batches = 0"),
    ):
        with pytest.raises(ConfigError, match=named):
            training_batches(config, **how)
    with pytest.raises(ConfigError, match=r"micro_batches = 2: batches of 4 .* more than train.micro_batch 2: give 4"):
        training_batches(config_of(dataset, micro_batch=2), micro_batches=2)
    assert training_batches(config_of(dataset, micro_batch=3)).micro_batches == 3
    Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 2: leave one out"):
        training_batches(config, micro_batches=4)
    assert training_batches(config).micro_batches == 2
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps = 2: batches of 4"):
        training_batches(config_of(dataset, micro_batch=2))
    AcceleratorState._shared_state["parallelism_config"] = ParallelismConfig(tp_size=2)
    with pytest.raises(
        ConfigError, match="parallelism_config several ranks read the same rows: give the rank, world and group"
    ):
        training_batches(config)
    assert next(iter(training_batches(config, rank=0, world=1)))["input_ids"].shape == (4, 64)


def wrong_groups(config):
    """On 2 ranks: what is said where accelerate knows of one process, and where `world` is not the group's."""
    results = []
    for how in ({}, {"rank": 0, "world": 1}, {"rank": 0, "world": 3}):
        PartialState(cpu=True)
        try:
            training_batches(config, **how)
            results.append("")
        except ConfigError as error:
            results.append(str(error))
        finally:
            reset_accelerate()
    alone = training_batches(config, group=dist.new_group([dist.get_rank()], use_local_synchronization=True))
    return [*results, next(iter(alone))["input_ids"].shape]


def test_ranks_that_do_not_agree_with_the_process_group(dataset, ranks):
    for two, one, three, shape in ranks.run(wrong_groups, config_of(dataset), world=2):
        assert "accelerate knows of 1 processes and torch.distributed of 2" in two
        assert one == "" and "world = 3: the process group is of 2" in three
        assert shape == (8, 64)


def example():
    """The script in the module's docstring."""
    lines = dataloader.__doc__.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("    from"))
    end = next(n for n, line in enumerate(lines) if "save_state" in line)
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def run_example(folder):
    """The script as it stands, in this folder; the weights that it leaves."""
    launched_by_accelerate()
    names = {}
    try:
        with contextlib.chdir(folder):
            exec(compile(example(), "example", "exec"), names)
        assert isinstance(names["batches"], TrainingBatches)
        assert names["accelerator"].num_processes == dist.get_world_size()
    finally:
        reset_accelerate()
    model = names["accelerator"].unwrap_model(names["model"])
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_example_on_two_processes_is_the_same_run_and_goes_on_with_one(dataset, ranks, tmp_path):
    def write(folder, steps):
        folder.mkdir(exist_ok=True)
        (folder / "run.toml").write_text(to_toml(config_of(dataset, data=FIT, steps=steps)))
        tiny(LLAMA).save_pretrained(folder / "model")
        return folder

    (whole,) = ranks.run(run_example, write(tmp_path / "whole", 5), world=1)
    ranks.run(run_example, write(tmp_path / "parts", 3), world=2)
    (parts,) = ranks.run(run_example, write(tmp_path / "parts", 5), world=1)
    begun = tiny(LLAMA).state_dict()
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-3, atol=2e-5)
        assert not torch.allclose(expected, begun[name], rtol=1e-3, atol=2e-5), "it has learned something"


class Trainer(hf.Trainer):
    def get_train_dataloader(self):
        self.batches = training_batches(self.config, micro_batches=self.args.gradient_accumulation_steps)
        return self.batches

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append((inputs["input_ids"].clone(), int(num_items_in_batch)))
        return super().training_step(model, inputs, num_items_in_batch)


def test_the_trainer_resumes_with_the_next_sample(dataset, tmp_path):
    config = config_of(dataset, data=FIT)

    def train(stop, resume=None):
        args = hf.TrainingArguments(
            tmp_path, use_cpu=True, gradient_accumulation_steps=2, num_train_epochs=1, save_steps=2, save_strategy="steps",
            max_steps=stop, report_to=[], disable_tqdm=True, logging_steps=1, learning_rate=1e-3, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(tiny(LLAMA), args)
        trainer.config, trainer.seen = config, []
        trainer.train(resume_from_checkpoint=resume)
        reset_accelerate()
        return trainer

    first = train(2)
    resumed = train(5, str(tmp_path / "checkpoint-2"))
    seen = first.seen + resumed.seen
    rows = native(config)
    assert len(seen) == 10
    for step, expected in enumerate(rows):
        assert np.array_equal(np.concatenate([tokens.numpy() for tokens, _ in seen[2 * step : 2 * step + 2]]), expected.tokens)
        assert {items for _, items in seen[2 * step : 2 * step + 2]} == {predicted(expected)}
    out = tiny(LLAMA)(torch.from_numpy(rows[0].tokens), position_ids=torch.from_numpy(rows[0].positions), use_cache=False)
    by_hand = F.cross_entropy(out.logits.flatten(0, 1), torch.from_numpy(rows[0].labels).flatten())
    assert first.state.log_history[0]["loss"] == pytest.approx(by_hand.item(), rel=1e-3)


def test_accelerate_is_not_needed(dataset, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "accelerate"]:
        monkeypatch.setitem(sys.modules, name, None)
    batches = training_batches(config_of(dataset, micro_batch=4))
    assert batches.micro_batches == 2 and len(list(batches)) == 10
