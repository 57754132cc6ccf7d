"""Schedules, decay groups and Muon against torch's own; what each parameter gets, against a list."""

import re

import pytest
import torch

from layouts import BASE, MODELS
from mikoshi.trainer.config.run import OptimSection, ScheduleSection, to_toml
from mikoshi.trainer.engines.optim import Optimizers, learning_rate, orthogonalise, treatment
from mikoshi.trainer.inspect.optimizer import parameter_treatments
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT
from runs import run_config


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


@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 6, 8)])
def test_muon_moves_every_matrix_of_a_stack_as_torchs_does_alone(shape):
    torch.manual_seed(2)
    stack = torch.nn.Parameter(torch.randn(shape))
    alone = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stack]
    ours = Optimizers([("blocks.0.mlp.experts.up", stack)], OptimSection(kind="muon", weight_decay=0.1))
    theirs = torch.optim.Muon(alone, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(shape) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]  # busy experts and idle ones
        stack.grad = gradient.clone()
        for matrix, part in zip(alone, gradient, strict=True):
            matrix.grad = part.clone()
        ours.step(lr=0.01)
        theirs.step()
    torch.testing.assert_close(stack.detach(), torch.stack(alone).detach(), atol=3e-4, rtol=0)


LIST = {
    "gpt2": """
        embed.weight adamw 0.1
        position.weight adamw 0.1
        blocks.0.attn_norm.weight adamw 0
        blocks.0.attn_norm.bias adamw 0
        blocks.0.attn.q.weight muon 0.1
        blocks.0.attn.q.bias adamw 0
        blocks.0.attn.k.weight muon 0.1
        blocks.0.attn.k.bias adamw 0
        blocks.0.attn.v.weight muon 0.1
        blocks.0.attn.v.bias adamw 0
        blocks.0.attn.out.weight muon 0.1
        blocks.0.attn.out.bias adamw 0
        blocks.0.mlp_norm.weight adamw 0
        blocks.0.mlp_norm.bias adamw 0
        blocks.0.mlp.up.weight muon 0.1
        blocks.0.mlp.up.bias adamw 0
        blocks.0.mlp.down.weight muon 0.1
        blocks.0.mlp.down.bias adamw 0
        norm.weight adamw 0
        norm.bias adamw 0
    """,
    "deepseek": """
        embed.weight adamw 0.1
        blocks.0.attn_norm.weight adamw 0
        blocks.0.attn.q.weight muon 0.1
        blocks.0.attn.k.weight muon 0.1
        blocks.0.attn.v.weight muon 0.1
        blocks.0.attn.out.weight muon 0.1
        blocks.0.attn.q_norm.weight adamw 0
        blocks.0.attn.k_norm.weight adamw 0
        blocks.0.mlp_norm.weight adamw 0
        blocks.0.mlp.router.weight adamw 0.1
        blocks.0.mlp.router.bias bias 0
        blocks.0.mlp.experts.gate muon 0.1
        blocks.0.mlp.experts.up muon 0.1
        blocks.0.mlp.experts.down muon 0.1
        blocks.0.mlp.shared.gate.weight muon 0.1
        blocks.0.mlp.shared.up.weight muon 0.1
        blocks.0.mlp.shared.down.weight muon 0.1
        norm.weight adamw 0
        head.weight adamw 0.1
    """,
}


def listed(kind):
    return [line.split() for line in LIST[kind].split("\n") if line.strip()]


@pytest.mark.parametrize("kind", LIST)
def test_what_each_parameter_gets(tmp_path, mikoshi, kind):
    model = BASE | MODELS[kind] | {"layers": 1, "qk_norm": kind == "deepseek"}
    if kind == "deepseek":
        model["moe"] = {**model["moe"], "first": 0}
    config = run_config(tmp_path / "data", tmp_path, model=model, optim={"kind": "muon", "lr": 0.02})
    found = [[row.name, row.optimizer, f"{row.weight_decay:g}"] for row in parameter_treatments(config)]
    assert sorted(found) == sorted(listed(kind))
    assert {row.rate for row in parameter_treatments(config)} == ({0.02, 0.01} if kind == "deepseek" else {0.02})
    (tmp_path / "run.toml").write_text(to_toml(config))
    code, out, _ = mikoshi("config", tmp_path / "run.toml", "--optim")
    printed = {line.split()[0]: line.split() for line in out.splitlines()}
    assert code == 0
    for name, optimizer, decay in listed(kind):
        assert printed[name][2:4] == [optimizer, decay], name


@pytest.mark.parametrize("kind", LIST)
def test_the_optimizers_do_what_the_list_says(kind):
    model = ModelConfig.model_validate(BASE | MODELS[kind] | {"layers": 2})
    for optim in ("muon", "adamw"):
        section = OptimSection(kind=optim)
        made = Optimizers(GPT(model).named_parameters(), section)
        moments = {}
        for name, _ in made.state():
            _, parameter, moment = re.fullmatch(r"(optim)\.(.+)\.(\w+)", name).groups()
            moments.setdefault(parameter, set()).add(moment)
        for name, p in GPT(model).named_parameters():
            kind_of = treatment(name, p.ndim, section, p.requires_grad).kind
            expected = {"muon": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}, "bias": set()}[kind_of]
            assert moments.get(name, set()) == expected, name


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_orthogonalised_singular_values_are_near_one(shape):
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.4
    assert values.max() < 1.3
