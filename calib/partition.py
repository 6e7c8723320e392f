"""The best partition of ordered bins into intervals, for many problems at once: the programme behind `calib.kmeans`.

Arguments called `prefix` hold sums of ``(w, w u, w u^2)`` over the bins before each position, all ascending and u in
[0, 1]: "3 problems positions".
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

# Children per node of the divide and conquer, and candidates per dense tile. Of 4, 8 and 16 the fastest, measured on
# few large and on many small problems.
_WIDTH = 8
_TINY = torch.finfo(torch.float64).tiny


def at(prefix: Tensor, position: Tensor) -> Tensor:
    """The sums at one or several positions of each problem."""
    return prefix.gather(-1, position.expand(len(prefix), -1, -1))


def cost(start: Tensor, stop: Tensor) -> Tensor:
    """Squared error around the mean, from the prefix sums at two positions; zero if they coincide or are swapped."""
    w, s, q = (stop - start).unbind()  # a fresh array, so what follows may overwrite it
    return q.sub_(s.square_().div_(w.clamp_(min=_TINY))).clamp_(min=0)


def programme_rows(prefix: Tensor, count: int) -> list[Tensor]:
    """Rows ``D[0], ..., D[count - 1]`` of the programme, each ``problems positions``."""
    none = torch.full_like(prefix[0], torch.inf)
    none[:, 0] = 0
    rows, coarse = [none, _ascending(cost(prefix[..., :1], prefix))], _Coarse(prefix)
    while len(rows) < count:
        rows.append(_next_row(prefix, coarse, rows[-1]))
    return rows[:count]


def _next_row(prefix: Tensor, coarse: "_Coarse", row: Tensor) -> Tensor:
    """``min_i row[i] + cost(i, j)`` at every position j, by strides that shrink to 1.

    The best i at the two ends of a block of ``_WIDTH`` strides bounds it inside. The ranges of all blocks add up to
    n + blocks candidates, each for ``_WIDTH`` positions; with the tiles' padding, under 3 n ``_WIDTH`` costs a stride.
    Best cuts and rows ascend by theory; what is made to ascend here are ties decided by rounding.
    """
    sums = torch.stack([prefix[0], prefix[1], row - prefix[2]])
    best, stride = coarse.cuts(row), coarse.stride // _WIDTH
    while stride > 1:
        best, stride = _Tiles(sums, best, stride).cuts(), stride // _WIDTH
    return _ascending(pad(_Tiles(sums, best, 1).least() + prefix[2, :, 1:], (1, 0)))


class _Coarse:
    """Costs of all candidates at a few positions a stride apart, alike for all rows: the first cuts of each row."""

    def __init__(self, prefix: Tensor) -> None:
        self.n_bins, self.stride = prefix.shape[-1] - 1, _WIDTH
        while self.stride * _WIDTH < self.n_bins:
            self.stride *= _WIDTH
        self.costs = cost(prefix[:, :, None, :-1], prefix[:, :, self.stride : -1 : self.stride, None])

    def cuts(self, row: Tensor) -> Tensor:
        """Best i at j = 0, stride, 2 stride, ... and at the end, or bounds on it, ``problems positions``."""
        best = torch.from_numpy((self.costs + row[:, None, :-1]).numpy().argmin(-1))
        return pad(_ascending(pad(best, (1, 0))), (0, 1), value=self.n_bins)


class _Tiles:
    """``row[i] + cost(i, j)``, less what depends on j alone, for candidates i at positions j a stride apart.

    Between two bounds lies a block of ``_WIDTH`` positions, the last one repeated where a problem ends. Its candidates
    are cut into tiles of ``_WIDTH``, again with the last one repeated; all tiles form one dense array, tiles innermost.
    Indices count through the problems.
    """

    def __init__(self, sums: Tensor, bounds: Tensor, stride: int) -> None:
        n_problems, n_positions = sums.shape[1:]
        n_blocks = bounds.shape[1] - 1
        self.n_inside, self.shape = -(-(n_positions - 1) // stride), (_WIDTH, n_problems, n_blocks)
        self.base = torch.arange(n_problems)[:, None] * n_positions
        first, last = (self.base + bounds[:, :-1]).flatten(), (self.base + bounds[:, 1:]).flatten()
        n_tiles = (last - first) // _WIDTH + 1
        self.block = torch.arange(len(first)).repeat_interleave(n_tiles)
        before = n_tiles.cumsum(0) - n_tiles
        self.first = _take(first - _WIDTH * before, self.block) + _WIDTH * torch.arange(len(self.block))
        steps = torch.arange(_WIDTH)[:, None]
        candidates = (self.first + steps).minimum(_take(last, self.block))
        start = (self.base + _WIDTH * stride * torch.arange(n_blocks)).flatten()
        end = (self.base + n_positions - 1).expand(-1, n_blocks).flatten()
        positions = (_take(start, self.block) + stride * (steps + 1)).minimum(_take(end, self.block))
        self.costs = self._costs(sums.flatten(1), candidates, positions)
        self.lowest = self.costs.amin(0)

    def least(self) -> Tensor:
        """Minimum at each position, ``problems positions``."""
        return self._positions(self._per_block(self.lowest))

    def cuts(self) -> Tensor:
        """First minimiser at position 0, at each position within, and at the end, ``problems positions``."""
        hits = self.lowest == self._per_block(self.lowest).flatten(1).index_select(1, self.block)
        number = torch.arange(len(self.block), dtype=self.lowest.dtype).expand_as(hits)
        tile = self._per_block(number.masked_fill(~hits, torch.inf)).long().flatten(1)
        within = self.costs.gather(2, tile.expand(_WIDTH, -1, -1)).min(0).indices
        cuts = self._positions((_take(self.first, tile) + within).view(self.shape)) - self.base
        return _ascending(pad(cuts, (1, 0)))

    @staticmethod
    def _costs(sums: Tensor, candidates: Tensor, positions: Tensor) -> Tensor:
        """An interval without weight has no moment and costs nothing; one that runs backwards costs too much to win."""
        weights = _take(sums[0], positions) - _take(sums[0], candidates)[:, None]
        moments = _take(sums[1], positions) - _take(sums[1], candidates)[:, None]
        weights = threshold(weights, 0.0, -_TINY, inplace=True)
        return torch.addcdiv(_take(sums[2], candidates)[:, None], moments.square_(), weights, value=-1)

    def _per_block(self, x: Tensor) -> Tensor:
        """Least of the tiles of each block, ``width problems blocks``."""
        least = x.new_full(self.shape, torch.inf).flatten(1)
        return least.scatter_reduce_(1, self.block.expand_as(x), x, "amin").view(self.shape)

    def _positions(self, x: Tensor) -> Tensor:
        """In the order of the positions, without the repeated ones."""
        return x.permute(1, 2, 0).flatten(1)[:, : self.n_inside]


def _ascending(x: Tensor) -> Tensor:
    """``x.cummax(-1).values``, ten times as fast."""
    return torch.from_numpy(np.maximum.accumulate(x.numpy(), axis=-1))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, several times as fast."""
    return x.index_select(0, index.flatten()).view(index.shape)


