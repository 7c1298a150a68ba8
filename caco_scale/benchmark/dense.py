"""The peers of the benchmarks, as one writes them first: whole matrices, one parameter after the other.

The formulae of arXiv:2203.14370 on N×K logits, a bank that every rank holds whole. Shapes: B this rank's batch, K rows,
D embedding, V views, the two global ones first.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def pair_list(num_views: int) -> list[tuple[int, int, float]]:
    """(query view, key view, weight) of every pair: two views are summed, more are averaged group by group."""
    pairs = [(i, j) for i in range(num_views) for j in (0, 1) if i != j]
    if num_views == 2:
        return [(i, j, 1.0) for i, j in pairs]
    return [(i, j, 1 / 2 if i < 2 else 1 / (2 * (num_views - 2))) for i, j in pairs]


class DenseBank:
    """The bank replicated; its gradient is averaged over the ranks by an all-reduce of all K rows.

    ``by_autograd``: the bank's gradient is that of its objective by autograd. Otherwise it is written out, from the
    similarities that are there anyway, as the paper's authors do: one product fewer.
    """

    def __init__(
        self,
        rows: Tensor,
        temperature: float = 0.08,
        bank_temperature: float = 0.08,
        momentum: float = 0.9,
        by_autograd: bool = True,
    ):
        self.rows = rows.clone().requires_grad_(by_autograd)
        self.velocity = torch.zeros_like(rows)
        self.temperature, self.bank_temperature = temperature, bank_temperature
        self.momentum, self.by_autograd = momentum, by_autograd

    def step(
        self, queries: list[Tensor], keys: list[Tensor], lr: float
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """One step of queries, V (B, D) with gradient, and two keys -> (loss, positives, bank gradient)."""
        loss, positives, gradient = self.contrast(queries, keys)
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        with torch.no_grad():
            self.velocity.mul_(self.momentum).add_(gradient)
            self.rows -= lr * self.velocity
        return loss, positives, gradient

    def contrast(self, queries: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """As :meth:`step`, of this rank's batch; the queries have their gradients, the bank is as it was."""
        unit = F.normalize(self.rows)
        loss, objective = self.velocity.new_zeros(()), self.velocity.new_zeros(())
        positives, gradient = [], torch.zeros_like(self.velocity)
        for i, j, share in pair_list(len(queries)):
            with torch.no_grad():
                positive = (keys[j] @ unit.T).argmax(1)
            similarity = queries[i] @ unit.detach().T
            loss = loss + share * F.cross_entropy(similarity / self.temperature, positive)
            with torch.no_grad():
                weight = torch.softmax(similarity / self.bank_temperature, 1)
                weight[torch.arange(len(positive), device=positive.device), positive] -= 1
                weight.abs_()
            if self.by_autograd:
                pulled = (weight * (queries[i].detach() @ unit.T)).sum()
                objective = objective - share * pulled / (len(positive) * self.bank_temperature)
            else:
                gradient += share * self._written_out(queries[i].detach(), similarity.detach(), weight)
            positives.append(positive)
        loss.backward()
        if self.by_autograd:
            (gradient,) = torch.autograd.grad(objective, self.rows)
        return loss.detach(), positives, gradient

    def _written_out(self, query: Tensor, similarity: Tensor, weight: Tensor) -> Tensor:
        norm = self.rows.norm(dim=1, keepdim=True)
        mean = (weight * similarity).mean(0)[:, None]
        return -(weight.T @ query / len(query) - mean * self.rows / norm) / (self.bank_temperature * norm)


class CompiledBank(DenseBank):
    """As :class:`DenseBank` by torch.compile, every gradient written out: autograd would make the softmax twice."""

    def __init__(self, rows: Tensor, temperature: float = 0.08, bank_temperature: float = 0.08):
        super().__init__(rows, temperature, bank_temperature, by_autograd=False)
        self._compiled = torch.compile(_written_for_a_compiler, dynamic=False)

    @torch.no_grad()
    def contrast(self, queries: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        values = [query.detach() for query in queries]
        temperatures = (self.temperature, self.bank_temperature)
        loss, positives, gradient, dq = self._compiled(self.rows, values, keys, *temperatures)
        for query, d in zip(queries, dq, strict=True):
            query.grad = d if query.grad is None else query.grad + d
        return loss, positives, gradient


def _written_for_a_compiler(rows, queries, keys, temperature, bank_temperature):
    """(loss, positives, bank gradient, V query gradients) in the fewest passes over N×K by torch's operations.

    The positive's share goes where it belongs row by row: no one-hot matrix, and p itself is in both products.
    """
    norm = rows.norm(dim=1, keepdim=True)
    unit, scale = rows / norm, len(queries[0])
    loss, pull, positives, dq = rows.new_zeros(()), torch.zeros_like(rows), [], [0] * len(queries)
    for i, j, share in pair_list(len(queries)):
        query = queries[i]
        positive = (keys[j] @ unit.T).argmax(1)
        similarity = query @ unit.T
        p, log_p = _softmax_at(similarity / temperature, positive)
        loss = loss - share * log_p.mean()
        dq[i] = dq[i] + share / (temperature * scale) * (p @ unit - unit[positive])
        if bank_temperature != temperature:
            p, log_p = _softmax_at(similarity / bank_temperature, positive)
        missing = (1 - 2 * log_p.exp())[:, None] * query  # the positive's weight is 1 − p
        pull = pull + share * (p.T @ query).index_add(0, positive, missing)
        positives.append(positive)
    tangent = pull - (pull * unit).sum(1, keepdim=True) * unit
    return loss, positives, -tangent / (scale * bank_temperature * norm), dq


def _softmax_at(logits, positive):
    log_z = logits.logsumexp(1)
    log_p = logits.gather(1, positive[:, None])[:, 0] - log_z
    return (logits - log_z[:, None]).exp(), log_p


class PlainOptimizer:
    """LARS, SGD or AdamW, one parameter after the other; one-dimensional ones without decay and factor."""

    def __init__(self, name: str, module: nn.Module, lr: float, weight_decay: float):
        self.parameters, self.lr, self.weight_decay = list(module.parameters()), lr, weight_decay
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.torch_optimizer: torch.optim.Optimizer | None = None
        if name != "lars":
            groups = [
                {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": weight_decay},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ]
            if name == "sgd":
                self.torch_optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, foreach=False)
            else:
                self.torch_optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), foreach=False)

    @torch.no_grad()
    def step(self) -> None:
        """One update; the gradients are gone afterwards."""
        if self.torch_optimizer:
            self.torch_optimizer.step()
        else:
            for p, momentum in zip(self.parameters, self.momenta, strict=True):
                update = p.grad
                assert update is not None
                if p.ndim > 1:
                    update = update + self.weight_decay * p
                    p_norm, u_norm = p.norm(), update.norm()
                    factor = torch.where((p_norm > 0) & (u_norm > 0), 0.001 * p_norm / u_norm, 1.0)
                    update = update * factor
                momentum.mul_(0.9).add_(update)
                p -= self.lr * momentum
        for p in self.parameters:
            p.grad = None
