"""From a config to the layout that it asks for: the numbers of its model and batch that degrees must divide."""

from __future__ import annotations

from collections.abc import Callable

from mikoshi.parallel.layout import Asked, Batch, Layout, ModelFacts, plan
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.model.config import ModelConfig


def facts(model: ModelConfig) -> ModelFacts:
    """The numbers of a model that a layout must divide."""
    dense = any(not model.is_moe(layer) for layer in range(model.layers))
    moe = model.moe
    width = 0 if moe is None else moe.width or model.d_mlp
    return ModelFacts(
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.n_kv,
        vocab=model.vocab,
        mlp=model.d_mlp if dense else 0,
        experts=0 if moe is None else moe.experts,
        expert_mlp=width,
        shared_mlp=0 if moe is None else moe.shared * width,
    )


def plan_layout(config: RunConfig, world: int, serves: Callable[[Layout], bool] = lambda _: True) -> Layout:
    """The layout that a config asks for on `world` ranks, whatever its engine. `serves`: which of the nearest layouts may be
    named instead. Raises LayoutError with the reason and those."""
    p = config.parallel
    asked = Asked(
        zero=p.zero,
        replicas=p.replicas,
        tp=p.tp,
        pp=p.pp,
        cp=p.cp,
        ep=p.ep,
        expert_tp=p.expert_tp,
        virtual_stages=p.virtual_stages,
        schedule=p.schedule,
        context_kind=p.context_kind,
    )
    plain = not config.data.document_mask and config.model.position != "alibi" and not any(config.model.windows)
    batch = Batch(config.train.global_batch, config.train.micro_batch, config.train.context, plain)
    return plan(asked, world, facts(config.model), batch, serves)
