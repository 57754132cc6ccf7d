"""Any layout that is accepted for a model builds and steps, as one rank does; any other is refused before a rank starts."""

from typing import get_args

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mikoshi.parallel.errors import LayoutError
from mikoshi.parallel.schedule import Schedule
from mikoshi.trainer.engines.layout import layout_of
from runs import figures, run_config

MODELS = st.fixed_dictionaries(
    {
        "vocab": st.sampled_from([384, 400, 386]),
        "layers": st.integers(1, 6),
        "width": st.sampled_from([32, 48]),
        "heads": st.sampled_from([2, 4, 6]),
        "kv_heads": st.sampled_from([1, 2, 3]),
        "head_dim": st.just(8),
        "mlp_width": st.sampled_from([48, 64]),
        "position": st.sampled_from(["rotary", "learned", "alibi"]),
        "norm": st.sampled_from(["rmsnorm", "layernorm"]),
        "norm_order": st.sampled_from(["pre", "post"]),
        "qk_norm": st.booleans(),
        "tied": st.booleans(),
        "windows": st.sampled_from([(0,), (8, 0), (5,)]),
        "moe": st.none()
        | st.fixed_dictionaries(
            {
                "experts": st.sampled_from([2, 4, 6]),
                "top_k": st.sampled_from([1, 2]),
                "width": st.sampled_from([16, 24]),
                "shared": st.sampled_from([0, 1]),
                "router": st.sampled_from(["softmax", "sigmoid"]),
                "aux_loss": st.sampled_from([0.0, 0.01]),
                "bias_rate": st.sampled_from([None, 0.01]),
            }
        ),
    }
)
LAYOUTS = st.fixed_dictionaries(
    {
        "zero": st.sampled_from([0, 1, 2, 3]),
        "tp": st.sampled_from([1, 1, 2, 4]),
        "pp": st.sampled_from([1, 1, 2, 4]),
        "cp": st.sampled_from([1, 1, 2]),
        "ep": st.sampled_from([1, 1, 2, 4]),
        "expert_tp": st.sampled_from([None, 1]),
        "replicas": st.sampled_from([None, None, 2]),
        "schedule": st.sampled_from(get_args(Schedule)),
        "context_kind": st.sampled_from(["all-gather", "ring", "ulysses"]),
    }
)


def accepted(ranks, dataset, folder, world, model, layout, mask, recompute):
    """Whether the layout can be; if so, it has computed what one rank does."""
    made = {k: v for k, v in model.items() if v is not None}
    try:
        config = run_config(
            dataset, folder, model=made, parallel={k: v for k, v in layout.items() if v is not None},
            train={"context": 32, "global_batch": 16}, data={"document_mask": mask}, engine={"recompute": recompute},
        )  # fmt: skip
        layout_of(config, world)
    except (LayoutError, ValidationError):
        return False
    note(str(config.parallel))
    plain = run_config(
        dataset, folder, model=made, train={"context": 32, "global_batch": 16}, data={"document_mask": mask}
    )  # fmt: skip
    (alone,) = ranks.run(figures, plain, 2, world=1)
    for found in ranks.run(figures, config, 2, world=world):
        for (loss, norm, tokens), (loss1, norm1, tokens1) in zip(found, alone, strict=True):
            assert tokens == tokens1
            assert loss == pytest.approx(loss1, rel=1e-5)
            assert norm == pytest.approx(norm1, rel=1e-5)
    return True


@pytest.mark.parametrize(
    "examples",
    [
        6,
        pytest.param(12, marks=pytest.mark.slow),
        pytest.param(100, marks=pytest.mark.slow),
        pytest.param(1000, marks=pytest.mark.soak),
    ],
)
def test_drawn_layouts(ranks, dataset, tmp_path, examples):
    ran = []

    @given(st.sampled_from([2, 4]), MODELS, LAYOUTS, st.booleans(), st.sampled_from(["none", "none", "full", "selective"]))
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def drawn(world, model, layout, mask, recompute):
        ran.append(accepted(ranks, dataset, tmp_path, world, model, layout, mask, recompute))

    drawn()
    assert ran.count(True) >= min(4, examples // 2), "the draw must reach layouts that run"
    assert ran.count(False) >= min(4, examples // 2)
