"""Schedules, decay groups and Muon against torch's own."""

import pytest
import torch

from trainer.config import OptimSection, ScheduleSection
from trainer.optim import Optimizers, learning_rate, orthogonalise


def rates(kind, steps=100, **settings):
    return [learning_rate(1.0, ScheduleSection(kind=kind, **settings), s, steps) for s in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_linearly_and_peaks(kind):
    found = rates(kind, warmup=10, decay=20)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(found) == 1.0


def test_the_ends_of_the_schedules():
    assert rates("cosine", warmup=10, final=0.1)[-1] == pytest.approx(0.1)
    assert rates("cosine", final=0.0)[49] == pytest.approx(0.5)
    assert rates("linear", final=0.2)[-1] == pytest.approx(0.2)
    wsd = rates("wsd", decay=20, final=0.0)
    assert wsd[:80] == [1.0] * 80
    assert wsd[89] == pytest.approx(0.5)
    assert wsd[-1] == 0.0
    assert rates("constant", final=0.0)[-1] == 1.0


def test_cosine_is_torchs():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.1)
    for ours in rates("cosine", final=0.1):
        optimizer.step()
        theirs.step()
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)


def model():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleDict({"0": torch.nn.Linear(6, 8)})
    m = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 6), "blocks": blocks, "norm": torch.nn.LayerNorm(6)})
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    return m


def test_decay_touches_matrices_only():
    m = model()
    before = {n: p.clone() for n, p in m.named_parameters()}
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    Optimizers(m.named_parameters(), OptimSection(weight_decay=0.5)).step(lr=0.1)
    for name, p in m.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.ndim == 2 else 1.0), msg=name)


def test_muon_is_torchs_on_one_rank_and_only_for_hidden_matrices():
    ours, theirs = model(), model()
    optimizers = Optimizers(ours.named_parameters(), OptimSection(kind="muon", weight_decay=0.1))
    *adamw, muon = optimizers.optimizers
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(8, 6)]
    assert sum(len(g["params"]) for a in adamw for g in a.param_groups) == 4
    torchs = torch.optim.Muon(
        [theirs["blocks"]["0"].weight], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        optimizers.step(lr=0.01)
        torchs.step()
    # torch iterates in bf16, ours on CPU in fp32: they agree to bf16's rounding of an update of 0.01 x 0.2 x sqrt(8).
    torch.testing.assert_close(ours["blocks"]["0"].weight, theirs["blocks"]["0"].weight, atol=3e-4, rtol=0)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_orthogonalised_singular_values_are_near_one(shape):
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.4
    assert values.max() < 1.3
