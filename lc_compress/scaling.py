"""The best scale of a codebook for rows of weights: branch and bound over the scale, exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .order import argsort_rows, sort_rows

_GRID = 24  # intervals of 1/a to begin with
_CHUNK = 1 << 19  # midpoints searched at once: bounds the memory
_FEW = 2  # weights per level: below, rounding each weight is faster than searching for the cuts
_TINY = 1e-300  # a divisor for sums that are zero
_ROUNDING = 1e-14  # gains that differ by less, as a share of Σ h w², are equal


def best_scales(rows: Tensor, h: Tensor | None, levels: Tensor) -> Tensor:
    """The scale of a codebook, for each row of weights.

    Solves   min Σ h_i (w_i − a t[q_i])²   over real a and q
    to the global optimum, for every row on its own.

    Proof. Let s = 1/a > 0 (a < 0 is a > 0 for −t). An assignment q has A_q = Σ h t w and
    B_q = Σ h t²; at scale a it lowers the error, from Σ h w², by 2 a A_q − a² B_q, at its best
    scale A_q / B_q by A_q² / B_q. So at a given s the error is lowered by ψ(s) / s², where
    ψ(s) = max_q 2 s A_q − B_q is convex, a maximum of lines. The best q there are the nearest
    levels. They cut the sorted row at the midpoints between levels, over s: binary searches, and
    running sums up to each cut, give A_q and B_q, and q at its own best scale is a candidate.
    Between two values of s, ψ is at most its chord 2 s A − B, and ψ(s) / s² at most A² / B if B / A
    lies between them, else at most what is reached at one of the two. Intervals that cannot beat
    the best candidate are dropped, the others split where their bound is attained, until none is
    left. The first interval may begin at half of the least |midpoint / w|, where assignments begin
    to change, and end at 2 max A_q over the gain of any candidate, as ψ(s) / s² <= 2 max A_q / s.

    Exact to about 1e-14 of Σ h w², the rounding of the sums.

    Args:
        rows: (blocks, n), floating point.
        h: (blocks, n), float64 importance; None: ones. Entries without importance do not matter.
        levels: the codebook (K,), ascending and distinct.

    Returns:
        (blocks,) in float64; 0 where nothing helps.

    Cost: O(N log N) to sort and O(K log n) for each scale tried: about 60 per row for 15 levels of
    Gaussian weights, 200 for 255. Symmetric codebooks need |w| and half of the levels only, others
    both signs of a. All rows are searched together.
    """
    t = levels.double()
    if torch.equal(t, -t.flip(0)):
        return _solve(rows.abs(), h, t[t.numel() // 2 :], mirror=False)[0]
    return _solve(rows, h, t, mirror=True)[0]


def best_scales_and_zeros(rows: Tensor, h: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of an integer grid, for each row of weights.

    Solves   min Σ h_i (w_i − a (q_i − z))²   over a >= 0 and integers q, z in {0 … top}
    to the global optimum: as `best_scales`, but each scale is tried with all zero points at once.
    Levels −top … top are cut once; the codebook of a zero point z, −z … top − z, takes the cuts of
    the first z levels below 0 and of the first top − z above. An interval's bound is the highest of
    all zero points. (a < 0 is a > 0 with the zero point top − z.)

    Returns:
        scales (blocks,) in float64, zero points (blocks,) in int64.

    Cost: as `best_scales` with 2 top + 1 levels.
    """
    levels = torch.arange(-top, top + 1, dtype=torch.float64, device=rows.device)
    return _solve(rows, h, levels, mirror=False, zeros=True)


class _Ladder(NamedTuple):
    """Levels from the one nearest to 0 outwards on one side: what each step adds to t and to t²
    beyond which midpoint.
    """

    middles: Tensor
    steps: Tensor
    squares: Tensor


def _ladder(levels: Tensor) -> _Ladder:
    return _Ladder(levels[:-1] / 2 + levels[1:] / 2, levels.diff(), levels.square().diff())


class _Side(NamedTuple):
    """Weights from the largest w downwards, as −w in ascending order (rows, n), their importance h
    (None: ones), and the running sums of −h w and h over the first 0, 1, …, n of them.
    """

    x: Tensor
    h: Tensor | None
    first: Tensor
    mass: Tensor | None

    def climb(self, ladder: _Ladder, s: Tensor) -> tuple[Tensor, Tensor]:
        """What each step up adds to Σ h t w and to Σ h t², at 1/a = s (rows, m)."""
        cuts = torch.searchsorted(self.x, (ladder.middles / -s[..., None]).flatten(1))
        first = self.first.gather(1, cuts)
        mass = cuts.double() if self.mass is None else self.mass.gather(1, cuts)
        shape = (*s.shape, ladder.middles.numel())
        return first.view(shape) * -ladder.steps, mass.view(shape) * ladder.squares

    def round(self, ladder: _Ladder, s: Tensor) -> tuple[Tensor, Tensor]:
        """The same summed over the steps, for an evenly spaced ladder from 0, weight by weight."""
        step, count = ladder.steps[0], ladder.steps.numel()
        k = (self.x[:, None] * (-s / step)[..., None]).round_().clamp_(0, count)  # (rows, m, n)
        hk = k if self.h is None else k * self.h[:, None]
        a = -step * (hk @ self.x[..., None])
        return a, step.square() * (hk * k).sum(-1, keepdim=True)

    def keep(self, rows: Tensor) -> _Side:
        h, mass = (None if x is None else x[rows] for x in (self.h, self.mass))
        return _Side(self.x[rows], h, self.first[rows], mass)


