"""Training the continuous fields of θ (scales, values, factors, codebooks) with the structure
(signs, supports, codes) fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .selection import unwrap
from .task import Task


@contextmanager
def refining(
    model: nn.Module,
    tasks: Sequence[Task],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
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
    handles = [
        p.register_post_accumulate_grad_hook(_passer(task, own, i))
        for task, own in zip(tasks, fields, strict=True)
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


def _passer(task: Task, fields: dict[str, nn.Parameter], index: int) -> Callable[[Tensor], None]:
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
        inputs = [x for x in fields.values() if x.numel() > 0]
        if not inputs or not delta.requires_grad:
            return
        grads = torch.autograd.grad(
            delta, inputs, task.join(pieces).reshape(delta.shape), allow_unused=True
        )
        for x, grad in zip(inputs, grads, strict=True):
            if grad is not None:
                x.grad = grad if x.grad is None else x.grad + grad

    return move