def optimal_bounds(prefix: Tensor, mirrored: Tensor, n_levels: int) -> Tensor:
    """Positions that separate the optimal intervals, ``problems n_levels + 1``.

    Left half and mirrored right half are one batch of half as many rows, which halves the steps that must wait for each
    other; they meet at the best position for the middle.
    """
    n_problems, end = prefix.shape[1], prefix.shape[2] - 1
    n_left, n_right = n_levels // 2, n_levels - n_levels // 2
    rows = programme_rows(torch.cat([prefix, mirrored], 1), n_right + 1)
    left, right = ([row[part] for row in rows] for part in (slice(n_problems), slice(n_problems, None)))
    middle = (left[n_left] + right[n_right].flip(-1)).argmin(-1, keepdim=True)
    before = _path(prefix, left[:n_left], middle)
    return torch.cat([before, middle, end - _path(mirrored, right[:n_right], end - middle).flip(-1)], -1)


def _path(prefix: Tensor, rows: list[Tensor], stop: Tensor) -> Tensor:
    """Where the optimal intervals up to a position begin, ``problems len(rows)``: the path, read from its end."""
    starts: list[Tensor] = []
    for row in reversed(rows):
        stop = (row + cost(prefix, at(prefix, stop))).argmin(-1, keepdim=True)
        starts.insert(0, stop)
    return torch.cat([stop[:, :0], *starts], -1)
