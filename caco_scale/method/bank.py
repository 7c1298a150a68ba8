"""The bank of CaCo (arXiv:2203.14370): learnable positives and negatives, sharded over the ranks by rows.

Every rank owns a contiguous block of rows and their velocity. What travels is the batch, never the bank: the
ranks gather queries and keys, and each computes what its own rows contribute to the loss and its gradients.

    q, k    queries and keys, unit norm        W, U   bank rows, and W / ‖W‖        s = q Uᵀ   similarities
    y       positive: argmax_k k·U, the row nearest to the OTHER view's key
    p       softmax(s / T) = exp(s / T − log Z)
    loss    mean over N of (log Z − s_y / T);  its gradient is dq = (p U − u_y) / (T N)
    w       |softmax(s / T_bank) − onehot(y)|, held constant
    g       −[wᵀ q / N − mean_n(w ∘ s) ∘ U] / (T_bank ‖W‖);  then  v ← m v + g  and  W ← W − lr v

With A = wᵀ q the second term of g is the projection ⟨u, A⟩ u, so that g needs nothing from other ranks.

No N×K matrix: the queries pass in blocks. With its own rows a rank makes e = exp(s / T) of a block, tile by tile, and
sums e and e u; when the ranks have added up Z = Σ e, it goes once more over the same e for pᵀ q = eᵀ (q / Z). A
similarity lies between −1 and 1, so that neither e nor its sum leaves the numbers of the dtype: no maximum to find.

Shapes: R ranks, B this rank's batch, N = R·B global batch, V views, K rows, S this rank's rows, D embedding.
Global tensors have the samples in rank order first and the views second: (N, V, D). A pair is a query view i
and a key view j ≠ i; what there is per pair is (N, V, 2), and a pair that does not exist has weight 0.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from caco_scale.distributed import collectives
from caco_scale.errors import UserError, did_you_mean

RULES = ("caco", "adco", "moco")
EXCHANGES = ("statistics", "logits")
KERNELS = ("torch", "triton")
KERNEL_INPUTS = ("fp32", "tf32", "bf16")

# Bytes that a block of queries' exponentials with all own rows takes. They stay until Z is known, for which each block
# waits in one all-reduce: a GPU takes few, large blocks, on a CPU memory counts.
BLOCK_BYTES_CPU = 128 * 2**20
BLOCK_BYTES_GPU = 256 * 2**20
# Fewer queries would be no work for a matrix product; with millions of own rows a block is larger instead.
LEAST_QUERIES = 128
# Bytes of a tile, those of some own rows, which is made, summed and multiplied at a time: on a CPU it should stay in
# the cache meanwhile, on a GPU be worth its kernel launches.
TILE_BYTES_CPU = 8 * 2**20
TILE_BYTES_GPU = 64 * 2**20

# Below these exp(s / T), with s from −1 to 1, or its sum over the rows could leave the numbers of the dtype.
MIN_TEMPERATURE = {torch.float32: 0.02, torch.float64: 0.003}

# Initial rows are drawn in blocks of this many, each from its own seed, so that a rank draws only its own.
ROWS_PER_SEED = 4096


@dataclass(frozen=True)
class Contrast:
    """What one :meth:`ShardedBank.contrast` found: the loss for the encoder and the gradient for the bank.

    Attributes:
        loss: (), differentiable in the queries; the GLOBAL loss (times ``weight``) on every rank.
        positives: per key view the rows (B,) that are this rank's positives; None for adco and moco.
        positive_probability: (), global mean of p at the positive over all pairs; no gradient.
        bank_gradient: (S, D) of this rank's rows (times ``weight``); None for moco.
        rule: the rule that made it.
        global_positives: (N, 2) positives of the global batch, counted by :meth:`ShardedBank.step`; or None.
        global_keys: (N, 2, D) keys that moco will enqueue; None for the other rules.
    """

    loss: torch.Tensor
    positives: list | None
    positive_probability: torch.Tensor
    bank_gradient: torch.Tensor | None
    rule: str
    global_positives: torch.Tensor | None
    global_keys: torch.Tensor | None


def pair_weights(num_views, dtype=torch.float64, device="cpu"):
    """Weight (V, 2) of each pair (query view, key view) in the loss and the bank gradient; 0 where i = j.

    Two views: the SUM of both pairs. More: the mean over pairs whose query is a global view plus the mean
    over pairs whose query is a local crop.
    """
    weights = torch.ones(num_views, 2, dtype=dtype, device=device)
    weights[:2].fill_diagonal_(0)
    if num_views > 2:
        weights[:2] /= 2
        weights[2:] /= 2 * (num_views - 2)
    return weights


def pack_nearest(values, rows, size):
    """Order-preserving int64 of (float32 value, row): the larger value wins, on a tie the lower row."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: −0.0 and 0.0 tie
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # of negative floats the larger pattern is less
    return ordered * 2**32 + (size - 1 - rows)


