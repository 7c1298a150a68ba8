"""The peers of the bank's benchmark: every rank holds the whole bank, and every pair its N×K logits.

What one writes down first: the formulae of arXiv:2203.14370 on whole matrices. Shapes: B this rank's batch, K rows,
D embedding; two views, the sum of both pairs.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

PAIRS = ((0, 1), (1, 0))


class DenseBank:
    """The bank replicated; its gradient is averaged over the ranks by an all-reduce of all K rows.

    ``by_autograd``: the bank's gradient is that of its objective by autograd. Otherwise it is written out, from the
    softmax that is there anyway, as the paper's authors do: one product and one softmax fewer.
    """

    def __init__(self, rows, temperature=0.08, momentum=0.9, by_autograd=True):
        self.rows = rows.clone().requires_grad_(by_autograd)
        self.velocity = torch.zeros_like(rows)
        self.temperature, self.momentum, self.by_autograd = temperature, momentum, by_autograd

    def step(self, queries, keys, lr):
        """One step of queries, two (B, D) with gradient, and keys -> (loss, positives, bank gradient)."""
        unit = F.normalize(self.rows)
        loss = objective = 0
        positives, gradient = [], torch.zeros_like(self.velocity)
        for i, j in PAIRS:
            with torch.no_grad():
                positive = (keys[j] @ unit.T).argmax(1)
            similarity = queries[i] @ unit.detach().T
            loss = loss + F.cross_entropy(similarity / self.temperature, positive)
            with torch.no_grad():
                weight = torch.softmax(similarity / self.temperature, 1)
                weight[torch.arange(len(positive)), positive] -= 1
                weight.abs_()
            if self.by_autograd:
                pulled = (weight * (queries[i].detach() @ unit.T)).sum()
                objective = objective - pulled / (len(positive) * self.temperature)
            else:
                gradient += self._written_out(queries[i].detach(), similarity.detach(), weight)
            positives.append(positive)
        loss.backward()
        if self.by_autograd:
            (gradient,) = torch.autograd.grad(objective, self.rows)
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        with torch.no_grad():
            self.velocity.mul_(self.momentum).add_(gradient)
            self.rows -= lr * self.velocity
        return loss.detach(), positives, gradient

    def _written_out(self, query, similarity, weight):
        norm = self.rows.norm(dim=1, keepdim=True)
        mean = (weight * similarity).mean(0)[:, None]
        return -(weight.T @ query / len(query) - mean * self.rows / norm) / (self.temperature * norm)
