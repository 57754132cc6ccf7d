"""The DeepSpeed engine: the plain GPT under ZeRO 0 to 3, with its offload and its sequence parallelism; the same initial
bits, losses and checkpoints as the native engine's.

DeepSpeed averages gradients over its ranks, which are all the run's. Here they are of the summed loss, so that ranks may
hold different numbers of tokens, and the optimizer makes them those of the mean. DeepSpeed's own checkpoints, which are
pickles, are neither written nor read.
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
from mikoshi.parallel.process.heartbeat import beat
from mikoshi.parallel.replicas import Difference, check
from mikoshi.parallel.sharding import local, sum_of_squares
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.base import NO_LIMITS, Limits, StepResult, gradient_factor, step_result
from mikoshi.trainer.engines.batches import columns, micro_batches, one_row, own, weigh_balance
from mikoshi.trainer.engines.deepspeed.model import build_model, shape_of, whole, write
from mikoshi.trainer.engines.deepspeed.optim import MOMENTS, GatedAdamW
from mikoshi.trainer.engines.deepspeed.setup import bring_in, initialize, settings
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
        """`groups`: what make_groups makes of the layout; `fill_weights` writes a region of a parameter's initial values."""
        self.config, self.layout, self.device, self.groups = config, layout, device, groups
        self.here = layout.coordinates(dist.get_rank())
        self.index = columns(layout, self.here, config.train.context)
        deepspeed = bring_in(device)
        swap, self._leave_disk = swap_folder(config, dist.get_rank(), self)
        said = settings(config, layout, device, swap)
        deepspeed.init_distributed(dist_init_required=False)
        self.model, carried = self._build(deepspeed, said)
        self.named = list(self.model.named_parameters())
        self.experts = [
            (int(name), block.mlp) for name, block in self.model.blocks.items() if isinstance(block.mlp, MoE)
        ]  # fmt: skip
        self.optimizer = GatedAdamW(self.named, config.optim)
        # The ranks that share out the state of this rank's layers.
        self.mesh = init_device_mesh(device.type, (layout.pp, layout.stage_ranks), mesh_dim_names=("pp", "all"))["all"]
        self.deepspeed = initialize(deepspeed, carried, self.optimizer, said, config.engine.deepspeed.config)
        for name, p in self.named:
            write(p, None, self._initial(name, p, fill_weights), layout, self.optimizer)
        self._take_no_step()
        # Under ZeRO 3 a rank's own pieces; what is gathered comes and goes.
        self.parameters: list[nn.Parameter] = [getattr(p, "ds_tensor", p) for _, p in self.named]

    def step(self, rows: Batch, lr: float, limits: Limits = NO_LIMITS) -> StepResult:
        micros = micro_batches(rows, self.layout, self.index, self.config.train.context, self.device)
        self._weigh_balance(rows)
        loss = self._backward(micros)
        beat("reduce")
        squares = self._squares()
        loss_sum, tokens, squares_sum, loads = self._sums(loss, rows, squares)
        ranks, more = self.layout.world, expert_metrics(loads)
        # Of a gradient that is not finite DeepSpeed does not take the step as far as the optimizer.
        lost = step_result(loss_sum, tokens, float("nan" if loss_sum != loss_sum else "inf"), limits, more)
        found: list[StepResult] = []

        def factor() -> float | None:
            """Of DeepSpeed's gradients, the mean over ranks of those of the summed loss."""
            found[:] = [step_result(loss_sum, tokens, self._norm(squares_sum) * ranks, limits, more)]
            mine = gradient_factor(found[0], self.config.optim.clip)
            return None if mine is None else mine * ranks

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        beat("update")
        self.optimizer.factor = factor
        self.deepspeed.step()
        (result,) = found or [lost]
        self.optimizer.taken += result.applied
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], known: int | None = None) -> float | None:
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
        context = self.config.train.context
        ids = ids[-context:]
        (micro,) = micro_batches(self.own(one_row(ids, context)), self.layout, self.index, context, self.device)
        outputs = self._predict([{key: value for key, value in micro.items() if key != "labels_BT"}])
        told = torch.zeros(self.config.model.vocab, device=self.device)
        held = np.arange(context) if self.index is None else self.index
        mine = np.flatnonzero(held == len(ids) - 1)
        if outputs and len(mine) and self.here.data == 0:
            told += outputs[0][0, mine[0]].float()
        dist.all_reduce(told)
        return told

    def state(self) -> dict[str, Tensor]:
        """Each rank's rows of every tensor, in the host's memory. Collective: one after another is put together whole."""
        out: dict[str, Tensor] = {
            name: self._rows(whole(p, key, self.layout, self.optimizer)) for name, p, key in self._pieces()
        }
        return out | {f"optim.{name}.step": torch.tensor(float(self.optimizer.taken)) for name, _ in self.named}

    def load_state(self, state: dict[str, Tensor]) -> None:
        steps = {float(tensor) for name, tensor in state.items() if name.startswith("optim.") and name.endswith(".step")}
        if len(steps) > 1:
            raise CheckpointError(
                f"its parameters have taken different numbers of steps, from {min(steps):.0f} to {max(steps):.0f}, which "
                'DeepSpeed cannot go on with: use engine.kind="native"'
            )
        for name, p, key in self._pieces():
            if name in state:
                write(p, key, self._joined(state[name]), self.layout, self.optimizer)
        if steps:
            self.optimizer.taken = round(steps.pop())

    def differing(self) -> list[Difference]:
        """What DeepSpeed keeps whole on every rank: the model below ZeRO 3, and at ZeRO 0 the moments."""
        held = [] if self.layout.zero == 3 else [(f"model.{name}", p.detach()) for name, p in self.named]
        if self.layout.zero == 0:
            moments = ((name, p, key) for name, p in self.named for key in MOMENTS)
            held += [(f"optim.{name}.{key}", self.optimizer.state[p][key]) for name, p, key in moments]
        return check(held, self.groups)

    def close(self) -> None:
        self._leave_disk()

    def own(self, rows: Batch) -> Batch:
        """The columns of whole rows that this rank holds."""
        return own(rows, self.index)

    def _build(self, deepspeed: Any, said: dict[str, Any]) -> tuple[GPT, nn.Module]:
        """This rank's part of the model, all of it, and the module that DeepSpeed is given to carry."""
        model = build_model(deepspeed, self.config, self.layout, self.groups, self.here, self.device, said)
        return model, model

    def _backward(self, micros: Sequence[Inputs]) -> Tensor:
        """Gradients of the summed loss of all micro-batches; that loss."""
        losses = []
        for number, micro in enumerate(micros, 1):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(micros))
            beat("forward")
            loss = self.deepspeed(**micro)
            beat("backward")
            # A tensor of its own: DeepSpeed divides the gradient that reaches what forward returned by the number of
            # micro-batches, unless it has seen it come from this call in a tensor above.
            self.deepspeed.backward(loss.clone(), scale_wrt_gas=False)
            losses.append(loss.detach().double())
        return torch.stack(losses).sum()

    def _weigh_balance(self, rows: Batch) -> None:
        weigh_balance([layer for _, layer in self.experts], self.config.model, rows, self.layout.pp, self.device)

    def _squares(self) -> Tensor:
        """At ZeRO 0 this rank's share of the sum of the squares of DeepSpeed's gradients, which are then the same on all."""
        gradients = [p.grad for _, p in self.named if p.grad is not None] if self.layout.zero == 0 else []
        return sum_of_squares(gradients, self.layout.world).to(self.device)

    def _predict(self, micros: Sequence[Inputs]) -> list[Tensor]:
        """What the model returns for each micro-batch; an empty list where its last layer is not."""
        self.deepspeed.eval()
        try:
            return [self.deepspeed(**micro) for micro in micros]
        finally:
            self.deepspeed.train()

    def _sums(self, loss: Tensor, rows: Batch, squares: Tensor) -> tuple[float, int, float, Loads]:
        """Loss, predicted tokens, squares and every expert's rows, over all ranks."""
        moe = self.config.model.moe
        counted = torch.tensor(float((rows.labels >= 0).sum()) / self.layout.pp, dtype=torch.float64)
        loads = torch.zeros(0 if moe is None else self.config.model.layers, 0 if moe is None else moe.experts)
        loads = loads.to(self.device, torch.float64)
        for layer, module in self.experts:
            loads[layer] = module.take_load()
        mine = torch.cat((torch.stack([figure.to(loss) for figure in (loss, counted, squares)]), loads.flatten()))
        dist.all_reduce(mine)
        loss_sum, tokens, squares_sum, *told = mine.tolist()
        return loss_sum, round(tokens), squares_sum, np.reshape(told, loads.shape)

    def _norm(self, squares: float) -> float:
        """The norm of DeepSpeed's gradients over all ranks, before the optimizer's step: it tells it only after that, so it is
        read where it keeps it."""
        if self.layout.zero == 0:
            return float(squares**0.5)
        norm = float(self.deepspeed.optimizer._global_grad_norm)
        return norm if norm >= 0 else float("nan")  # -1 stands for one that is not finite

    def _take_no_step(self) -> None:
        """Moments exist and can be read and written only once DeepSpeed has taken a step: it takes one, on a row in which
        nothing is predicted and with the gate shut, which changes nothing. Of ZeRO 1 and 2 it takes the moments of all
        groups for made after the first of them has stepped, so they are made before."""
        self.optimizer.make_moments()
        row = one_row([], self.config.train.context)
        nothing = Batch(row.tokens, np.full_like(row.labels, IGNORED), None, None)
        micros = micro_batches(self.own(nothing), self.layout, self.index, self.config.train.context, self.device)
        self._rehearse(micros)
        for _, module in self.experts:
            module.take_load()

    def _rehearse(self, micros: Sequence[Inputs]) -> None:
        self._backward(micros)
        self.deepspeed.step()

    def _initial(self, name: str, p: nn.Parameter, fill_weights: Callable[..., None]) -> Tensor:
        """A parameter's initial values, of which every rank makes an equal part. Collective."""
        numel = shape_of(p).numel()
        each = -(-numel // self.mesh.size())
        first = min(numel, self.mesh.get_local_rank() * each)
        size = min(each, numel - first)
        mine = torch.zeros(size, device=self.device)
        fill_weights(name, mine, self.config, self.device, Region((first,), (size,), (numel,)))
        cut = DTensor.from_local(mine, self.mesh, [Shard(0)], run_check=False, shape=torch.Size((numel,)), stride=(1,))
        return cut.full_tensor().view(shape_of(p))

    def _pieces(self) -> Iterator[tuple[str, nn.Parameter, str | None]]:
        """Name in the state, parameter, and which of its moments; None: itself."""
        for name, p in self.named:
            yield f"model.{name}", p, None
        for name, p in self.named:
            for key in MOMENTS:
                yield f"optim.{name}.{key}", p, key

    def _rows(self, tensor: Tensor) -> DTensor:
        """This rank's part of a whole tensor, cut over all ranks that carry it."""
        each = -(-len(tensor) // self.mesh.size())
        mine = tensor[self.mesh.get_local_rank() * each :][:each].clone()
        cut = DTensor.from_local(mine, self.mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())
        return DTensor(mine.cpu(), cut._spec, requires_grad=False) if mine.is_cuda else cut

    def _joined(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that is cut as the state's are. Collective."""
        if not isinstance(tensor, DTensor):
            return tensor.to(self.device)
        mine = local(tensor).to(self.device)
        cut = DTensor.from_local(
            mine, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        return cut.full_tensor()
