"""Training the continuous fields of θ (scales, values, factors, codebooks) with the structure
(signs, supports, codes) fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .part import Part, State
from .selection import unwrap
from .task import Task

PROBES = 4


@contextmanager
def refining(
    model: nn.Module,
    tasks: Sequence[Task],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    preconditioned: bool,
) -> Iterator[Optimizer]:
    """The model holds Δ(θ); gradients of its weights are passed on to θ, and each optimizer step
    rebuilds Δ(θ). See `LC.refine`.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "refine() does not support DistributedDataParallel: pass the module itself."
        )
    fields = [
        {name: nn.Parameter(x.detach().clone()) for name, x in t.part.tunable(t.state).items()}
        for t in tasks
    ]
    compressed = {id(p) for task in tasks for p in task.parameters}
    others = [p for p in unwrap(model).parameters() if p.requires_grad and id(p) not in compressed]
    trained = [x for own in fields for x in own.values() if x.numel() > 0]
    optimizer = make_optimizer([*trained, *others])
    metrics = [
        {n: squared_influence(t.part, t.state, n) for n, x in own.items() if x.numel() > 0}
        if preconditioned
        else {}
        for t, own in zip(tasks, fields, strict=True)
    ]
    handles = [
        p.register_post_accumulate_grad_hook(_passer(task, own, metric, i))
        for task, own, metric in zip(tasks, fields, metrics, strict=True)
        for i, p in enumerate(task.parameters)
        if p.requires_grad
    ]

    @torch.no_grad()
    def rebuild(*_: object) -> None:
        for task, own in zip(tasks, fields, strict=True):
            state = task.part.with_tunable(task.state, {n: x.detach() for n, x in own.items()})
            task.adopt(state)
            task.show_delta()
            for x in own.values():  # used: `model.zero_grad()`, which some loops call, misses them
                x.grad = None

    for task in tasks:
        task.show_delta()
    handles.append(optimizer.register_step_post_hook(rebuild))
    try:
        yield optimizer
    finally:
        for handle in handles:
            handle.remove()
        for task in tasks:  # as the file will hold it: rounded to the part's value_dtype
            arrays = {n: f.data for n, f in task.part.encode(task.state).items()}
            task.adopt(task.decoded(arrays))
            task.show_delta()


def squared_influence(part: Part[State], state: State, name: str) -> Tensor:
    """‖∂Δ/∂x‖² for each entry x of one continuous field: how many weights a codebook entry stands
    for, the squared length of the other factor's column for a factor's entry.

    It is the diagonal of JᵀJ, from products with vectors r of ±1: r ∘ JᵀJr is the diagonal itself
    where no two entries of the field touch the same weight, and for factors with orthogonal
    columns; elsewhere it scatters about it, and the largest of a few is taken, for smaller steps.
    Entries that touch no weight get 1. Cost: a few times that of rebuilding Δ.
    """
    values = part.tunable(state)
    x = values[name].detach().clone().requires_grad_()
    with torch.enable_grad():
        delta = part.reconstruct(part.with_tunable(state, {**values, name: x}))
        if not delta.requires_grad:
            return torch.ones_like(x)
        pulled = torch.zeros_like(delta, requires_grad=True)
        (linear,) = torch.autograd.grad(delta, x, pulled, create_graph=True)  # Jᵀ·pulled
    signs = torch.Generator().manual_seed(0)
    found = torch.zeros_like(x)
    for _ in range(PROBES):
        r = torch.randint(0, 2, x.shape, generator=signs).mul(2).sub(1).to(x)
        (moved,) = torch.autograd.grad(linear, pulled, r, retain_graph=True)  # J·r
        (back,) = torch.autograd.grad(delta, x, moved, retain_graph=True)
        found = torch.maximum(found, r * back)
    return torch.where(found > 0, found.clamp(max=torch.finfo(x.dtype).max), 1)


def _passer(
    task: Task, fields: dict[str, nn.Parameter], metric: Mapping[str, Tensor], index: int
) -> Callable[[Tensor], None]:
    """Moves the gradient of the index-th weight tensor to the fields, adding up as
    autograd does.
    """

    def move(p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        assert gradient is not None
        with torch.enable_grad():
            delta = task.part.reconstruct(task.part.with_tunable(task.state, fields))
        pieces = [torch.zeros_like(q) for q in task.parameters]
        pieces[index] = gradient
        inputs = {name: x for name, x in fields.items() if x.numel() > 0}
        if not inputs or not delta.requires_grad:
            return
        grads = torch.autograd.grad(
            delta,
            list(inputs.values()),
            task.join(pieces).reshape(delta.shape),
            allow_unused=True,
        )
        for (name, x), grad in zip(inputs.items(), grads, strict=True):
            if grad is not None:
                own = grad / metric.get(name, 1)
                x.grad = own if x.grad is None else x.grad + own

    return move