def unpack_nearest(packed, size):
    """The row of :func:`pack_nearest`."""
    return size - 1 - (packed & 0xFFFFFFFF)


def initial_rows(start, stop, dim, seed, dtype, device):
    """Rows ``start <= row < stop`` of the seeded random bank: the same however many ranks share them.

    Gaussian directions of unit norm. A row's gradient is divided by its norm, so a row that the warm-up has
    not filled learns as fast as one that it has (a plain randn row of 256 dimensions would turn 256 times
    more slowly).
    """
    rows = torch.empty(stop - start, dim, dtype=dtype)
    for block in range(start // ROWS_PER_SEED, -(-stop // ROWS_PER_SEED)):
        generator = torch.Generator().manual_seed((seed * 2**24 + block + 0xCAC0) % 2**63)
        drawn = F.normalize(torch.randn(ROWS_PER_SEED, dim, generator=generator).double())
        first = block * ROWS_PER_SEED
        begin, end = max(start, first), min(stop, first + ROWS_PER_SEED)
        rows[begin - start : end - start] = drawn[begin - first : end - first]
    return rows.to(device)


def softmax_at_positive(statistics, similarity, pairs, temperatures, is_key):
    """log p at the positives, and what e is to be multiplied with for Σ_pairs weight p, for each temperature.

    Args:
        statistics: (n, V, ...): Z for each temperature.
        similarity: (n, V, 2) of the queries with the positives.
        pairs: (V, 2) weights: the pairs of a query differ in them, and in Z where the positive is the key.
        is_key: whether the positive is the key, whose logit is one more beside the K.

    Returns: (T, n, V, 2) log p; list of T factors (n, V, 1).
    """
    log_p, factors = [], []
    for i, t in enumerate(temperatures):
        z = statistics[:, :, i, None]
        if is_key:
            z = z + (similarity / t).exp()
        log_p.append(similarity / t - z.log())
        factors.append((pairs / z).sum(2, keepdim=True))
    return torch.stack(log_p), factors


class _GlobalLoss(torch.autograd.Function):
    """The loss with its gradient already known: autograd keeps dq and nothing else, the backward is local."""

    @staticmethod
    def forward(ctx, loss, dq, *queries):
        ctx.save_for_backward(*(d.to(query.dtype) for d, query in zip(dq.unbind(1), queries, strict=True)))
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return None, None, *((grad_loss * dq).to(dq.dtype) for dq in ctx.saved_tensors)


class ShardedBank:
    """The K learnable positives and negatives of CaCo, their rows split over the ranks of ``group``.

    Making one is a collective: the ranks check that they mean the same bank. Computation is in ``dtype`` with
    autocast off; matrix products follow torch's own float32 precision setting.

    Args:
        size: K, the number of rows of the whole bank; any number, ranks without rows are allowed.
        dim: D.
        momentum: of the bank's SGD.
        group: process group whose ranks share the bank; None: the default one, or one process without any.
        device: of rows, velocity, queries and keys.
        dtype: torch.float32 or torch.float64, of rows, velocity and computation.
        seed: of the initial rows, which are the same at any world size.
        kernel: "torch": chunks by torch's own operations. "triton": kernels of ``kernels.py``, whose exponentials
            never reach memory, for float32 on CUDA; asked for, never chosen: tf32 and bf16 move a few positives.
        kernel_inputs: what the kernels' matrix products read: "fp32", "tf32" or "bf16"; sums are fp32.
        exchange: what crosses ranks for the softmax. "statistics": one sum per query. "logits": whole rows of
            similarities, to the rank that owns the query; heavy, simple, equal in result: the other's check.

    Attributes:
        rows, velocity: (S, D), this rank's.
        rows_range: (start, stop) of this rank's rows in the whole bank.
        pointer: the row of the whole bank that moco overwrites next.
        assignments: (S,) int64, how often a row was a positive since :meth:`reset_assignments`.

    Raises:
        UserError: for an argument that makes no bank, or that differs between ranks (on every rank).
    """

    def __init__(
        self,
        size,
        dim,
        momentum=0.9,
        group=None,
        device="cpu",
        dtype=torch.float32,
        seed=0,
        exchange="statistics",
        kernel="torch",
        kernel_inputs="tf32",
    ):
        if size < 1 or dim < 1:
            raise UserError(f"a bank needs at least one row and one dimension, got size {size}, dim {dim}")
        if dtype not in MIN_TEMPERATURE:
            raise UserError(f"the bank's dtype is {dtype}: use torch.float32 or torch.float64")
        self.exchange = _known(exchange, EXCHANGES, "bank exchange")
        self.kernel_inputs = _known(kernel_inputs, KERNEL_INPUTS, "bank kernel_inputs")
        self._kernels = (
            _load_kernels(device, dtype) if _known(kernel, KERNELS, "bank kernel") == "triton" else None
        )
        facts = {"size": size, "dim": dim, "momentum": momentum, "dtype": dtype, "seed": seed}
        facts |= {"exchange": exchange, "kernel": kernel, "kernel_inputs": kernel_inputs}
        collectives.assert_equal_on_all_ranks(facts, "bank", group)
        self.size, self.dim, self.momentum, self.group = size, dim, momentum, group
        self.num_ranks, self.rank = collectives.world_size(group), collectives.rank(group)
        self.rows_range = collectives.shard_range(size, self.num_ranks, self.rank)
        self.rows = initial_rows(*self.rows_range, dim, seed, dtype, device)
        self.velocity = torch.zeros_like(self.rows)
        self.pointer = 0
        self.assignments = torch.zeros(len(self.rows), dtype=torch.int64, device=device)

    # ---- the whole bank

    @torch.no_grad()
    def load_full(self, rows, velocity):
        """Take this rank's rows and velocity out of the whole bank's, (K, D) each, the same on every rank.

        Raises:
            UserError: for another shape.
        """
        for name, whole in (("rows", rows), ("velocity", velocity)):
            if tuple(whole.shape) != (self.size, self.dim):
                raise UserError(f"bank {name} are {tuple(whole.shape)}, this bank is {(self.size, self.dim)}")
        start, stop = self.rows_range
        self.rows.copy_(rows[start:stop])
        self.velocity.copy_(velocity[start:stop])

    def full(self):
        """Copies of the whole bank's rows and velocity, (K, D) each, on every rank; collective."""
        own = (self.rows.clone(), self.velocity.clone())
        return tuple(collectives.all_gather_shards(x, self.size, self.group) for x in own)

    def reset_velocity(self):
        """Velocity to zero, as at the switch from the bank's warm-up to CaCo."""
        self.velocity.zero_()

    def reset_assignments(self):
        """Start anew to count which rows are positives, as once per epoch."""
        self.assignments.zero_()

    # ---- one step

    def contrast(
        self, queries, keys, temperature=0.08, bank_temperature=0.08, rule="caco", weight=1.0
    ) -> Contrast:
        """Contrast queries with the bank: the loss for the encoder, and the gradient for the bank itself.

        Changes nothing in the bank; :meth:`step` does. Collective. Crosses ranks: the (B, V+2, D) embeddings,
        the positives, the softmax statistics and the queries' gradient, in four collectives (rule caco,
        float32; one small one more for each further block of queries) and none in the backward; before them,
        between hosts, a small check that all brought the same shapes.

        Args:
            queries: per view (B, D), unit norm, the two global views first; B the same on every rank.
            keys: of the two global views (B, D), unit norm, without gradient.
            temperature, bank_temperature: T of the encoder's loss, T_bank of the bank's gradient.
            rule: "caco": the positive is the row nearest to the other view's key. "adco": the positive is
                that key itself, K+1 logits with the key first; only negatives are learned. "moco": as adco,
                but the rows are a queue of keys.
            weight: of this call in the step: 1 / micro-steps under gradient accumulation.

        After ``result.loss.backward()`` a rank's query gradient, in the queries' dtype, is R times its part
        of the global gradient: DDP, DeepSpeed and FSDP average over ranks. Embeddings or rows that are not
        finite make the loss not finite, on every rank alike.

        Raises:
            UserError: on every rank, for a wrong argument on any or shapes that differ between ranks.

        Source: arXiv:2203.14370 (CaCo), arXiv:2011.08435 (AdCo), arXiv:1911.05722 (MoCo).
        """
        self._check(queries, keys, temperature, bank_temperature, rule, weight)
        with torch.no_grad(), torch.autocast(self.rows.device.type, enabled=False):
            own = torch.stack([x.to(self.rows.dtype) for x in (*queries, *keys)], dim=1)
            block = collectives.all_gather_rows(own, self.group)
            query, key = block[:, :-2].contiguous(), block[:, -2:].contiguous()
            loss, dq, found = self._contrast(query, key, temperature, bank_temperature, rule, weight)
        return Contrast(loss=_GlobalLoss.apply(loss, dq, *queries), rule=rule, **found)

    def _contrast(self, query, key, temperature, bank_temperature, rule, weight):
        """Loss (), dq (B, V, D) and the other fields of :class:`Contrast`, from the global batch."""
        num_samples, num_views, _ = query.shape
        pairs = pair_weights(num_views, query.dtype, query.device)
        learns = rule != "moco"
        two = learns and bank_temperature != temperature
        temperatures = [temperature, bank_temperature] if two else [temperature]

        positives = self._nearest(key) if rule == "caco" else None
        s = torch.einsum("nvd,njd->nvj", query, key if positives is None else self._unit(positives))
        whole = self._whole_statistics(query, positives, temperatures) if self.exchange == "logits" else None
        log_p = query.new_empty(len(temperatures), num_samples, num_views, 2)  # at the positive
        attraction = torch.empty_like(query)  # Σ_pairs weight p U
        pull = torch.zeros_like(self.rows) if learns else None  # Σ_pairs weight pᵀ q
        for samples, tiles in self._blocks(num_samples, num_views):
            sums, attracted = self._attract(query[samples], temperatures, tiles)
            if whole is not None:
                statistics = whole[samples]
            else:  # all that depends on other ranks' rows: Z, and how similar the positive is
                statistics = torch.cat([sums, s[samples]], dim=2) if rule == "caco" else sums
                statistics = collectives.all_reduce_(statistics, group=self.group)
            if rule == "caco":
                s[samples] = statistics[:, :, -2:]
            log_p[:, samples], factors = softmax_at_positive(
                statistics, s[samples], pairs, temperatures, is_key=rule != "caco"
            )
            attraction[samples] = attracted * factors[0]
            if learns:
                self._pull_(pull, query[samples], query[samples] * factors[-1], temperatures[-1], tiles)

        loss = -weight * (pairs * log_p[0]).sum() / num_samples
        loss = loss + 0 * key.sum()  # a key that is not finite chose a meaningless positive: say so
        dq = self._query_gradient(attraction, key, positives, pairs, log_p[0].exp())
        dq *= self.num_ranks * weight / (temperature * num_samples)
        if rule == "caco":
            self._pull_positives(pull, positives, query, pairs, log_p[-1].exp())
        if learns:
            self._tangent_(pull).mul_(-weight / (temperatures[-1] * num_samples))

        own, exists = self._own_samples(num_samples), pairs > 0
        found = {
            "positives": [y.clone() for y in positives[own].unbind(1)] if rule == "caco" else None,
            "positive_probability": (exists * log_p[0].exp()).sum() / (exists.sum() * num_samples),
            "bank_gradient": pull,
            "global_positives": positives,
            "global_keys": None if learns else key,
        }
        return loss, dq, found

    @torch.no_grad()
    def step(self, result, lr):
        """The bank's step, after the encoder's: v ← m v + g, W ← W − lr v; for moco, enqueue the step's keys.

        Args:
            result: what :meth:`contrast` returned; under gradient accumulation the list, for one step of all.
            lr: the bank's learning rate (moco's queue has none and ignores it).

        Nothing crosses ranks. A step that is to be skipped is simply not called.

        Raises:
            UserError: for results of several rules.
        """
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        rules = {r.rule for r in results}
        if len(rules) != 1:
            raise UserError(f"one bank step takes results of one rule, got {sorted(rules)}")
        if rules == {"moco"}:
            return self._enqueue([r.global_keys for r in results])
        self.velocity.mul_(self.momentum)
        for r in results:
            self.velocity.add_(r.bank_gradient)
            if r.global_positives is not None:
                self._count(r.global_positives)
        self.rows.sub_(self.velocity, alpha=lr)

    # ---- looking at it

    @torch.no_grad()
    def similarities(self, query):
        """Similarities (B, K) of this rank's queries (B, D) with all rows, before any temperature.

        Collective. Crosses ranks with the queries and with (B, S) blocks of similarities. No gradient.

        Raises:
            UserError: on every rank, if the shape is not (B, D) with B the same on every rank.
        """
        shape = tuple(query.shape)
        error = None if shape[1:] == (self.dim,) else f"query is {shape}, expected (batch size, {self.dim})"
        collectives.assert_equal_on_all_ranks({"shape": shape}, "similarities", self.group, error)
        with torch.autocast(self.rows.device.type, enabled=False):
            query = collectives.all_gather_rows(query.detach().to(self.rows.dtype), self.group)
            return collectives.exchange_row_blocks(query @ F.normalize(self.rows).T, self.size, self.group)

    @torch.no_grad()
    def diagnostics(self):
        """How the bank is used: floats, the same on every rank. Collective; the host waits for the device.

        ``rows_used``: share of rows that were a positive since :meth:`reset_assignments`.
        ``assignment_entropy``: of the positives over the rows, from 0 (one row is all) to 1 (all rows alike).
        ``row_norm``: mean norm of the rows.
        """
        counts = self.assignments.double()
        log_counts = torch.special.xlogy(counts, counts)
        local = torch.stack(
            [x.double().sum() for x in (counts > 0, counts, log_counts, self.rows.norm(dim=1))]
        )
        used, total, count_log_count, norms = collectives.all_reduce_(local, group=self.group).tolist()
        entropy = math.log(total) - count_log_count / total if total else 0.0
        return {
            "rows_used": used / self.size,
            "assignment_entropy": max(entropy, 0.0) / math.log(self.size) if self.size > 1 else 0.0,
            "row_norm": norms / self.size,
        }

    # ---- what crosses ranks

    def _nearest(self, key):
        """Positives (N, 2): the rows of the whole bank nearest to the keys (N, 2, D); of equals the lowest."""
        keys = key.flatten(0, 1)
        if self.exchange == "logits":
            whole = collectives.exchange_row_blocks(keys @ F.normalize(self.rows).T, self.size, self.group)
            return collectives.all_gather_rows(whole.argmax(1), self.group).view(-1, 2)
        if self._kernels:
            found = self._kernels.nearest(keys, F.normalize(self.rows), self.kernel_inputs)
            return self._global_nearest(found[0], found[1] + self.rows_range[0]).view(-1, 2)
        best = keys.new_full((len(keys),), -math.inf)
        rows = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        for tile in self._tiles(len(keys)):
            value, row = (keys @ F.normalize(self.rows[tile]).T).max(1)  # the first of equals
            rows = torch.where(value > best, row + (self.rows_range[0] + tile.start), rows)
            best = torch.where(value > best, value, best)
        return self._global_nearest(best, rows).view(-1, 2)

    def _whole_statistics(self, query, positives, temperatures):
        """[Z | positives' similarities] (N, V, ...) from whole rows of similarities of one's own queries."""
        num_views = query.shape[1]
        similarities = query.flatten(0, 1) @ F.normalize(self.rows).T
        whole = collectives.exchange_row_blocks(similarities, self.size, self.group)
        whole = whole.view(-1, num_views, self.size)
        columns = torch.stack([(whole / t).exp().sum(2) for t in temperatures], dim=2)
        if positives is not None:
            own = positives[self._own_samples(len(query)), None].expand(-1, num_views, -1)
            columns = torch.cat([columns, whole.gather(2, own)], dim=2)
        return collectives.all_gather_rows(columns, self.group)

    def _global_nearest(self, values, rows):
        """The rows of the largest values over all ranks; on a tie the lowest row."""
        if values.dtype == torch.float32:
            packed = pack_nearest(values, rows, self.size)
            return unpack_nearest(collectives.all_reduce_(packed, dist.ReduceOp.MAX, self.group), self.size)
        largest = collectives.all_reduce_(values.clone(), dist.ReduceOp.MAX, self.group)
        rows = torch.where(values == largest, rows, self.size - 1)
        return collectives.all_reduce_(rows, dist.ReduceOp.MIN, self.group)

    # ---- what one's own rows contribute

    def _blocks(self, num_samples, num_views):
        """The samples in blocks, and for each the tiles: own rows, and where the block's e with them is kept."""
        if self._kernels:  # which keep nothing
            yield slice(0, num_samples), None
            return
        num_bytes = BLOCK_BYTES_CPU if self.rows.device.type == "cpu" else BLOCK_BYTES_GPU
        most_rows = collectives.shard_range(self.size, self.num_ranks, 0)[1]  # as many blocks on every rank
        queries = max(LEAST_QUERIES, num_bytes // (most_rows * self.rows.element_size()))
        length = min(num_samples, max(1, queries // num_views))
        memory = self.rows.new_empty(length * num_views * len(self.rows))
        for start in range(0, num_samples, length):
            samples = slice(start, min(start + length, num_samples))
            width = (samples.stop - start) * num_views
            tiles = [
                (rows, memory[width * rows.start : width * rows.stop].view(width, -1))
                for rows in self._tiles(width)
            ]
            yield samples, tiles

    def _tiles(self, num_queries):
        """This rank's rows in slices, of a limited number of similarities."""
        num_bytes = TILE_BYTES_CPU if self.rows.device.type == "cpu" else TILE_BYTES_GPU
        length = max(1, num_bytes // (num_queries * self.rows.element_size()))
        for start in range(0, len(self.rows), length):
            yield slice(start, min(start + length, len(self.rows)))

    def _attract(self, query, temperatures, tiles):
        """Σ e (n, V, temperatures) and Σ e u at T (n, V, D), e = exp(s / T), over one's own rows.

        The tiles keep e, at T_bank where there are two temperatures.
        """
        if self._kernels:
            unit = F.normalize(self.rows)
            sums, attracted = self._kernels.attract(
                query.flatten(0, 1), unit, temperatures, self.kernel_inputs
            )
            return sums.view(*query.shape[:2], -1), attracted.view_as(query)
        first, *others = temperatures
        scaled = query.flatten(0, 1) * (math.log2(math.e) / first)  # a power of 2 is quicker than one of e
        sums = scaled.new_zeros(len(temperatures), len(scaled))
        attracted = torch.zeros_like(scaled)
        for rows, tile in tiles:
            unit = F.normalize(self.rows[rows])
            torch.mm(scaled, unit.T, out=tile)
            e = tile.exp2() if others else tile.exp2_()
            sums[0] += e.sum(1)
            attracted.addmm_(e, unit)
            for i, t in enumerate(others, start=1):
                sums[i] += tile.mul_(first / t).exp2_().sum(1)
        return sums.T.reshape(*query.shape[:2], -1), attracted.view_as(query)

    def _pull_(self, pull, query, weighted, temperature, tiles):
        """Add eᵀ (q / Z) of one's own rows to ``pull`` (S, D); ``weighted`` (n, V, D) is the query divided by Z."""
        query, weighted = query.flatten(0, 1), weighted.flatten(0, 1)
        if self._kernels:
            unit = F.normalize(self.rows)
            return self._kernels.pull_(pull, query, weighted, unit, temperature, self.kernel_inputs)
        for rows, tile in tiles:
            pull[rows].addmm_(tile.T, weighted)

    def _query_gradient(self, attraction, key, positives, pairs, p):
        """Σ_pairs weight (p U − positive), summed over the ranks: (B, V, D) for this rank's queries."""
        if positives is not None:
            attraction -= torch.einsum("vj,njd->nvd", pairs, self._unit(positives))
        dq = collectives.reduce_scatter_rows(attraction, self.group)
        if positives is None:  # the positive is the key, and every rank has its own
            own = self._own_samples(len(key))
            dq = dq + torch.einsum("nvj,njd->nvd", pairs * (p[own] - 1), key[own])
        return dq

    def _pull_positives(self, pull, positives, query, pairs, p):
        """Make A = wᵀ q of ``pull`` = pᵀ q, in place: the weight of a positive is 1 − p, not p."""
        if len(pull):
            missing = torch.einsum("nvj,nvd->njd", pairs * (1 - 2 * p), query)
            row, owned = self._own_rows(positives)
            pull.index_add_(0, row.flatten(), torch.where(owned[..., None], missing, 0).flatten(0, 1))

    def _tangent_(self, pull):
        """[A − ⟨u, A⟩ u] / ‖W‖ in place of A (S, D)."""
        norm = self.rows.norm(dim=1).clamp_min(1e-12)
        radial = torch.einsum("sd,sd->s", self.rows, pull) / norm.square()
        return pull.addcmul_(self.rows, radial[:, None], value=-1).div_(norm[:, None])

    def _own_samples(self, num_samples):
        batch_size = num_samples // self.num_ranks
        return slice(self.rank * batch_size, (self.rank + 1) * batch_size)

    def _own_rows(self, rows):
        """Rows of the whole bank as rows of this rank's, and which it owns (the others point anywhere)."""
        start, stop = self.rows_range
        return (rows - start).clamp(0, max(stop - start - 1, 0)), (rows >= start) & (rows < stop)

    def _unit(self, rows):
        """Unit rows (..., D) for rows (...) of the whole bank; zeros where another rank owns the row."""
        if not len(self.rows):
            return self.rows.new_zeros(*rows.shape, self.dim)
        row, owned = self._own_rows(rows)
        return torch.where(owned[..., None], F.normalize(self.rows[row], dim=-1), 0)

    # ---- moving the rows

    def _count(self, positives):
        if len(self.rows):
            row, owned = self._own_rows(positives)
            self.assignments.index_add_(0, row.flatten(), owned.flatten().long())

    def _enqueue(self, keys):
        """Overwrite the next rows, modulo K, by the step's keys: (N, 2, D) from each micro-step.

        The order is the global batch's, all of view 1 and then all of view 2. A rank's share of that batch is
        its micro-batches one after another, hence (view, rank, micro-step, sample).
        """
        by_rank = torch.cat([k.view(self.num_ranks, -1, 2, self.dim) for k in keys], dim=1)
        ordered = by_rank.permute(2, 0, 1, 3).reshape(-1, self.dim)
        skipped = max(0, len(ordered) - self.size)  # more keys than rows: the last ones stay
        first = (self.pointer + skipped) % self.size
        before_wrap = skipped + self.size - first
        self._write(first, ordered[skipped:before_wrap])
        self._write(0, ordered[before_wrap:])
        self.pointer = (self.pointer + len(ordered)) % self.size

    def _write(self, first, values):
        """Rows ``first, first + 1, …`` of the whole bank become ``values``, where they are this rank's."""
        start, stop = self.rows_range
        begin, end = max(start, first), min(stop, first + len(values))
        if begin < end:
            self.rows[begin - start : end - start] = values[begin - first : end - first]

    # ---- asking for the right thing

    def _check(self, queries, keys, temperature, bank_temperature, rule, weight):
        """One clear line on every rank for a wrong argument on any: otherwise the collectives would hang."""
        facts = {
            "number of views": len(queries),
            "batch size": len(queries[0]) if queries else 0,
            "rule": rule,
            "temperature": temperature,
            "bank temperature": bank_temperature,
            "weight": weight,
        }
        error = self._complaint(queries, keys, temperature, bank_temperature, rule)
        collectives.assert_equal_on_all_ranks(facts, "contrast", self.group, error)

    def _complaint(self, queries, keys, temperature, bank_temperature, rule):
        """What is wrong with this rank's arguments, in one line; or None."""
        if rule not in RULES:
            return _unknown(rule, RULES, "bank rule")
        if len(queries) < 2 or len(keys) != 2:
            return (
                f"contrast takes queries of 2 or more views and keys of 2, got {len(queries)} and {len(keys)}"
            )
        expected = (len(queries[0]), self.dim)
        for name, views in (("queries", queries), ("keys", keys)):
            for view, x in enumerate(views, start=1):
                if tuple(x.shape) != expected or not len(x):
                    return (
                        f"{name} of view {view} are {tuple(x.shape)}, expected (batch size, dim) {expected}"
                    )
                if x.device != self.rows.device:
                    return f"{name} of view {view} are on {x.device}, the bank is on {self.rows.device}"
        if any(key.requires_grad for key in keys):
            return "the keys carry a gradient: compute them under torch.no_grad(), only queries are trained"
        lowest = MIN_TEMPERATURE[self.rows.dtype]
        for name, t in (("temperature", temperature), ("bank temperature", bank_temperature)):
            if not lowest <= t < math.inf:
                return (
                    f"{name} {t}: use at least {lowest}, below it exp((s - 1) / T) leaves {self.rows.dtype}"
                )
        return None


def _load_kernels(device, dtype):
    """The module ``kernels``, or a UserError that says why it cannot serve this bank."""
    if dtype != torch.float32:
        raise UserError(f"bank kernel triton computes in float32, the bank is {dtype}: use the kernel torch")
    try:
        from caco_scale.method import kernels
    except ImportError:
        raise UserError("bank kernel triton needs the package triton: install it, or use torch") from None
    if torch.device(device).type != "cuda" and not kernels.INTERPRETED:
        raise UserError(
            f"bank kernel triton needs a CUDA device, the bank is on {device}: use the kernel torch"
        )
    return kernels


def _known(name, names, what):
    if name not in names:
        raise UserError(_unknown(name, names, what))
    return name


def _unknown(name, names, what):
    return f"unknown {what} {name!r}{did_you_mean(name, names)}: give one of {', '.join(names)}"
