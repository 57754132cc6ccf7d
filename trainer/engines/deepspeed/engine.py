"""The DeepSpeed engine: the plain GPT under ZeRO 0 to 3, with DeepSpeed's offload and sequence parallelism. Initial weights,
losses and checkpoints are the native engine's.

DeepSpeed averages gradients over all ranks. Here they are gradients of the summed loss, so that ranks may have different
numbers of tokens, and the optimizer turns them into gradients of the mean. DeepSpeed's own checkpoints are pickles and are
neither written nor read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mikoshi.data.dataset.rows import Batch
from mikoshi.parallel.layout import Layout
from mikoshi.parallel.mesh import Groups
from mikoshi.parallel.pipeline import Inputs
from mikoshi.parallel.process.heartbeat import send_heartbeat
from mikoshi.parallel.replicas import Difference, find_differences
from mikoshi.parallel.sharding import local, sum_of_squares
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.base import NO_STEP_LIMITS, StepLimits, StepResult, gradient_factor, step_result
from mikoshi.trainer.engines.batches import local_positions, micro_batches, scale_balance_losses, select_positions, single_row
from mikoshi.trainer.engines.deepspeed.model import build_model, read_full, shape_of, write_full
from mikoshi.trainer.engines.deepspeed.optim import MOMENTS, GatedAdamW
from mikoshi.trainer.engines.deepspeed.setup import import_deepspeed, initialize, settings
from mikoshi.trainer.engines.deepspeed.swap import swap_folder
from mikoshi.trainer.engines.native.engine import Loads, expert_metrics
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.model.init import Region
from mikoshi.trainer.model.loss import IGNORED
from mikoshi.trainer.model.moe import MoE


class DeepSpeedEngine:
    """`Engine` on deepspeed.initialize. Builds collectively."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        device: torch.device,
        groups: Groups,
        fill_weights: Callable[..., None],
    ) -> None:
        """Build the engine. Collective.

        groups: the result of make_groups for the layout.
        fill_weights: writes a region of a parameter's initial values.
        """
        self.config, self.layout, self.device, self.groups = config, layout, device, groups
        self.coordinates = layout.coordinates(dist.get_rank())
        self.index = local_positions(layout, self.coordinates, config.train.context)
        deepspeed = import_deepspeed(device)
        swap, self._remove_swap = swap_folder(config, dist.get_rank(), self)
        ds_config = settings(config, layout, device, swap)
        deepspeed.init_distributed(dist_init_required=False)
        self.model, module = self._build(deepspeed, ds_config)
        self.named = list(self.model.named_parameters())
        self.experts = [
            (int(name), block.mlp) for name, block in self.model.blocks.items() if isinstance(block.mlp, MoE)
        ]  # fmt: skip
        self.optimizer = GatedAdamW(self.named, config.optim)
        # The ranks over which the state of this rank's layers is sharded.
        self.mesh = init_device_mesh(device.type, (layout.pp, layout.stage_ranks), mesh_dim_names=("pp", "all"))["all"]
        self.deepspeed = initialize(deepspeed, module, self.optimizer, ds_config, config.engine.deepspeed.config)
        for name, p in self.named:
            write_full(p, None, self._initial(name, p, fill_weights), layout, self.optimizer)
        self._take_empty_step()
        # With ZeRO 3 these are the rank's own pieces; gathered parameters exist only temporarily.
        self.parameters: list[nn.Parameter] = [getattr(p, "ds_tensor", p) for _, p in self.named]

    def step(self, rows: Batch, lr: float, limits: StepLimits = NO_STEP_LIMITS) -> StepResult:
        """See `Engine.step`."""
        micros = micro_batches(rows, self.layout, self.index, self.config.train.context, self.device)
        self._weigh_balance(rows)
        loss = self._backward(micros)
        send_heartbeat("reduce")
        squares = self._squares()
        loss_sum, tokens, squares_sum, loads = self._sums(loss, rows, squares)
        ranks, more = self.layout.world, expert_metrics(loads)
        # DeepSpeed does not call the optimizer if a gradient is not finite.
        not_finite = step_result(loss_sum, tokens, float("nan" if loss_sum != loss_sum else "inf"), limits, more)
        results: list[StepResult] = []

        def factor() -> float | None:
            """Of DeepSpeed's gradients, the mean over ranks of those of the summed loss."""
            results[:] = [step_result(loss_sum, tokens, self._norm(squares_sum) * ranks, limits, more)]
            own_factor = gradient_factor(results[0], self.config.optim.clip)
            return None if own_factor is None else own_factor * ranks

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        send_heartbeat("update")
        self.optimizer.factor = factor
        self.deepspeed.step()
        (result,) = results or [not_finite]
        self.optimizer.steps_taken += result.applied
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], known: int | None = None) -> float | None:
        """See `Engine.evaluate`."""
        self.model.known = known
        loss_sum, tokens = 0.0, 0
        for rows in batches:
            micros = micro_batches(rows, self.layout, self.index, self.config.train.context, self.device)
            losses = self._predict(micros)
            loss = torch.stack(losses).double().sum() if losses else torch.zeros((), dtype=torch.float64, device=self.device)
            batch_loss, batch_tokens, *_ = self._sums(loss, rows, torch.zeros_like(loss))
            loss_sum, tokens = loss_sum + batch_loss, tokens + batch_tokens
        return loss_sum / tokens if tokens else None

    @torch.no_grad()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """See `Engine.next_logits`."""
        context = self.config.train.context
        ids = ids[-context:]
        (micro,) = micro_batches(self.own_positions(single_row(ids, context)), self.layout, self.index, context, self.device)
        outputs = self._predict([{key: value for key, value in micro.items() if key != "labels_BT"}])
        logits_V = torch.zeros(self.config.model.vocab, device=self.device)
        positions = np.arange(context) if self.index is None else self.index
        found = np.flatnonzero(positions == len(ids) - 1)
        if outputs and len(found) and self.coordinates.data == 0:
            logits_V += outputs[0][0, found[0]].float()
        dist.all_reduce(logits_V)
        return logits_V

    def state(self) -> dict[str, Tensor]:
        """Returns each rank's rows of every tensor, in host memory; see `Engine.state`.

        Tensors are put together whole one after another.
        """
        out: dict[str, Tensor] = {
            name: self._sharded_rows(read_full(p, key, self.layout, self.optimizer)) for name, p, key in self._state_items()
        }
        return out | {f"optim.{name}.step": torch.tensor(float(self.optimizer.steps_taken)) for name, _ in self.named}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`.

        Raises CheckpointError if the parameters have taken different numbers of steps.
        """
        steps = {float(tensor) for name, tensor in state.items() if name.startswith("optim.") and name.endswith(".step")}
        if len(steps) > 1:
            raise CheckpointError(
                f"its parameters have taken different numbers of steps, from {min(steps):.0f} to {max(steps):.0f}, which "
                'DeepSpeed cannot go on with: use engine.kind="native"'
            )
        for name, p, key in self._state_items():
            if name in state:
                write_full(p, key, self._full(state[name]), self.layout, self.optimizer)
        if steps:
            self.optimizer.steps_taken = round(steps.pop())

    def replica_differences(self) -> list[Difference]:
        """See `Engine.replica_differences`.

        Compares what DeepSpeed keeps whole on every rank: the model below ZeRO 3, and at ZeRO 0 the moments.
        """
        replicated = [] if self.layout.zero == 3 else [(f"model.{name}", p.detach()) for name, p in self.named]
        if self.layout.zero == 0:
            moments = ((name, p, key) for name, p in self.named for key in MOMENTS)
            replicated += [(f"optim.{name}.{key}", self.optimizer.state[p][key]) for name, p, key in moments]
        return find_differences(replicated, self.groups)

    def close(self) -> None:
        """Remove this rank's swap folder, if it has one."""
        self._remove_swap()

    def own_positions(self, rows: Batch) -> Batch:
        """Returns whole rows reduced to the positions that this rank holds."""
        return select_positions(rows, self.index)

    def _build(self, deepspeed: Any, ds_config: dict[str, Any]) -> tuple[GPT, nn.Module]:
        """Returns this rank's part of the model, here all of it, and the module that DeepSpeed runs."""
        model = build_model(deepspeed, self.config, self.layout, self.groups, self.coordinates, self.device, ds_config)
        return model, model

    def _backward(self, micros: Sequence[Inputs]) -> Tensor:
        """Compute the gradients of the summed loss of all micro-batches; returns that loss."""
        losses = []
        for number, micro in enumerate(micros, 1):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(micros))
            send_heartbeat("forward")
            loss = self.deepspeed(**micro)
            send_heartbeat("backward")
            # A clone: DeepSpeed divides the gradient of the tensor that forward returned by the number of micro-batches, unless
            # backward was called on a tensor computed from it.
            self.deepspeed.backward(loss.clone(), scale_wrt_gas=False)
            losses.append(loss.detach().double())
        return torch.stack(losses).sum()

    def _weigh_balance(self, rows: Batch) -> None:
        scale_balance_losses([layer for _, layer in self.experts], self.config.model, rows, self.layout.pp, self.device)

    def _squares(self) -> Tensor:
        """At ZeRO 0 this rank's share of the sum of the squares of DeepSpeed's gradients, which are then the same on all."""
        gradients = [p.grad for _, p in self.named if p.grad is not None] if self.layout.zero == 0 else []
        return sum_of_squares(gradients, self.layout.world).to(self.device)

    def _predict(self, micros: Sequence[Inputs]) -> list[Tensor]:
        """Returns what the model returns for each micro-batch; an empty list on ranks without its last layer."""
        self.deepspeed.eval()
        try:
            return [self.deepspeed(**micro) for micro in micros]
        finally:
            self.deepspeed.train()

    def _sums(self, loss: Tensor, rows: Batch, squares: Tensor) -> tuple[float, int, float, Loads]:
        """Loss, predicted tokens, squares and every expert's rows, over all ranks."""
        moe = self.config.model.moe
        tokens_share = torch.tensor(float((rows.labels >= 0).sum()) / self.layout.pp, dtype=torch.float64)
        loads = torch.zeros(0 if moe is None else self.config.model.layers, 0 if moe is None else moe.experts)
        loads = loads.to(self.device, torch.float64)
        for layer, module in self.experts:
            loads[layer] = module.take_load()
        figures_and_loads = torch.cat(
            (torch.stack([figure.to(loss) for figure in (loss, tokens_share, squares)]), loads.flatten())
        )
        dist.all_reduce(figures_and_loads)
        loss_sum, tokens, squares_sum, *summed_loads = figures_and_loads.tolist()
        return loss_sum, round(tokens), squares_sum, np.reshape(summed_loads, loads.shape)

    def _norm(self, squares: float) -> float:
        """Returns the norm of DeepSpeed's gradients over all ranks, before the optimizer's step.

        DeepSpeed reports the norm only after the step, so it is read from where DeepSpeed stores it.
        """
        if self.layout.zero == 0:
            return float(squares**0.5)
        norm = float(self.deepspeed.optimizer._global_grad_norm)
        return norm if norm >= 0 else float("nan")  # -1 means not finite

    def _take_empty_step(self) -> None:
        """Have DeepSpeed take one step that changes nothing, so that moments can be read and written.

        DeepSpeed makes moments in its first step. That step runs on a row in which nothing is predicted, and the optimizer
        skips it. With ZeRO 1 and 2 DeepSpeed assumes that the moments of all groups exist once the first group has stepped,
        so they are made before.
        """
        self.optimizer.make_moments()
        row = single_row([], self.config.train.context)
        nothing = Batch(row.tokens, np.full_like(row.labels, IGNORED), None, None)
        micros = micro_batches(self.own_positions(nothing), self.layout, self.index, self.config.train.context, self.device)
        self._run_empty_step(micros)
        for _, module in self.experts:
            module.take_load()

    def _run_empty_step(self, micros: Sequence[Inputs]) -> None:
        self._backward(micros)
        self.deepspeed.step()

    def _initial(self, name: str, p: nn.Parameter, fill_weights: Callable[..., None]) -> Tensor:
        """Returns a parameter's initial values, of which every rank makes an equal part. Collective."""
        numel = shape_of(p).numel()
        each = -(-numel // self.mesh.size())
        first = min(numel, self.mesh.get_local_rank() * each)
        size = min(each, numel - first)
        piece = torch.zeros(size, device=self.device)
        fill_weights(name, piece, self.config, self.device, Region((first,), (size,), (numel,)))
        sharded = DTensor.from_local(piece, self.mesh, [Shard(0)], run_check=False, shape=torch.Size((numel,)), stride=(1,))
        return sharded.full_tensor().view(shape_of(p))

    def _state_items(self) -> Iterator[tuple[str, nn.Parameter, str | None]]:
        """Yields the name in the state, the parameter, and the key of its moment; None means the parameter itself."""
        for name, p in self.named:
            yield f"model.{name}", p, None
        for name, p in self.named:
            for key in MOMENTS:
                yield f"optim.{name}.{key}", p, key

    def _sharded_rows(self, tensor: Tensor) -> DTensor:
        """Returns this rank's rows of a whole tensor, sharded over all ranks that carry it."""
        each = -(-len(tensor) // self.mesh.size())
        piece = tensor[self.mesh.get_local_rank() * each :][:each].clone()
        sharded = DTensor.from_local(piece, self.mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())
        return DTensor(piece.cpu(), sharded._spec, requires_grad=False) if piece.is_cuda else sharded

    def _full(self, tensor: Tensor) -> Tensor:
        """Returns the whole of a tensor that is sharded as the state's tensors are. Collective."""
        if not isinstance(tensor, DTensor):
            return tensor.to(self.device)
        piece = local(tensor).to(self.device)
        sharded = DTensor.from_local(
            piece, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        return sharded.full_tensor()
