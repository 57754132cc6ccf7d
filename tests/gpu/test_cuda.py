"""What only a GPU can show: the same bits and losses as on CPU, FlexAttention, compiled bf16 blocks, experts, memory."""

import pytest
import torch

from mikoshi.parallel.process.process_group import World, join, leave
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.model import attention, loss
from mikoshi.trainer.model.gpt import GPT
from runs import GPT2_MODEL, TINY_MODEL, data_layout, loader_of, run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def group():
    join(World(), CUDA)
    yield
    leave()


def steps(config, device, count=4):
    layout = data_layout(config, 1, 0)
    loader, engine = loader_of(config, layout, 0), build_engine(config, layout, device)
    first = {name: p.detach().float().cpu().clone() for name, p in engine.named}
    return first, [engine.step(loader.batch(step), 1e-3) for step in range(count)]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("mask", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(
    "model",
    [TINY_MODEL, GPT2_MODEL, {**TINY_MODEL, "position": "alibi"}, {**TINY_MODEL, "windows": (0, 16)}],
    ids=["llama", "gpt2", "alibi", "windows"],
)
def test_cuda_trains_the_run_that_the_cpu_trains(dataset, tmp_path, model, mask):
    torch.backends.cuda.matmul.allow_tf32 = False
    # FlexAttention wants heads of at least 16 elements.
    config = run_config(dataset, tmp_path, model={**model, "width": 64}, data={"document_mask": mask})
    first_cpu, on_cpu = steps(config, torch.device("cpu"))
    first_gpu, on_gpu = steps(config, CUDA)
    assert all(torch.equal(first_cpu[name], first_gpu[name]) for name in first_cpu), "initial weights, to the bit"
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_bf16_compiled_follows_fp32(dataset, tmp_path, recompute):
    model = {**TINY_MODEL, "width": 128}
    engine = {"precision": "bf16", "recompute": recompute}
    _, exact = steps(run_config(dataset, tmp_path, model=model, engine={"compile": "off"}), CUDA)
    _, found = steps(run_config(dataset, tmp_path, model=model, engine=engine), CUDA)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=5e-3)


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("alibi", [False, True])
def test_compiled_flex_attention_is_the_dense_mask(window, alibi):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 512, 64, device=CUDA, requires_grad=True) for heads in (8, 2, 2))
    docs = (torch.arange(512, device=CUDA) // 150).expand(2, -1)
    slopes = attention.alibi_slopes(8, CUDA) if alibi else None
    positions = torch.arange(512, device=CUDA)
    flex = attention.flex_mask(window, 512, None, docs, slopes, CUDA)
    dense = attention.dense_mask(window, positions, positions, docs, slopes, torch.float32)
    ours, theirs = attention.attend(q, k, v, flex), attention.attend(q, k, v, dense)
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)
    weight = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), (q, k, v)),
                    torch.autograd.grad((theirs * weight).sum(), (q, k, v)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_the_loss_needs_far_less_than_the_logits():
    x = torch.randn(8, 2048, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(131_072, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 131_072, (8, 2048), device=CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.next_token_loss(x, w, labels).backward()
    logits = 8 * 2048 * 131_072 * 4
    assert torch.cuda.max_memory_allocated() - before < logits / 4


def test_generation_with_a_cache(dataset, tmp_path):
    config = run_config(dataset, tmp_path)
    torch.manual_seed(0)
    model = GPT(config.model).to(CUDA)
    from mikoshi.trainer.generation.generate import Sampling, generate

    found = list(generate(model, [1, 2, 3], 20, Sampling(0.0), end=-1))
    with torch.no_grad():
        ids = [1, 2, 3]
        for token in found:
            assert int(model(torch.tensor([ids], device=CUDA))[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.usefixtures("group")
def test_optimizer_state_in_the_hosts_memory_changes_nothing(dataset, tmp_path):
    plain = run_config(dataset, tmp_path, engine={"compile": "off"})
    offloaded = run_config(dataset, tmp_path, engine={"compile": "off"}, parallel={"offload": "optimizer"})
    for ours, theirs in zip(steps(offloaded, CUDA)[1], steps(plain, CUDA)[1], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)


@pytest.mark.usefixtures("group")
def test_grouped_products_train_the_experts_that_the_cpu_trains(dataset, tmp_path):
    model = {**TINY_MODEL, "width": 64, "moe": {"experts": 4, "top_k": 2, "width": 64, "aux_loss": 0.01}}
    exact = steps(run_config(dataset, tmp_path, model=model, engine={"compile": "off"}), CUDA)[1]
    found = steps(run_config(dataset, tmp_path, model=model, engine={"compile": "off", "precision": "bf16"}), CUDA)[1]
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=5e-3)
        assert ours.more["experts_idle"] == theirs.more["experts_idle"]


def test_a_dry_run_tells_what_the_gpu_then_holds(dataset, tmp_path):
    from mikoshi.trainer.estimate.dryrun import dry_run

    model = {"vocab": 8192, "context": 1024, "layers": 8, "width": 512, "heads": 8, "kv_heads": 4}
    config = run_config(
        dataset, tmp_path, model=model, train={"context": 64, "global_batch": 64, "micro_batch": 32},
        engine={"compile": "off", "precision": "bf16"}, data={"document_mask": False},
    )  # fmt: skip
    told = dry_run(config, 1, 0)
    join(World(), CUDA)
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps(config, CUDA, count=2)
        held = torch.cuda.max_memory_allocated() - before
    finally:
        leave()
    assert told.device_peak == pytest.approx(held, rel=0.02)
