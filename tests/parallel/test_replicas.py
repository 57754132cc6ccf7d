"""Replicas that came apart are found to the last bit and named; those that did not raise no alarm, whatever the layout."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from layouts import BASE, MODELS, degrees
from mikoshi.parallel.replicas import Difference, differences, digest, find_differences
from mikoshi.parallel.sharding import local, local_region
from runs import engine_and_rows, run_config

LAYOUTS = [
    ("llama", 4, "zero=0"), ("gpt2", 4, "zero=3 replicas=2"), ("llama", 4, "tp=2 zero=0"), ("gpt2", 4, "tp=2 pp=2"),
    ("mixtral", 4, "ep=2 zero=0"),
]  # fmt: skip
MORE = [
    ("gpt2", 4, "zero=2 replicas=2"), ("palm", 4, "tp=2 pp=2"), ("llama", 4, "cp=2 zero=0"), ("deepseek", 4, "tp=2 ep=2"),
    ("deepseek", 4, "pp=2 zero=0"), ("gpt2", 4, "pp=2 schedule=zbv zero=0"),
    ("llama", 4, "zero=1"), ("llama", 4, "zero=2"), ("llama", 4, "zero=3"), ("gpt1", 4, "zero=0"), ("gpt1", 4, "tp=2 zero=0"),
    ("bloom", 4, "tp=4"), ("qwen3", 4, "tp=4"), ("palm", 4, "tp=2 zero=3"), ("palm", 4, "tp=4"), ("mistral", 4, "cp=4 zero=0"),
    ("llama", 4, "cp=2 context_kind=ulysses zero=0"), ("gpt2", 4, "cp=2 tp=2 zero=0"), ("gpt2", 4, "cp=2 pp=2 zero=0"),
    ("gpt2", 4, "pp=2 zero=0"), ("gpt2", 4, "pp=4"), ("bloom", 4, "pp=4"), ("gpt2", 4, "pp=2 schedule=dualpipev zero=0"),
    ("qwen3", 4, "pp=4 schedule=interleaved-zb"), ("gpt2", 4, "tp=2 pp=2 schedule=zbv"), ("mixtral", 4, "ep=4"),
    ("mixtral", 4, "ep=2 zero=3 replicas=2"), ("deepseek", 4, "ep=2 zero=0"), ("mixtral", 4, "tp=2 ep=2"),
    ("mixtral", 4, "tp=2 zero=0"), ("deepseek", 4, "tp=2 ep=4 expert_tp=1"), ("deepseek", 4, "tp=4"),
    ("mixtral", 4, "tp=2 ep=2 expert_tp=1 zero=0"), ("mixtral", 4, "cp=2 ep=2 zero=0"), ("mixtral", 4, "pp=2 ep=2"),
    ("deepseek", 4, "pp=2 tp=2 schedule=zbv"), ("llama", 3, "zero=0"), ("gpt2", 6, "tp=2 zero=0"), ("llama", 6, "pp=2 zero=0"),
    ("gpt2", 8, "tp=2 pp=2 zero=0"), ("deepseek", 8, "ep=2 zero=3 replicas=2"), ("mixtral", 8, "ep=2 tp=2 pp=2 zero=0"),
    ("mixtral", 8, "ep=2 tp=2 cp=2 zero=0"), ("qwen3", 8, "tp=2 pp=2 replicas=2 schedule=dualpipev"),
]  # fmt: skip


def layouts():
    cases = [(case, []) for case in LAYOUTS]
    cases += [(case, [pytest.mark.soak if number % 4 else pytest.mark.slow]) for number, case in enumerate(MORE)]
    return [pytest.param(*case, id="-".join(map(str, case)), marks=marks) for case, marks in cases]


def flip(tensor, bit):
    """One bit of this rank's piece."""
    raw = local(tensor).detach().reshape(-1).view(torch.uint8)
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8


