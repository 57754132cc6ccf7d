"""The `[engine]` part of a run's schema: what computes a step, and the settings of other makers' engines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, field_validator

from mikoshi.trainer.config.data import Count, Section

Kind = Literal["native", "deepspeed", "megatron"]


class DeepSpeedSection(Section):
    """Of engine.kind "deepspeed". What the run's own sections say (batch, optimizer, ZeRO stage, precision) goes without."""

    config: Path | None = Field(
        None,
        description="a DeepSpeed JSON with further settings, from the current folder; what contradicts the run is refused",
    )
    settings: dict[str, JsonValue] = Field({}, description="the same, written here: over what the file says")
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description='where optimizer state is kept (parallel.offload = "optimizer": cpu)'
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = Field("none", description="where parameters are kept (zero 3)")
    nvme: Path | None = Field(None, description="a folder that is there, on a local NVMe disk, for offload to nvme")
    hpz: Count = Field(1, description="ZeRO++: ranks of a secondary copy of the parameters, those of a node (zero 3)")
    quantized_weights: bool = Field(False, description="ZeRO++: parameters are gathered in int8 (zero 3, CUDA)")
    quantized_gradients: bool = Field(False, description="ZeRO++: gradients are reduced in int4 (zero 3, CUDA)")


class MegatronSection(Section):
    """Of engine.kind "megatron"."""

    transformer_engine: Literal["auto", "on", "off"] = Field(
        "auto", description="layers of Transformer Engine; auto: on CUDA where it is installed"
    )
    fp8: bool = Field(False, description="matrix products in FP8 (Transformer Engine on a GPU that has it)")


class EngineSection(Section):
    """Which engine computes the step, on which device and in which precision."""

    kind: Kind = Field("native", description="what computes a step; checkpoints are the same, and any resumes them")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="what ranks compute on; auto: GPUs where there are any")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="bf16: compute in bf16, master weights in fp32; fp32: all of it, without TF32; auto: as the run was begun, "
        "a new one in bf16 on GPUs that have it where the engine can, else in fp32",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations made again in backward: none, all but matrix products, all of a block"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of each block; auto: on CUDA, where the engine can"
    )
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    megatron: MegatronSection = MegatronSection()

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, given: object) -> object:
        if given == "fp16":
            raise ValueError("fp16 needs losses to be scaled, and CPUs do not compute in it: use bf16, which needs neither")
        return given