def _side(x: Tensor, h: Tensor | None) -> _Side:
    if h is None:
        return _Side(x, None, _running(x), None)
    return _Side(x, h, _running(h * x), _running(h))


def _running(x: Tensor) -> Tensor:
    """Σ of the first 0, 1, …, n entries, (rows, n + 1)."""
    sums = x.new_empty(x.shape[0], x.shape[1] + 1)
    sums[:, 0] = 0
    torch.cumsum(x, 1, out=sums[:, 1:])
    return sums


class _Problem:
    """A and B of the nearest levels at any scale a > 0.

    Positive weights climb from the level nearest to 0 upwards, negative ones downwards: all terms
    have one sign, so that a few large weights are not blurred by many small ones.
    """

    def __init__(
        self, climbs: list[tuple[_Side, _Ladder]], base: Tensor, energy: Tensor, zeros: bool
    ) -> None:
        side = climbs[0][0]
        self.climbs = [(side, ladder) for side, ladder in climbs if ladder.middles.numel()]
        n = torch.full_like(energy, side.x.shape[1])
        self.base, self.energy, self.zeros = base, energy, zeros
        self.total = -side.first[:, -1], n if side.mass is None else side.mass[:, -1]
        self.rounds = False
        if len(self.climbs) == 1 and not bool(base):
            steps = self.climbs[0][1].steps
            self.rounds = bool((steps == steps[0]).all()) and side.x.shape[1] < _FEW * steps.numel()

    def keep(self, rows: Tensor) -> None:
        """Forget the other rows."""
        self.climbs = [(side.keep(rows), ladder) for side, ladder in self.climbs]
        self.energy = self.energy[rows]
        self.total = self.total[0][rows], self.total[1][rows]

    def at(self, s: Tensor) -> Tensor:
        """(rows, m) scales 1/a -> (rows, m, 1 + 2 windows): s, then A, then B by zero point."""
        if self.rounds:
            side, ladder = self.climbs[0]
            return torch.cat((s[..., None], *side.round(ladder, s)), -1)
        steps = [side.climb(ladder, s) for side, ladder in self.climbs]
        if self.zeros:
            up, down = ([F.pad(x.cumsum(-1), (1, 0)) for x in pair] for pair in steps)
            both = [x.flip(-1) + y for x, y in zip(up, down, strict=True)]
        else:
            start = [self.base * self.total[0], self.base.square() * self.total[1]]
            both = [x[:, None].expand_as(s)[..., None] for x in start]
            for pair in steps:
                both = [x + y.sum(-1, keepdim=True) for x, y in zip(both, pair, strict=True)]
        return torch.cat((s[..., None], *both), -1)

    def first_change(self) -> Tensor:
        """The least s at which a weight reaches a midpoint other than 0, s w = m; inf for none."""
        least = torch.full_like(self.energy, float("inf"))
        for side, ladder in self.climbs:
            middles = ladder.middles[ladder.middles > 0]
            largest = -side.x[:, 0]
            if middles.numel():
                least = torch.where(largest > 0, (middles[0] / largest).minimum(least), least)
        return least