def compared(config, bit):
    """After three steps: what is said of the honest state; for one tensor of each kind, and each rank that holds it
    together with others, who was hurt by a flipped bit, who holds the same, and what is said; and of the state mended."""
    engine, loader = engine_and_rows(config)
    assert all(engine.step(loader.batch(step), 1e-3).applied for step in range(3))
    state, rank = engine.state(), dist.get_rank()
    mine = {name: local_region(t) for name, t in state.items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    honest, told = find_differences(state.items(), engine.groups), []
    for name, _, holders in shared_pieces(everyone):
        hurt = holders[bit % len(holders)]
        if rank == hurt:
            flip(state[name], bit * 7919)
        told.append((name, hurt, holders, find_differences(state.items(), engine.groups)))
        if rank == hurt:
            flip(state[name], bit * 7919)
    return honest, told, find_differences(state.items(), engine.groups)


def shared_pieces(everyone):
    """Of every kind of tensor, and number of holders, one piece that several ranks hold."""
    held = {}
    for rank, pieces in enumerate(everyone):
        for name, where in pieces.items():
            held.setdefault((name, where), []).append(rank)
    chosen = {}
    for (name, (offset, shape)), holders in sorted(held.items()):
        if len(holders) > 1 and 0 not in shape:
            kind = "".join(c for c in name if not c.isdigit())
            chosen.setdefault(
                (kind if "embed" in name else kind.rpartition(".")[2], len(holders)), (name, (offset, shape), holders)
            )
    return list(chosen.values())


@pytest.mark.parametrize(("model", "world", "layout"), layouts())
@pytest.mark.parametrize("optim", ["adamw", pytest.param("muon", marks=pytest.mark.soak)])
def test_a_flipped_bit_is_named_and_honest_replicas_are_not(ranks, dataset, tmp_path, model, world, layout, optim):
    config = run_config(
        dataset, tmp_path, model=BASE | MODELS[model], parallel=degrees(layout), train={"global_batch": 24},
        optim={"kind": optim},
    )  # fmt: skip
    found = ranks.run(compared, config, len(layout), world=world)
    assert all(rank == found[0] for rank in found), "the same on every rank"
    honest, told, mended = found[0]
    assert honest == mended == []
    assert told or layout.startswith("pp=4"), "steps of AdamW, at least, are held by several ranks"
    for name, hurt, holders, (difference,) in told:
        odd, certain = ((hurt,), True) if len(holders) > 2 else (tuple(holders), False)
        assert difference == Difference(name, odd, tuple(holders), certain)


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]),
    st.integers(1, 70), st.integers(0, 3), st.data(),
)  # fmt: skip
@settings(deadline=None)
def test_a_digest_is_of_the_values_wherever_they_lie_and_of_every_bit(dtype, size, offset, data):
    values = torch.randint(0, 2, (size,)).to(dtype) if dtype == torch.bool else torch.randn(size).mul(99).to(dtype)
    inside = torch.zeros(size + 8, dtype=dtype)
    inside[offset : offset + size] = values
    assert digest(inside[offset : offset + size]).item() == digest(values).item()
    assert digest(values[None].expand(2, -1)[:, :]).item() == digest(torch.stack((values, values))).item()
    other = values.clone()
    raw = other.view(torch.uint8)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(raw) - 1), min_size=1, max_size=3, unique=True)):
        raw[bit // 8] ^= 1 << bit % 8
    assert digest(other).item() != digest(values).item()
    if size > 1 and not torch.equal(values, values.roll(1)):
        assert digest(values.roll(1)).item() != digest(values).item()


def test_a_digest_of_several_chunks_sees_the_last_bit_of_each():
    values = torch.zeros((1 << 21) * 2 + 5)
    found = {digest(values).item()}
    places = [0, (1 << 21) - 1, 1 << 21, (1 << 22) - 1, 1 << 22, (1 << 22) + 4]
    for place_ in places:
        values[place_] = 1e-45  # the lowest bit alone
        found.add(digest(values).item())
        values[place_] = 0
    assert len(found) == len(places) + 1


def test_not_a_number_and_minus_zero_are_bits_like_others():
    odd = torch.tensor([float("nan"), 0.0])
    assert digest(odd).item() == digest(odd.clone()).item()
    assert digest(odd).item() != digest(torch.tensor([float("nan"), -0.0])).item()


def told(*digests, name="model.w"):
    return [[(name, ((0,), (4,)), value)] if value is not None else [] for value in digests]


def test_who_is_odd():
    assert differences(told(1, 1, 1)) == []
    (most,) = differences(told(1, 2, None, 1, 3))
    assert (most.ranks, most.holders, most.certain) == ((1, 4), (0, 1, 3, 4), True)
    assert str(most) == "model.w on ranks 1, 4 is not what it is on 0, 3"
    (even,) = differences(told(1, 1, 2, 2))
    assert (even.ranks, even.certain) == ((0, 1, 2, 3), False)
    assert str(even) == "model.w is not the same on ranks 0, 1, 2, 3, and which of them is wrong cannot be told"
