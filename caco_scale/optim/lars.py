"""LARS: layer-wise adaptive rate scaling for large batches (You et al., arXiv:1708.03888).

Legend: L tensors in a group; p parameter, g gradient, u update, mu momentum buffer.
"""

import torch


def squared_norms(params, updates):
    """Squared norms of L parameters and of their updates: (2, L) float64, on their device.

    The one place where norms are taken. Sums of squares add over the pieces of a partitioned tensor, so a
    strategy that partitions needs one sum of this small tensor over its ranks, and nothing else, to be exact.
    """
    # float64: torch's float32 norm on CPU is off by 3e-4 for 10 million elements, and a norm is cheap.
    norms = torch._foreach_norm([*params, *updates], 2, dtype=torch.float64)
    return torch.stack(norms).square().view(2, len(params))


def trust_ratios(squared, trust_coefficient):
    """trust_coefficient * |p| / |u| per tensor, (2, L) -> (L,); 1 where either norm is 0."""
    parameter_norm, update_norm = squared.sqrt()
    ratios = trust_coefficient * parameter_norm / update_norm
    return torch.where((parameter_norm > 0) & (update_norm > 0), ratios, 1.0)


def momentum_update(params, updates, buffers, *, lr, momentum):
    """mu <- momentum * mu + u; p <- p - lr * mu. In place."""
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, updates)
    torch._foreach_add_(params, buffers, alpha=-lr)


def lars_update(params, gradients, buffers, *, lr, weight_decay, momentum, trust_coefficient):
    """u = g + weight_decay * p, scaled to trust_coefficient * |p|; the momentum update. g is kept."""
    updates = torch._foreach_add(gradients, params, alpha=weight_decay)
    ratios = trust_ratios(squared_norms(params, updates), trust_coefficient)
    torch._foreach_mul_(updates, list(ratios.unbind()))
    momentum_update(params, updates, buffers, lr=lr, momentum=momentum)


class LARS(torch.optim.Optimizer):
    """LARS on tensors of two or more dimensions, momentum SGD without weight decay on the others.

        u = g + weight_decay * p;  u <- u * trust_coefficient * |p| / |u|  (factor 1 if either norm is 0)
        mu <- momentum * mu + u;   p <- p - lr * mu

    Biases, BatchNorm and other parameters of one dimension or less take neither the decay nor the factor. No
    eps, no clipping. A group's ``scaled`` (True or False) decides for all its tensors where their own
    dimensions cannot tell, because an engine flattened them. ``lr`` is read from ``param_groups`` at every
    step. All on the device: no synchronisation with the host. State per parameter: ``momentum_buffer``.
    """

    def __init__(self, params, lr, weight_decay=1.5e-6, momentum=0.9, trust_coefficient=0.001):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "scaled": None,
        }
        super().__init__(params, defaults)

    def init_state(self):
        """Zero momentum where there is none yet, so that a checkpoint can be loaded before the first step."""
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the parameters' ``.grad``; those without a gradient stay, momentum included."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.init_state()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._step_group(group, [p for p in params if _is_scaled(group, p)], scaled=True)
            self._step_group(group, [p for p in params if not _is_scaled(group, p)], scaled=False)
        return loss

    def _step_group(self, group, params, scaled):
        if not params:
            return
        gradients = [p.grad for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        rates = {"lr": group["lr"], "momentum": group["momentum"]}
        if not scaled:
            momentum_update(params, gradients, buffers, **rates)
            return
        lars_update(
            params,
            gradients,
            buffers,
            weight_decay=group["weight_decay"],
            trust_coefficient=group["trust_coefficient"],
            **rates,
        )


def _is_scaled(group, p):
    return p.ndim > 1 if group["scaled"] is None else group["scaled"]