def _solve(
    rows: Tensor, h: Tensor | None, t: Tensor, *, mirror: bool, zeros: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales and zero points; with `mirror` also negative scales."""
    x = -rows.contiguous()
    if h is None:
        x = sort_rows(x).double()
    else:
        x = torch.where(h > 0, x, 0)
        order = argsort_rows(x)
        x, h = x.gather(1, order).double(), h.gather(1, order)
        h /= _power_of_two(h.amax(1, keepdim=True))
    unit, step = _power_of_two(torch.maximum(x[:, -1:], -x[:, :1])), _power_of_two(t.abs().max())
    x /= unit  # powers of two, so that squares neither overflow nor vanish
    t = t / step
    nearest = int((t[:-1] / 2 + t[1:] / 2 < 0).sum())
    up, down, base = _ladder(t[nearest:]), _ladder(-t[: nearest + 1].flip(0)), t[nearest]
    signed = mirror or zeros
    found = []
    count = max(1, _CHUNK // (_GRID * max(t.numel(), min(x.shape[1], _FEW * t.numel()))))
    for i in range(0, x.shape[0], count):
        y, g = x[i : i + count], None if h is None else h[i : i + count]
        energy = torch.linalg.vector_norm(y if g is None else g.sqrt() * y, dim=1).square()
        positive = _side(y, g)
        negative = _side(-y.flip(1), None if g is None else g.flip(1)) if signed else positive
        gain, scale, zero = _search(
            _Problem([(positive, up), (negative, down)], base, energy, zeros)
        )
        if mirror:
            problem = _Problem([(negative, up), (positive, down)], base, energy, zeros)
            other, mirrored, _ = _search(problem)
            scale = torch.where(other > gain, -mirrored, scale)
        found.append((scale, zero))
    scales, zero_points = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scales * unit.squeeze(1) / step, zero_points


def _power_of_two(x: Tensor) -> Tensor:
    """2^e with x = m 2^e and m in [1/2, 1), exactly; 1 for 0."""
    return torch.where(x > 0, x / torch.frexp(x).mantissa, 1.0)


def _search(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The largest A² / B over s > 0, its scale A / B and its zero point, for each row."""
    count, device = problem.energy.numel(), problem.energy.device
    rows = torch.arange(count, device=device)
    gain, scale = torch.zeros_like(problem.energy), torch.zeros_like(problem.energy)
    zero = torch.zeros_like(rows)

    def look(s: Tensor) -> Tensor:
        points = problem.at(s)
        a, b = points[..., 1:].chunk(2, -1)
        gains, i = _gain(a, b).flatten(1).max(1)
        best = (a / b.clamp_min(_TINY)).flatten(1).gather(1, i[:, None]).squeeze(1)
        better = gains > gain[rows]
        gain[rows] = torch.where(better, gains, gain[rows])
        scale[rows] = torch.where(better, best, scale[rows])
        zero[rows] = torch.where(better, i % a.shape[-1], zero[rows])
        return points

    far = look(torch.full_like(gain, 1e300)[:, None])
    stop = 2 * far[..., 1:].chunk(2, -1)[0].amax((1, 2)) / gain
    start = problem.first_change() / 2
    some = (gain > 0) & start.isfinite()
    start, stop = torch.where(some, start, 1.0), torch.where(some, stop, 1.0)
    powers = torch.arange(_GRID + 1, device=device) / _GRID
    points = look(start[:, None] * (stop / start).clamp_min(1)[:, None] ** powers)
    left, right = points[:, :-1], points[:, 1:]
    while True:
        bound, peak = _bound(left, right)
        bound = bound.minimum(problem.energy[:, None])
        alive = bound > gain[rows][:, None] + _ROUNDING * problem.energy[:, None]
        most = alive.sum(1)
        living, width = torch.stack(((most > 0).sum(), most.max())).tolist()
        if not living:
            return gain, scale, zero
        if 2 * living < rows.numel():
            kept = torch.nonzero(most).squeeze(1)
            problem.keep(kept)
            rows, left, right = rows[kept], left[kept], right[kept]
            alive, peak = alive[kept], peak[kept]
        # the living ones first; every row carries as many as the one with most
        order = torch.argsort((~alive).byte(), dim=1, stable=True)[:, :width]
        left, right = (x.gather(1, _like(order, x)) for x in (left, right))
        s0, s1 = left[..., 0], right[..., 0]
        margin = (s1 - s0) / 8
        middle = look((s1 - margin).minimum(peak.gather(1, order)).maximum(s0 + margin))
        left, right = torch.cat((left, middle), 1), torch.cat((middle, right), 1)


def _like(order: Tensor, points: Tensor) -> Tensor:
    return order[..., None].expand(-1, -1, points.shape[-1])


def _gain(a: Tensor, b: Tensor) -> Tensor:
    return a.clamp_min(0).square() / b.clamp_min(_TINY)


def _bound(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """What the intervals (rows, m) can gain inside at most, over all zero points, and at which s; 0
    if no chord has its peak inside.
    """
    s0, (a0, b0) = left[..., :1], left[..., 1:].chunk(2, -1)
    s1, (a1, b1) = right[..., :1], right[..., 1:].chunk(2, -1)
    # the chord's slope is between those of ψ at the ends, 2 A there
    rise = a1 - a0
    share = ((2 * s1 * rise - (b1 - b0)) / (2 * (s1 - s0))).clamp_min(0).minimum(rise)
    a, b = a0 + share, b0 + 2 * s0 * share
    peak = b / a
    bound, which = torch.where((s0 < peak) & (peak < s1), _gain(a, b), 0.0).max(-1)
    return bound, peak.gather(-1, which[..., None]).squeeze(-1)
