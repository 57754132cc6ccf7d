"""From a config to the layout that it asks for: the sizes of its model and batch that the degrees must divide."""

from __future__ import annotations

from collections.abc import Callable

from mikoshi.parallel.layout import BatchShape, Layout, ModelFacts, RequestedLayout, resolve_layout
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.model.config import ModelConfig


def facts(model: ModelConfig) -> ModelFacts:
    """Returns the sizes of a model that a layout must divide."""
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


def plan_layout(config: RunConfig, world: int, supports: Callable[[Layout], bool] = lambda _: True) -> Layout:
    """Returns the layout that a config asks for on `world` ranks, whatever its engine.

    Raises LayoutError with the reason and the nearest layouts that work.

    supports: which of the nearest layouts the error may name.
    """
    p = config.parallel
    requested = RequestedLayout(
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
    batch = BatchShape(config.train.global_batch, config.train.micro_batch, config.train.context, plain)
    return resolve_layout(requested, world, facts(config.model), batch, supports)
