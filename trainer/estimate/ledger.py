"""What a piece of real training code costs, read off while it runs, on real tensors or on fake ones: live bytes by kind
at the peak, bytes of every collective by process group, FLOPs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# A snapshot by kind is taken when the total has grown by this share since the last: the parts are that exact, the total
# is exact.
_GROWTH = 1.002

_FUNCTIONAL = {
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "all_reduce": "all-reduce",
}
_IN_PLACE = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "send": "send",
    "broadcast_": "broadcast",
}


_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# torch's registry knows the kernels of GPUs only.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _FORWARD: sdpa_flop_count,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop_count,
}


_IN_PLACE_PRODUCTS = {torch.ops.aten.addmm_: torch.ops.aten.addmm}


@dataclass
class Traffic:
    """Calls of one collective over one process group, and the bytes this rank contributes to them in all."""

    calls: int = 0
    bytes: int = 0


Known = Callable[[], Mapping[str, Iterable[Tensor]]]
"""Kind -> tensors of that kind, at the time it is called."""


@dataclass
class Ledger:
    """The account. `known` says which tensors are parameters, gradients or optimizer state; what FSDP gathers and the
    buffers of its collectives are recognised, and the rest are activations, temporaries included."""

    known: Known
    live: int = 0
    peak: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    flops: float = 0.0

    def __post_init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._marks: dict[int, str] = {}
        self._snapshot = 0

    def __enter__(self) -> Ledger:
        for tensors in self.known().values():
            for tensor in tensors:
                self.see(tensor)
        # FSDP2 frees and takes the storage of gathered parameters by resizing it, which is no operation.
        self._resize: Any = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = self._resize(storage, size)
            self._resized(storage)
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        self._mode: Any = _Watch(self)
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def see(self, tensor: Tensor, mark: str | None = None) -> None:
        """Count a tensor's storage as live, if it is not yet."""
        storage = _local(tensor).untyped_storage()
        key = storage._cdata
        if mark is not None and self._marks.get(key) != "gathered":
            self._marks[key] = mark
        if key not in self._sizes:
            self._add(key, storage)
            self._set(key, storage.nbytes())

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self._sizes[key] = 0
        self._refs[key] = weakref.ref(storage, lambda _: self._gone(key))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._add(key, storage)
        self._marks[key] = "gathered"
        self._set(key, storage.nbytes())

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._refs.pop(key, None)
        self._marks.pop(key, None)

    def _set(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        if self.live > self.peak:
            self.peak = self.live
            if self.live > self._snapshot * _GROWTH:
                self._snapshot = self.live
                self.kinds = self._by_kind()

    def _by_kind(self) -> Counter[str]:
        named = {_local(t).untyped_storage()._cdata: kind for kind, tensors in self.known().items() for t in tensors}
        found: Counter[str] = Counter()
        for key, size in self._sizes.items():
            found[named.get(key) or self._marks.get(key) or "activations"] += size
        return found

    def by_kind(self) -> dict[str, int]:
        """Bytes of each kind at the peak; they add up to it. What came after the last snapshot counts as activations."""
        kinds = dict(self.kinds)
        kinds["activations"] = kinds.get("activations", 0) + self.peak - sum(kinds.values())
        return kinds

    def count(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """One operation's FLOPs and traffic, and its results as live."""
        packet = function._overloadpacket
        if packet in _CPU_ATTENTION:
            shapes = [t.shape for t in args if isinstance(t, Tensor)]
            self.flops += _CPU_ATTENTION[packet](*shapes[: 3 if packet is _FORWARD else 4])
        elif (rule := flop_registry.get(_IN_PLACE_PRODUCTS.get(packet, packet))) is not None:
            self.flops += rule(*args, **kwargs, out_val=out)
        space, mark = function.namespace, None
        if space == "_c10d_functional" and (name := _FUNCTIONAL.get(packet.__name__)):
            self._send(name, str(args[-1]), args[0])
        elif space == "c10d" and (name := _IN_PLACE.get(packet.__name__)):
            group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
            given = args[1] if name in ("all-gather", "reduce-scatter") else args[0]
            self._send(name, group.group_name, given)
            mark = None if name in ("send", "all-reduce") else "buffers"
        elif space == "fsdp":
            mark = "buffers"
        for tensor in tree_leaves((args, out) if mark else out):
            if isinstance(tensor, Tensor):
                self.see(tensor, mark)

    def _send(self, name: str, group: str, given: Any) -> None:
        traffic = self.traffic.setdefault((group, name), Traffic())
        traffic.calls += 1
        traffic.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(given) if isinstance(t, Tensor))


def _is_group(value: torch.ScriptObject) -> bool:
    try:
        ProcessGroup.unbox(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class _Watch(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back as operations on plain tensors
        out = func(*args, **(kwargs or {}))
        self.ledger.count(func, args, kwargs or {}, out)
        return out
