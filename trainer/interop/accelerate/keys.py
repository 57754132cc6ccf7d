"""The names that accelerate's config files use, and why some of them need no setting here."""

from __future__ import annotations

FSDP_STRATEGIES = {
    "FULL_SHARD": (3, False),
    "SHARD_GRAD_OP": (2, False),
    "NO_SHARD": (0, False),
    "HYBRID_SHARD": (3, True),
    "HYBRID_SHARD_ZERO2": (2, True),
}
"""FSDP1's strategies in its own order: the ZeRO stage that each is, and whether each machine holds a replica."""

OTHER_KINDS = (
    "XLA", "TPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU", "MULTI_NEURON",
)  # fmt: skip
"""Distributed types of devices that no engine here uses."""

LAUNCHING = ("machine_rank", "rdzv_backend", "same_network", "main_training_function", "tpu_use_cluster", "tpu_use_sudo")
"""Keys that our launcher finds out by itself or does not need."""

PREFIXES = {
    "": "", "fsdp_config": "fsdp_", "deepspeed_config": "", "megatron_lm_config": "megatron_lm_",
    "parallelism_config": "parallelism_config_", "dynamo_config": "dynamo_",
}  # fmt: skip
"""Tables that are read, the whole file first, and the optional prefix of their keys."""

KEYS = {
    "": """compute_environment distributed_type mixed_precision use_cpu debug num_processes machine_rank num_machines gpu_ids
        main_process_ip main_process_port rdzv_backend same_network main_training_function enable_cpu_affinity fp8_config
        deepspeed_config fsdp_config parallelism_config megatron_lm_config mpirun_config downcast_bf16 tpu_name tpu_zone
        tpu_use_cluster tpu_use_sudo command_file commands tpu_vm tpu_env dynamo_config dynamo_backend fp16 ipex_config
        deepspeed_config_file""",
    "fsdp_config": """activation_checkpointing activation_checkpointing_offload auto_wrap_policy backward_prefetch
        backward_prefetch_policy cpu_ram_efficient_loading forward_prefetch min_num_params offload_params reshard_after_forward
        sharding_strategy state_dict_type sync_module_states transformer_layer_cls_to_wrap use_orig_params version""",
    "deepspeed_config": """deepspeed_config_file zero_stage offload_optimizer_device offload_param_device
        offload_optimizer_nvme_path offload_param_nvme_path gradient_accumulation_steps gradient_clipping zero3_init_flag
        zero3_save_16bit_model deepspeed_hostfile deepspeed_exclusion_filter deepspeed_inclusion_filter
        deepspeed_multinode_launcher deepspeed_moe_layer_cls_names""",
    "megatron_lm_config": """attention_backend attention_dropout attention_softmax_in_fp32 calculate_per_token_loss
        context_parallel_size decoder_last_pipeline_num_layers eod_mask_loss expert_model_parallel_size
        expert_tensor_parallel_size gradient_clipping hidden_dropout no_load_optim no_save_optim num_micro_batches
        optimizer_cpu_offload overlap_cpu_optimizer_d2h_h2d pp_degree recompute_activations recompute_granularity
        recompute_method recompute_num_layers sequence_parallelism tp_degree use_custom_fsdp use_distributed_optimizer
        use_precision_aware_optimizer use_rotary_position_embeddings""",
    "parallelism_config": """cp_backend cp_comm_strategy cp_size dp_replicate_size dp_shard_size sp_attn_implementation
        sp_backend sp_seq_length sp_seq_length_is_variable sp_size tp_size""",
    "dynamo_config": "backend mode use_dynamic use_fullgraph use_regional_compilation",
}
"""The keys of each table without the prefix: all of accelerate 1.15's, and older ones."""

_ALWAYS_SO = "always so"
_BY_BLOCK = "every block is a unit of its own, always"
_NO_SCRIPT = "no script is run"
_HOSTS = "hosts stand in a cluster file, see `mikoshi submit --on ssh`"

ALWAYS = {
    "fsdp_config.fsdp_auto_wrap_policy": _BY_BLOCK,
    "fsdp_config.fsdp_transformer_layer_cls_to_wrap": _BY_BLOCK,
    "fsdp_config.fsdp_min_num_params": _BY_BLOCK,
    "fsdp_config.fsdp_use_orig_params": _ALWAYS_SO,
    "fsdp_config.fsdp_sync_module_states": "each rank makes its own shard of the same initial weights",
    "fsdp_config.fsdp_cpu_ram_efficient_loading": "each rank makes its own shard of the same initial weights",
    "fsdp_config.fsdp_state_dict_type": "checkpoints are sharded, and any layout resumes them",
    "deepspeed_config.zero3_init_flag": "no rank ever holds the whole model",
    "deepspeed_config.zero3_save_16bit_model": "weights are written by `mikoshi checkpoint export`",
    "deepspeed_config.deepspeed_multinode_launcher": _HOSTS,
    "deepspeed_config.deepspeed_hostfile": _HOSTS,
    "deepspeed_config.deepspeed_exclusion_filter": _HOSTS,
    "deepspeed_config.deepspeed_inclusion_filter": _HOSTS,
    "megatron_lm_config.megatron_lm_sequence_parallelism": "ranks of tensor parallelism always share the sequence out as well",
    "megatron_lm_config.megatron_lm_calculate_per_token_loss": _ALWAYS_SO,
    "megatron_lm_config.megatron_lm_use_rotary_position_embeddings": "model.position says it",
    "parallelism_config.parallelism_config_cp_backend": "parallel.context_kind says it",
    "parallelism_config.parallelism_config_sp_backend": "parallel.context_kind says it",
    "enable_cpu_affinity": "`mikoshi submit` binds ranks to cores by itself",
    "commands": _NO_SCRIPT,
    "command_file": _NO_SCRIPT,
}
"""Dotted keys that may be left out of a run's settings, and why."""
