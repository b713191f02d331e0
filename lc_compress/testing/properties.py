"""The properties of a part, one function each."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compose import Sum, expose
from ..part import Ops
from .cases import Case, Shape, gaussian, generator, name_of, rescale
from .problem import (
    ROUNDINGS,
    Problem,
    coarsest_eps,
    expect,
    expect_close,
    expect_same,
    neighbours,
    partial_importance,
    random_importance,
    suitable_importance,
)


def keeps_shape_dtype_device(case: Case, w: Tensor) -> bool:
    """Δ is finite and looks like w; w stays as it was; no autograd graph is recorded."""
    leaf = w.clone().requires_grad_()
    state = Problem(case, leaf).project()
    expect_same(leaf.detach(), w, "the weights were changed")
    delta = case.part.reconstruct(state)
    for what in ("shape", "dtype", "device"):
        is_, was = getattr(delta, what), getattr(w, what)
        expect(is_ == was, f"{what} of Δ is {is_}, that of the weights {was}")
    expect(bool(torch.isfinite(delta).all()), "Δ contains NaN or inf")
    expect(not delta.requires_grad, "projecting recorded an autograd graph")
    weighted = Problem(case, w, partial_importance(w))
    finite = bool(torch.isfinite(weighted.delta(weighted.project())).all())
    expect(finite, "Δ contains NaN or inf with importance")
    return True


def is_deterministic(case: Case, w: Tensor) -> bool:
    """Same weights and start, same bits, whatever the global generator and the memory layout."""
    problem = Problem(case, w)
    first = problem.delta(problem.solve())
    with torch.random.fork_rng():
        torch.rand(3)
        before = torch.get_rng_state()
        state = problem.solve()
        expect(torch.equal(torch.get_rng_state(), before), "the global generator was used")
    expect_same(problem.delta(state), first, "solving twice gave two Δ")
    warm = [problem.delta(problem.solve(state)) for _ in range(2)]
    expect_same(warm[0], warm[1], "solving twice from one state gave two Δ")
    strided = Problem(case, w.transpose(0, -1).contiguous().transpose(0, -1))
    other = strided.objective(strided.project())
    value = problem.objective(problem.project())
    slack = problem.slack(state, value)
    expect(abs(other - value) <= slack, f"strided weights: objective {other}, else {value}")
    return True


def pickled(x: Any) -> Any:
    """A copy by way of bytes."""
    return pickle.loads(pickle.dumps(x))


def is_a_value(case: Case, w: Tensor) -> bool:
    """Part and state survive pickle and deepcopy; parts compare by value; a warm start is kept."""
    part, problem = case.part, Problem(case, w)
    state = problem.project()
    delta = problem.delta(state).clone()
    for clone in (copy.deepcopy, pickled):
        twin = clone(part)
        expect(twin == part and hash(twin) == hash(part), "a copy of the part is not equal to it")
        expect_same(twin.reconstruct(clone(state)), delta, "a copied state has another Δ")
    for moved in neighbours(w):
        Problem(case, moved).project(state)
        expect_same(problem.delta(state), delta, "projecting changed its warm start")
    return True


def is_idempotent(case: Case, w: Tensor) -> bool:
    """A projected point projects to itself: from its own state, and from nothing if exact."""
    if case.mu is not None:
        return False  # a penalty shrinks again
    problem = Problem(case, w)
    state = problem.project()
    delta = problem.delta(state)
    again = Problem(case, delta)
    starts = (state, None) if case.part.exact else (state,)
    for warm in starts:
        value = again.objective(again.project(warm))
        slack = again.slack(state, 0.0)
        start = "scratch" if warm is None else "its state"
        expect(value <= slack, f"projecting Δ from {start} leaves {value:.3g} > {slack:.3g}")
    return True


def never_raises_objective(case: Case, w: Tensor) -> bool:
    """objective(w', project(w', θ)) ≤ objective(w', θ); the bare `solve` too where it is exact."""
    for importance in (None, suitable_importance(case, w)):
        state = Problem(case, w, importance).project()
        for moved in neighbours(w)[: 2 if case.part.exact else 1]:
            problem = Problem(case, moved, importance)
            before = problem.objective(state)
            found = {"project": problem.project(state)}
            if problem.certain:
                found |= {"warm solve": problem.solve(state), "cold solve": problem.solve()}
            for what, new in found.items():
                after = problem.objective(new)
                slack = problem.slack(state, before)
                message = f"{what}{problem.kind} raised the objective from {before} to {after}"
                expect(after <= before + slack, message)
    return True


def is_orthogonal_to_its_error(case: Case, w: Tensor) -> bool:
    """⟨w − Δ, Δ⟩ = 0 for cones, hence ‖w‖² = ‖Δ‖² + ‖w − Δ‖²; weighted where exact."""
    if not case.cone:
        return False
    for importance in (None, suitable_importance(case, w)):
        problem = Problem(case, w, importance)
        if importance is not None and not problem.certain:
            continue
        delta = problem.delta(problem.solve()).double()
        weights = torch.ones_like(delta) if importance is None else importance.double()
        inner = abs(float((weights * (w.double() - delta) * delta).sum()))
        energy = float((weights * w.double() ** 2).sum())
        allowed = max(ROUNDINGS * coarsest_eps(case, w), 1e-10) * energy
        expect(inner <= allowed, f"⟨w − Δ, Δ⟩ = {inner:.3g}, allowed {allowed:.3g}")
    return True


def is_optimal(case: Case, w: Tensor) -> bool:
    """Exact parts reach the optimum found by brute force; no part gets below it."""
    if case.brute is None:
        return False
    part = case.part
    tries = 3 if part.exact or part.exact_weighted else 1  # only the bound from below is left
    for small in crops(w, case.brute_shape, tries):
        for importance in (None, random_importance(small), partial_importance(small)):
            problem = Problem(case, small, importance)
            weights = torch.ones_like(small) if importance is None else importance
            mu = 1.0 if case.mu is None else case.mu
            best = case.brute(small.double().cpu(), weights.double().cpu(), mu)
            if best is None:
                continue
            state = problem.solve()  # without a warm start, `project` returns the same
            value, slack = problem.objective(state), problem.slack(state, best)
            low = f"solve{problem.kind} reached {value}, below the optimum {best}"
            expect(value >= best - slack, low)
            high = f"solve{problem.kind} reached {value}, not the optimum {best} for {small}"
            expect(not problem.certain or value <= best + slack, high)
    return True


def crops(w: Tensor, shape: Shape, limit: int) -> list[Tensor]:
    """Up to `limit` pieces of `w` in the given shape; `w` itself if it is not larger."""
    size = torch.Size(shape).numel()
    if w.numel() <= size:
        return [w]
    pieces = w.flatten().split(size)
    return [piece.reshape(shape) for piece in pieces if piece.numel() == size][:limit]


def follows_symmetries(case: Case, w: Tensor) -> bool:
    """Transformed weights give the transformed Δ: the same objective if exact, the same Δ off ties.

    Δ is not compared for 16-bit weights, whose few values tie.
    """
    problem = Problem(case, w)
    state = problem.solve()
    delta, value = problem.delta(state), problem.objective(state)
    magnitudes = w.abs().flatten()
    distinct = magnitudes.unique().numel() == magnitudes.numel()
    for symmetry in case.symmetries:
        transform = symmetry(tuple(w.shape), generator(4))
        other = Problem(case, transform(w))
        found = other.solve()
        name = name_of(symmetry)
        if case.part.exact:
            expected = value * 16**2 if symmetry is rescale else value
            reached, slack = other.objective(found), other.slack(found, expected)
            message = f"after {name} the objective is {reached}, expected {expected}"
            expect(abs(reached - expected) <= slack, message)
        if distinct and w.dtype in (torch.float32, torch.float64):
            expect_close(other.delta(found), transform(delta), f"{name} gives another Δ")
    return bool(case.symmetries)


def stores_what_it_counts(case: Case, w: Tensor) -> bool:
    """Unpacking what was packed rebuilds Δ bit for bit, and the bytes are the bits counted."""
    part, problem = case.part, Problem(case, w)
    state = problem.project()
    fields = part.encode(state)
    total, arrays, payloads = 0, {}, {}
    for name, field in fields.items():
        bits = field.coding.bits(field.data)
        payload = field.coding.pack(field.data)
        expect(type(bits) is int and bits >= 0, f"bits of {name!r} is {bits!r}")
        padding = 8 * len(payload) - bits
        message = f"{name!r} counts {bits} bits and packs {len(payload)} bytes"
        expect(0 <= padding < 8, message)
        if field.per_weight:
            expect(field.data.shape == w.shape, f"{name!r} is not in the shape of the weights")
        arrays[name] = field.coding.unpack(payload, field.data.shape)
        expect(arrays[name].shape == field.data.shape, f"unpacking changed the shape of {name!r}")
        payloads[name] = payload
        total += bits
    counted = part.bits(state)
    expect(type(counted) is int and counted == total, f"bits: {counted!r}, fields: {total}")
    loaded = part.decode(arrays, w.shape, w.dtype)
    delta = problem.delta(state).cpu()
    expect_same(part.reconstruct(loaded).cpu(), delta, "the stored state has another Δ")
    again = {name: f.coding.pack(f.data) for name, f in part.encode(loaded).items()}
    expect(again == payloads, "storing the loaded state gives other bytes")
    return True


def names_its_shapes(case: Case, w: Tensor) -> bool:
    """`free_shapes` tells the shapes of the free fields from what is stored beside them: what
    `then` reads a state back with.
    """
    part = case.part
    if not part.free:
        return False
    state = Problem(case, w).project()
    beside = {name: f.data for name, f in part.encode(state).items() if name not in part.free}
    found = {name: tuple(x) for name, x in part.free_shapes(w.shape, beside).items()}
    expected = {name: tuple(x.values.shape) for name, x in expose(part, state, None).items()}
    expect(found == expected, f"free_shapes says {found}, the state has {expected}")
    return True


def is_block_stationary(case: Case, w: Tensor) -> bool:
    """No term of a `Sum` improves on what the others leave, after a cold and a warm `solve`."""
    part = case.part
    if not isinstance(part, Sum):
        return False
    for importance in (None, suitable_importance(case, w)):
        problem = Problem(case, w, importance)
        cold = problem.solve()
        moved = Problem(case, neighbours(w)[0], importance)
        for whole, states in ((problem, cold), (moved, moved.solve(cold))):
            value = whole.objective(states)
            slack = whole.slack(states, value)
            deltas = [t.reconstruct(s).double() for t, s in zip(part.parts, states, strict=True)]
            for i, term in enumerate(part.parts):
                others = sum(
                    (d for j, d in enumerate(deltas) if j != i), torch.zeros_like(deltas[i])
                )
                left = (whole.w.double() - others).to(w.dtype)
                with torch.no_grad():
                    new = term.solve(left, states[i], case.mu, importance)
                improved = whole.objective((*states[:i], new, *states[i + 1 :]))
                message = f"{term} alone{whole.kind} lowers the objective {value} to {improved}"
                expect(improved >= value - slack, message)
    return True


def respects_importance(case: Case, w: Tensor) -> bool:
    """Ones are as good as none; a common factor, broadcasting and weights that do not count."""
    plain = Problem(case, w)
    unweighted = plain.project()
    value = plain.objective(unweighted)
    random, holes = random_importance(w), partial_importance(w)
    ones = Problem(case, w, torch.ones_like(random))
    reached = ones.objective(ones.project())
    slack = ones.slack(unweighted, value)
    expect(abs(reached - value) <= slack, f"importance of ones: {reached}, without: {value}")

    column = random[(slice(None), *(slice(1),) * (w.dim() - 1))]
    full = Problem(case, w, column.expand(w.shape).contiguous())
    state = full.solve()
    expected = full.objective(state)
    reached = full.objective(Problem(case, w, column).solve())
    message = f"importance that broadcasts: objective {reached}, written out: {expected}"
    expect(abs(reached - expected) <= full.slack(state, expected), message)

    if case.mu is None:
        scaled = Problem(case, w, column.expand(w.shape).contiguous() * 4)
        delta = scaled.delta(scaled.solve())
        expect_same(delta, full.delta(state), "4 · importance gives another Δ")
        nothing = Problem(case, w, torch.zeros_like(random))
        finite = bool(torch.isfinite(nothing.delta(nothing.project())).all())
        expect(finite, "Δ contains NaN or inf where no weight counts")

    if case.part.exact_weighted:
        partial = Problem(case, w, holes)
        hidden = Problem(case, torch.where(holes > 0, w, neighbours(w)[1]), holes)
        state = partial.solve()
        reached, expected = hidden.objective(hidden.solve()), partial.objective(state)
        message = f"weights of importance 0 changed the objective: {reached}, before {expected}"
        expect(abs(reached - expected) <= partial.slack(state, expected), message)
    return True


def differentiates(case: Case, w: Tensor) -> bool:
    """The gradient of Δ in the tunable values equals finite differences; `with_tunable` keeps them.

    In float64 only: differences of coarser numbers say little.
    """
    part, problem = case.part, Problem(case, w)
    state = problem.project()
    values = part.tunable(state)
    same = part.with_tunable(state, values)
    expect_same(problem.delta(same), problem.delta(state), "with_tunable(tunable) changed Δ")
    moved = {name: value * 1.25 for name, value in values.items()}
    kept = part.tunable(part.with_tunable(state, moved))
    expect(kept.keys() == moved.keys(), f"tunable names: {sorted(kept)}, were {sorted(moved)}")
    for name, value in moved.items():
        expect_same(kept[name], value, f"with_tunable changed {name!r}")
    if w.dtype != torch.float64:
        return True

    weights = gaussian(tuple(w.shape), generator(5)).to(w.device)
    for name, value in values.items():
        leaf = value.clone().requires_grad_()
        delta = part.reconstruct(part.with_tunable(state, {**values, name: leaf}))
        expect(delta.requires_grad, f"Δ is not differentiable in {name!r}")
        (gradient,) = torch.autograd.grad((weights * delta).sum(), leaf)
        if value.numel() == 0:
            continue
        # Along a direction of the values' own size, so that the step fits tiny and huge ones.
        size = float(value.abs().max()) or 1.0
        direction = gaussian(tuple(value.shape), generator(6)).to(w.device) * size
        slope = float((gradient * direction).sum())
        step = 1e-3  # Δ is a polynomial of degree two at most: no truncation error to balance
        ends = []
        for sign in (1, -1):
            shifted = {**values, name: value + sign * step * direction}
            ends.append(problem.delta(part.with_tunable(state, shifted)))
        difference = float((weights * (ends[0] - ends[1])).sum()) / (2 * step)
        scale = float((weights * (ends[0].abs() + ends[1].abs())).abs().sum())
        message = f"slope in {name!r}: {slope}, by differences: {difference}"
        expect(abs(slope - difference) <= 1e-9 * scale, message)
    return True


def counts_operations(case: Case, w: Tensor) -> bool:
    """Operations are non-negative whole numbers, in proportion to the positions."""
    state = Problem(case, w).project()
    one = case.part.ops(state)
    for positions in (1, 3):
        ops = case.part.ops(state, positions)
        whole = type(ops.mults) is int and type(ops.adds) is int
        expect(isinstance(ops, Ops) and whole, f"ops are not whole numbers: {ops!r}")
        expect(min(ops.mults, ops.adds) >= 0, f"negative operations: {ops}")
        expected = Ops(positions * one.mults, positions * one.adds)
        expect(ops == expected, f"{positions} positions take {ops}, one takes {one}")
    return True


def refuses_bad_input(case: Case, w: Tensor) -> bool:
    """What no projection is defined for raises `ValueError` or `TypeError`: no quiet result."""
    spoiled = w.clone()
    spoiled[(0,) * w.dim()] = float("nan")
    infinite = w.clone()
    infinite[(0,) * w.dim()] = float("inf")
    mu = case.mu
    bad: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "integer weights": (torch.ones(w.shape, dtype=torch.int64), {"mu": mu}),
        "NaN in the weights": (spoiled, {"mu": mu}),
        "inf in the weights": (infinite, {"mu": mu}),
        "empty weights": (w[:0], {"mu": mu}),
        "negative importance": (w, {"mu": mu, "importance": -torch.ones_like(w)}),
        "NaN in the importance": (w, {"mu": mu, "importance": spoiled}),
        "importance of another shape": (w, {"mu": mu, "importance": w.new_ones(w.shape[0] + 1, 2)}),
        "importance larger than w": (w, {"mu": mu, "importance": w.new_ones(2, *w.shape)}),
        "mu = 0": (w, {"mu": 0.0}),
        "negative mu": (w, {"mu": -1.0}),
    }
    if mu is not None:
        bad["a penalty without mu"] = (w, {})
    for what, (weights, arguments) in bad.items():
        try:
            case.part.project(weights, **arguments)
        except (ValueError, TypeError) as error:
            expect(bool(str(error)), f"{what}: the error says nothing")
        else:
            raise AssertionError(f"{what}: accepted")
    return True


def admits_its_states(case: Case, w: Tensor) -> bool:
    """What `solve` and `project` return satisfies the part's own constraints."""
    plain, weighted = Problem(case, w), Problem(case, w, suitable_importance(case, w))
    cold = plain.solve()
    for state in (cold, plain.project(cold), weighted.solve(cold)):
        expect(case.part.admits(state) is True, "the part does not admit its own state")
    return True


Property = Callable[[Case, Tensor], bool]

PROPERTIES: tuple[Property, ...] = (
    keeps_shape_dtype_device,
    is_deterministic,
    is_a_value,
    is_idempotent,
    never_raises_objective,
    is_orthogonal_to_its_error,
    is_optimal,
    follows_symmetries,
    stores_what_it_counts,
    names_its_shapes,
    is_block_stationary,
    respects_importance,
    differentiates,
    counts_operations,
    refuses_bad_input,
    admits_its_states,
)
