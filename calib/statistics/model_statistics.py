"""Calibration statistics of a whole model: updated by window, merged over shards, saved to a file, input of a fit."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from artifacts.errors import ArtifactError, CorruptArtifactError, MismatchError
from artifacts.manifest import CorpusRecord
from artifacts.sites import Site
from artifacts.storage import Stored, read, write
from calib.solvers.threads import for_each
from calib.statistics.checks import Vectors, check_vectors
from calib.statistics.moments import CrossMoments
from calib.statistics.origin import Origin
from calib.statistics.readers import logit_metric, query_energy, query_moment, score_weights
from calib.statistics.row_sample import RowSample
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import FIRST_POSITIONS, SAMPLE_TOKENS, SiteStatistics, Tier
from calib.statistics.token_batch import TokenBatch
from calib.text.sketches import merge_sketches

FORMAT = "kvgauge.statistics"


class ModelStatistics:
    """Calibration statistics of all sites of a model.

    Parameters
    ----------
    shapes : Sequence[SiteShape]
        Shapes of the sites.
    tier : {'basic', 'full'}
        `full` adds whole-layer moments and moments between neighbouring sites.
    origin : Origin
        Provenance.
    fisher : bool
        Adds statistics weighted by squared gradients; every update then needs gradients.
    """

    def __init__(self, shapes: Sequence[SiteShape], tier: Tier, origin: Origin, *, fisher: bool = False) -> None:
        self.tier, self.origin, self.fisher = tier, origin, fisher
        ordered = sorted(shapes, key=lambda shape: shape.site)
        self.sites = {shape.site: SiteStatistics(shape, tier, fisher=fisher) for shape in ordered}
        self.cross = _cross_moments(self.sites) if tier == "full" else {}
        self.sample = RowSample(SAMPLE_TOKENS[tier])
        self.first = RowSample(SAMPLE_TOKENS[tier])
        self.windows: list[str] = []
        self.seqlen = self.n_tokens = 0
        self.ngrams = torch.empty(0, dtype=torch.int64)
        self.is_whole = True
        """False after an interrupted update or merge, when some sites have more tokens than others."""

    def update(self, batch: TokenBatch, vectors: Vectors, gradients: Vectors = MappingProxyType({})) -> None:
        """Accumulates one forward pass, or nothing of it if a check fails; an interrupt leaves `is_whole` False.

        Parameters
        ----------
        batch : TokenBatch
            Tokens of the pass.
        vectors : Mapping[Site, Float[Tensor, "tokens channels"]]
            Vectors of every site.
        gradients : Mapping[Site, Float[Tensor, "tokens channels"]]
            Gradients of the loss at every key and value, if `fisher` is set.

        Raises
        ------
        NonFiniteError
            If a vector or a gradient holds NaN or infinity.
        ValueError
            If a site is missing.
        """
        weighted = [site for site, statistics in self.sites.items() if statistics.fisher]
        check_vectors("values", vectors, self.sites, batch.windows)
        check_vectors("gradients", gradients, weighted, batch.windows)
        self.is_whole = False
        # First positions enter no sums: a fit adds those that its sink_tokens includes, see `from_position`.
        is_first = batch.positions < FIRST_POSITIONS
        rows = self.sample.choose(batch.token_priorities(), batch.positions)
        first_rows = self.first.choose(batch.window_priorities()[is_first], batch.positions[is_first])
        first, rest = is_first.nonzero()[:, 0], (~is_first).nonzero()[:, 0]

        def take_in(site: Site) -> None:
            statistics, x, g = self.sites[site], vectors[site], gradients.get(site)
            statistics.update(_rows(x, rest), None if g is None else _rows(g, rest))
            statistics.keep_first_rows(_rows(x, first), first_rows, None if g is None else _rows(g, first))
            if statistics.keeps_rows:
                statistics.keep_rows(x, rows, g)

        def take_in_both(pair: tuple[Site, Site]) -> None:
            left, right = (_rows(vectors[site], rest) for site in pair)
            self.cross[pair].update(left, right.to(left.device))

        for_each(take_in, self.sites)
        for_each(take_in_both, self.cross)
        self.windows += batch.digests
        self.n_tokens += len(batch.positions)
        self.seqlen = max(self.seqlen, int(batch.positions.max()) + 1)
        self.is_whole = True

    def merge(self, other: "ModelStatistics") -> None:
        """Adds the statistics of another shard.

        Raises
        ------
        MismatchError
            If model, version, tier or sites differ, only one has gradients, or both contain the same window.
        """
        self.origin.check_same(other.origin)
        if self.tier != other.tier:
            raise MismatchError(
                f"merge: the shards differ in tier: {self.tier} and {other.tier}. Calibrate all with one --statistics"
            )
        if self.fisher != other.fisher:
            raise MismatchError(
                f"merge: the shards differ in fisher: {self.fisher} and {other.fisher}. Calibrate every shard with "
                "--fisher, or every shard without."
            )
        different = sorted(set(self.sites) ^ set(other.sites))
        if different:
            raise MismatchError(f"merge: {different[0]} is in one shard only. Calibrate all shards with one --stage")
        # Windows are known by their content: a shard that is merged twice would double its weight unnoticed.
        twice = set(self.windows) & set(other.windows)
        if twice:
            raise MismatchError(
                f"merge: {len(twice)} of {len(other.windows)} windows are in both shards; the same shard twice? "
                "Take shards of one run with --shard 1/4 ... 4/4."
            )
        self.is_whole = False
        rows, first_rows = self.sample.merge(other.sample), self.first.merge(other.first)
        for site, statistics in self.sites.items():
            statistics.merge(other.sites[site], rows, first_rows)
        for pair, moments in self.cross.items():
            moments.merge(other.cross[pair])
        self.windows += other.windows
        self.n_tokens += other.n_tokens
        self.seqlen = max(self.seqlen, other.seqlen)
        self.ngrams = merge_sketches(self.ngrams, other.ngrams)
        self.origin = self.origin.joined(other.origin)
        self.is_whole = True

    def site(self, site: Site, sink_tokens: int) -> SiteStatistics:
        """Statistics of the positions of a site from `sink_tokens` on.

        Raises
        ------
        MismatchError
            If the site was not captured, more than 8 positions are left out, or no token is left.
        """
        if site not in self.sites:
            raise MismatchError(
                f"{site}: expected one of the sites {', '.join(map(str, self.sites))}, which the statistics have. "
                "Calibrate with the stage that the recipe needs."
            )
        if not 0 <= sink_tokens <= FIRST_POSITIONS:
            raise MismatchError(
                f"statistics: at most the first {FIRST_POSITIONS} positions can be left out of a fit; got {sink_tokens}"
            )
        chosen = self.sites[site].from_position(sink_tokens, self.sample, self.first)
        if not chosen.moments.n_tokens:
            raise MismatchError(
                f"{site}: a fit needs tokens from position {sink_tokens} on; the {len(self.windows)} windows have "
                "none. Use longer windows or fewer sink tokens."
            )
        self._add_readers(chosen, sink_tokens)
        return chosen

    def cross_second(self, a: Site, b: Site, sink_tokens: int) -> Float64[Tensor, "_ _"]:
        """E[a_i b_j] between the channels of neighbouring sites, over all positions from `sink_tokens` on.

        Raises
        ------
        MismatchError
            If the statistics do not have it.
        """
        if a > b:
            return self.cross_second(b, a, sink_tokens).mT
        if (a, b) not in self.cross:
            raise MismatchError(
                f"{b}: the statistics lack moments with {a}. Calibrate with --statistics full and pre_rope keys."
            )
        first = self.first.positions >= sink_tokens
        left, right = (self.sites[site].first_rows[first].double() for site in (a, b))
        n_tokens = int(self.sites[a].moments.n_tokens) + len(left)
        # Both sites keep the same sampled tokens, so that row i of `left` and of `right` are one token.
        return (self.cross[a, b].products.cpu() + left.mT @ right) / max(1, n_tokens)

    def _add_readers(self, chosen: SiteStatistics, sink_tokens: int) -> None:
        """Adds weights from the queries: metric and energy for keys, expected squared logits for values."""
        layer = [site for site in self.sites if site.layer == chosen.shape.site.layer]
        key = next((site for site in layer if site.tensor == "key"), None)
        query = next((site for site in layer if site.tensor == "query"), None)
        if key is None or query is None:
            return
        queries = self.sites[query].from_position(sink_tokens, self.sample, self.first)
        shape = self.sites[key].shape
        moment = query_moment(shape, queries)
        energy = query_energy(shape, moment)
        if chosen.shape.site == key:
            chosen.query_metric, chosen.query_energy = logit_metric(shape, moment, self.seqlen), energy
        else:
            rows = self.sites[key].rows[self.sample.positions >= sink_tokens]
            chosen.token_weights = score_weights(rows, energy)

    @property
    def corpus(self) -> CorpusRecord:
        """Record of the calibration text, for the manifest."""
        # Sorted, so that the digest does not depend on the order of windows or shards.
        digest = Stored(format="windows", header={"windows": sorted(self.windows)}, arrays={}).digest
        return CorpusRecord(
            name=self.origin.corpus,
            digest=digest,
            n_windows=len(self.windows),
            n_tokens=self.n_tokens,
            seqlen=self.seqlen,
            seed=self.origin.seed,
            start_token=self.origin.start_token,
        )

    @property
    def has_all_first_positions(self) -> bool:
        """True if the first positions of every window are stored, not only of a sample."""
        return self.first.complete

    def estimated_bytes(self) -> int:
        """Memory in bytes when all samples are full."""
        sites = sum(statistics.estimated_bytes() for statistics in self.sites.values())
        return sites + sum(moments.products.nbytes for moments in self.cross.values())

    def save(self, path: str | Path) -> None:
        """Writes the statistics to one file.

        Raises
        ------
        ArtifactError
            If the suffix is unknown, or an update was interrupted.
        """
        if not self.is_whole:
            raise ArtifactError(f"{path}: an update of these statistics was interrupted; gather them again")
        header = {
            **({"fisher": True} if self.fisher else {}),  # absent without gradients, as in older files
            "tier": self.tier,
            "origin": self.origin.to_json(),
            "shapes": [{**asdict(s.shape), "site": str(site)} for site, s in self.sites.items()],
            "windows": sorted(self.windows),
            "seqlen": self.seqlen,
            "n_tokens": self.n_tokens,
            "n_seen": [self.sample.n_seen, self.first.n_seen],
        }
        arrays = {
            f"{site}/{name}": tensor.cpu().contiguous().numpy()
            for site, statistics in self.sites.items()
            for name, tensor in statistics.state().items()
        }
        arrays |= {f"cross/{a}/{b}": moments.products.cpu().numpy() for (a, b), moments in self.cross.items()}
        for name, sample in (("sample", self.sample), ("first", self.first)):
            arrays[f"{name}/priorities"] = sample.priorities.numpy()
            arrays[f"{name}/positions"] = sample.positions.numpy()
        arrays["corpus/ngrams"] = self.ngrams.numpy()
        write(Path(path), Stored(format=FORMAT, header=header, arrays=arrays))

    @classmethod
    def load(cls, path: str | Path) -> "ModelStatistics":
        """Reads a file of `save`.

        Raises
        ------
        ArtifactError
            If the file is damaged or has another format.
        """
        stored = read(Path(path), FORMAT)
        try:
            return cls._from_stored(stored)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifactError(f"{path}: {error}") from error

    @classmethod
    def _from_stored(cls, stored: Stored) -> "ModelStatistics":
        header = stored.header
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in stored.arrays.items()}
        shapes = [SiteShape(**{**shape, "site": Site.parse(shape["site"])}) for shape in header["shapes"]]
        origin, fisher = Origin(**header["origin"]), bool(header.get("fisher", False))
        statistics = cls(shapes, cast(Tier, header["tier"]), origin, fisher=fisher)
        for site, own in statistics.sites.items():
            prefix = f"{site}/"
            own.restore({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        for (a, b), moments in statistics.cross.items():
            moments.products = tensors[f"cross/{a}/{b}"]
        for name, sample, seen in zip(
            ("sample", "first"), (statistics.sample, statistics.first), header["n_seen"], strict=True
        ):
            sample.priorities, sample.positions = tensors[f"{name}/priorities"], tensors[f"{name}/positions"]
            sample.n_seen = seen
        statistics.windows = list(header["windows"])
        statistics.seqlen, statistics.n_tokens = header["seqlen"], header["n_tokens"]
        statistics.ngrams = tensors["corpus/ngrams"]
        return statistics


def _rows(x: Float[Tensor, "tokens channels"], index: Int64[Tensor, " rows"]) -> Float[Tensor, "rows channels"]:
    return x.index_select(0, index.to(x.device))


def _cross_moments(sites: Mapping[Site, SiteStatistics]) -> dict[tuple[Site, Site], CrossMoments]:
    """Empty moments of each site with its possible predictors: the layer before, and the key of the same layer."""
    cached = {
        site: s.shape.channels for site, s in sites.items() if site.tensor != "query" and site.stage != "post_rope"
    }
    return {
        (earlier, site): CrossMoments(cached[earlier], cached[site])
        for site in cached
        for earlier in cached
        if earlier.layer == site.layer - 1 or (earlier.layer == site.layer and earlier < site)
    }
