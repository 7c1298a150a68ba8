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

Beside this file: ``contrast.py`` (its formulae), ``in_batch.py`` (rules whose negatives are the batch),
``bank_compute.py`` (how one's own rows compute), ``bank_exchange.py`` (what crosses ranks for the softmax),
``bank_rows.py`` (the first rows, and those of a queue), ``kernels.py`` (Triton).

Shapes: R ranks, B this rank's batch, N = R·B global batch, V views, K rows, S this rank's rows, D embedding.
Global tensors have the samples in rank order first and the views second: (N, V, D). A pair is a query view i
and a key view j ≠ i; what there is per pair is (N, V, 2), and a pair that does not exist has weight 0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from caco_scale.distributed import collectives
from caco_scale.errors import UserError
from caco_scale.flags import choices
from caco_scale.flags.choices import BankExchange, BankKernel, BankRule, KernelInputs
from caco_scale.method.bank_compute import build_compute
from caco_scale.method.bank_exchange import Logits, build_exchange
from caco_scale.method.bank_rows import enqueue_, initial_rows
from caco_scale.method.contrast import (
    MIN_TEMPERATURE,
    Contrast,
    GlobalLoss,
    complaint,
    pair_weights,
    softmax_at_positive,
    tangent_,
)
from caco_scale.method.in_batch import contrast_in_batch


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
        pointer: the row of the whole bank that a queue of keys overwrites next.
        assignments: (S,) int64, how often a row was a positive since :meth:`reset_assignments`.

    Raises:
        UserError: for an argument that makes no bank, or that differs between ranks (on every rank).
    """

    def __init__(
        self,
        size: int,
        dim: int,
        momentum: float = 0.9,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        exchange: BankExchange = "statistics",
        kernel: BankKernel = "torch",
        kernel_inputs: KernelInputs = "tf32",
    ):
        if size < 1 or dim < 1:
            raise UserError(f"a bank needs at least one row and one dimension, got size {size}, dim {dim}")
        if dtype not in MIN_TEMPERATURE:
            raise UserError(f"the bank's dtype is {dtype}: use torch.float32 or torch.float64")
        most_rows = collectives.shard_range(size, collectives.world_size(group), 0)[1]
        self._compute = build_compute(kernel, kernel_inputs, most_rows, device, dtype)
        self._exchange = build_exchange(exchange, self._compute, size, group)
        facts: dict[str, object] = {"size": size, "dim": dim, "momentum": momentum, "dtype": dtype}
        facts |= {"seed": seed, "exchange": exchange, "kernel": kernel, "kernel_inputs": kernel_inputs}
        collectives.assert_equal_on_all_ranks(facts, "bank", group)
        self.size, self.dim, self.momentum, self.group = size, dim, momentum, group
        self.num_ranks, self.rank = collectives.world_size(group), collectives.rank(group)
        self.rows_range = collectives.shard_range(size, self.num_ranks, self.rank)
        self.rows = initial_rows(*self.rows_range, dim, seed, dtype, device)
        self.velocity = torch.zeros_like(self.rows)
        self.pointer = 0
        self._agreed: dict[str, object] = {}  # what all ranks brought to the last contrast that asked
        self.assignments = torch.zeros(len(self.rows), dtype=torch.int64, device=device)

    # ---- the whole bank

    @torch.no_grad()
    def load_full(self, rows: Tensor, velocity: Tensor) -> None:
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

    def full(self) -> tuple[Tensor, Tensor]:
        """Copies of the whole bank's rows and velocity, (K, D) each, on every rank; collective."""
        rows = collectives.all_gather_shards(self.rows.clone(), self.size, self.group)
        return rows, collectives.all_gather_shards(self.velocity.clone(), self.size, self.group)

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the bank's state: rows, velocity, assignments (S, …), and a queue's pointer.

        The tensors themselves, not copies. Nothing crosses ranks: every rank saves its own part, which another
        number of ranks cannot load; :meth:`full` and :meth:`load_full` are for that.
        """
        return {name: getattr(self, name) for name in ("rows", "velocity", "assignments", "pointer")}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave on this rank, copied into the bank's own tensors. Nothing crosses ranks.

        Raises:
            UserError: for another shape, before anything changes.
        """
        tensors = {name: getattr(self, name) for name in ("rows", "velocity", "assignments")}
        for name, own in tensors.items():
            if state[name].shape != own.shape:
                raise UserError(
                    f"bank {name} of rank {self.rank} are {tuple(state[name].shape)} in the state and "
                    f"{tuple(own.shape)} in this bank: load it with as many ranks as wrote it, or use load_full"
                )
        for name, own in tensors.items():
            own.copy_(state[name])
        self.pointer = int(state["pointer"])

    def reset_velocity(self) -> None:
        """Velocity to zero, as at the switch from the bank's warm-up to CaCo."""
        self.velocity.zero_()

    def reset_assignments(self) -> None:
        """Start anew to count which rows are positives, as once per epoch."""
        self.assignments.zero_()

    # ---- one step

    def contrast(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        temperature: float = 0.08,
        bank_temperature: float = 0.08,
        rule: BankRule = "caco",
        weight: float = 1.0,
        agree_once: bool = False,
    ) -> Contrast:
        """Contrast queries with the bank: the loss for the encoder, and the gradient for the bank itself.

        Changes nothing in the bank; :meth:`step` does. Collective. Crosses ranks: the (B, V+2, D) embeddings, the
        positives, the softmax statistics and the queries' gradient, in four collectives (rule caco, float32; one more
        for each further block of queries), none in the backward; before, between hosts, a check that all mean the same.

        Args:
            queries: per view (B, D), unit norm, the two global views first; B the same on every rank.
            keys: of the two global views (B, D), unit norm, without gradient.
            temperature, bank_temperature: T of the encoder's loss, T_bank of the bank's gradient.
            rule: "caco": the positive is the row nearest to the other view's key. "adco": the positive is
                that key itself, K+1 logits with the key first; only negatives are learned. "moco" and "nearest":
                as adco and caco, but the rows are a queue of keys. "nnclr": that nearest row against the queries
                of the batch. "inbatch": the query against the keys of the batch, without the bank.
            weight: of this call in the step: 1 / micro-steps under gradient accumulation.
            agree_once: no check of what this rank brought last time too; for a loop in which it changes on all at once.

        After ``result.loss.backward()`` a rank's query gradient, in the queries' dtype, is R times its part
        of the global gradient: DDP, DeepSpeed and FSDP average over ranks. Embeddings or rows that are not
        finite make the loss not finite, on every rank alike.

        Raises:
            UserError: on every rank, for a wrong argument on any or shapes that differ between ranks.

        Source: arXiv:2203.14370 (CaCo), 2011.08435 (AdCo), 1911.05722 (MoCo), 2104.14548 (NNCLR).
        """
        self._check(queries, keys, temperature, bank_temperature, rule, weight, agree_once)
        with torch.no_grad(), torch.autocast(self.rows.device.type, enabled=False):
            own = torch.stack([x.to(self.rows.dtype) for x in (*queries, *keys)], dim=1)
            block = collectives.all_gather_rows(own, self.group)
            query, key = block[:, :-2].contiguous(), block[:, -2:].contiguous()
            if rule in choices.BATCH_RULES:
                loss, dq, found = self._contrast_in_batch(query, key, temperature, rule, weight)
            else:
                loss, dq, found = self._contrast(query, key, temperature, bank_temperature, rule, weight)
        return Contrast(loss=GlobalLoss.apply(loss, dq, *queries), rule=rule, **found)

    def _contrast(self, query, key, temperature, bank_temperature, rule, weight):
        """Loss (), dq (B, V, D) and the other fields of :class:`Contrast`, from the global batch."""
        num_samples, num_views, _ = query.shape
        pairs = pair_weights(num_views, query.dtype, query.device)
        learns = rule in choices.LEARNING_RULES
        two = learns and bank_temperature != temperature
        temperatures = [temperature, bank_temperature] if two else [temperature]

        is_key = rule not in choices.NEAREST_RULES  # the positive: the key itself, or the row nearest to it
        positives = None if is_key else self._exchange.nearest(self.rows, key.flatten(0, 1)).view(-1, 2)
        s = torch.einsum("nvd,njd->nvj", query, key if positives is None else self._unit(positives))
        totals = self._exchange.totals(self.rows, query, positives, temperatures)
        log_p = query.new_empty(len(temperatures), num_samples, num_views, 2)  # at the positive
        attraction = torch.empty_like(query)  # Σ_pairs weight p U
        pull = torch.zeros_like(self.rows) if learns else None  # Σ_pairs weight pᵀ q
        for block in self._compute.blocks(self.rows, query, temperatures):
            samples = block.samples
            # All that depends on other ranks' rows: Z, and how similar the positive is.
            own = block.sums if is_key else torch.cat([block.sums, s[samples]], dim=2)
            statistics = totals(samples, own)
            if not is_key:
                s[samples] = statistics[:, :, -2:]
            log_p[:, samples], factors = softmax_at_positive(
                statistics, s[samples], pairs, temperatures, is_key
            )
            attraction[samples] = block.attracted * factors[0]
            if pull is not None:
                block.pull_(pull, query[samples] * factors[-1])

        loss = -weight * (pairs * log_p[0]).sum() / num_samples
        loss = loss + 0 * key.sum()  # a key that is not finite chose a meaningless positive: say so
        dq = self._query_gradient(attraction, key, positives, pairs, log_p[0].exp())
        dq *= self.num_ranks * weight / (temperature * num_samples)
        if pull is not None:
            if positives is not None:
                self._pull_positives(pull, positives, query, pairs, log_p[-1].exp())
            tangent_(pull, self.rows).mul_(-weight / (temperatures[-1] * num_samples))

        return loss, dq, self._found(rule, key, positives, pairs, log_p[0], pull)

    def _contrast_in_batch(self, query, key, temperature, rule, weight):
        """As :meth:`_contrast`, of the rules whose negatives are the batch."""
        num_samples, num_views, _ = query.shape
        pairs = pair_weights(num_views, query.dtype, query.device)
        nearest, positives, other = rule in choices.NEAREST_RULES, None, key
        if nearest:
            positives = self._exchange.nearest(self.rows, key.flatten(0, 1)).view(-1, 2)
            other = collectives.all_reduce_(self._unit(positives), group=self.group)
        own = self._own_samples(num_samples)
        log_p, dq = contrast_in_batch(query, other, own, pairs, temperature, nearest, self.group)
        loss = -weight * (pairs * log_p).sum() / num_samples + 0 * key.sum()
        dq *= self.num_ranks * weight / (temperature * num_samples)
        return loss, dq, self._found(rule, key, positives, pairs, log_p, None)

    def _found(self, rule, key, positives, pairs, log_p, bank_gradient):
        """The fields of a :class:`Contrast` beside its loss."""
        own, exists = self._own_samples(len(key)), pairs > 0
        return {
            "positives": None if positives is None else [y.clone() for y in positives[own].unbind(1)],
            "positive_probability": (exists * log_p.exp()).sum() / (exists.sum() * len(key)),
            "bank_gradient": bank_gradient,
            "global_positives": positives,
            "global_keys": key if rule in choices.QUEUE_RULES else None,
        }

    @torch.no_grad()
    def step(self, result: Contrast | Sequence[Contrast], lr: float) -> None:
        """The bank's step, after the encoder's: v ← m v + g, W ← W − lr v; a queue takes the step's keys instead.

        Args:
            result: what :meth:`contrast` returned; under gradient accumulation the list, for one step of all.
            lr: the bank's learning rate (a queue has none and ignores it).

        Nothing crosses ranks. A step that is to be skipped is simply not called.

        Raises:
            UserError: for results of several rules.
        """
        results = [result] if isinstance(result, Contrast) else list(result)
        rules = {r.rule for r in results}
        if len(rules) != 1:
            raise UserError(f"one bank step takes results of one rule, got {sorted(rules)}")
        for r in results:
            if r.global_positives is not None and len(self.rows):
                row, owned = self._own_rows(r.global_positives)
                self.assignments.index_add_(0, row.flatten(), owned.flatten().long())
        if keys := [r.global_keys for r in results if r.global_keys is not None]:
            self.pointer = enqueue_(self.rows, self.rows_range, self.size, self.pointer, keys, self.num_ranks)
        if gradients := [r.bank_gradient for r in results if r.bank_gradient is not None]:
            self.velocity.mul_(self.momentum)
            for gradient in gradients:
                self.velocity.add_(gradient)
            self.rows.sub_(self.velocity, alpha=lr)

    # ---- looking at it

    @torch.no_grad()
    def similarities(self, query: Tensor) -> Tensor:
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
            return Logits(self.size, self.group).similarities(self.rows, query)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
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

    # ---- the parts of a contrast

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

    def _own_samples(self, num_samples):
        """This rank's of the global batch."""
        return slice(*collectives.shard_range(num_samples, self.num_ranks, self.rank))

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

    # ---- asking for the right thing

    def _check(self, queries, keys, temperature, bank_temperature, rule, weight, agree_once=False):
        """One clear line on every rank for a wrong argument on any: otherwise the collectives would hang."""
        count, size = len(queries), len(queries[0]) if queries else 0
        facts = {"number of views": count, "batch size": size, "rule": rule, "weight": weight}
        facts |= {"temperature": temperature, "bank temperature": bank_temperature}
        error = complaint(queries, keys, self.rows, temperature, bank_temperature, rule)
        before = self._agreed if agree_once else None
        collectives.assert_still_equal(facts, before, "contrast", self.group, error)
        self._agreed = facts
