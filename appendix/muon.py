"""Muon: a momentum step that is equally large in all directions of a matrix (Jordan et al. 2024).

The momentum U S V' of a matrix (its singular value decomposition) is replaced by U V', nearly: a
Newton-Schulz iteration brings all singular values close to 1. torch.optim.Muon with
adjust_lr_fn="match_rms_adamw" does the same, one matrix at a time and in bf16, which CPUs without
bf16 units emulate: there a step of it takes longer than the forward and the backward pass. Here it
is fp32, for all matrices of a shape at once.
"""
import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)     # of the quintic polynomial, as in torch.optim.Muon
ITERATIONS = 5


class Muon:
    """params: matrices. The momentum is Nesterov's.

    U V' has a root mean square of 1 / sqrt(max(rows, columns)), AdamW's updates have about 0.2. The
    update is scaled to the latter, so that one learning rate suits both (Liu et al. 2025).
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        self.params = list(params)
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.by_shape = {}                  # shape: the numbers of the parameters that have it
        for i, p in enumerate(self.params):
            self.by_shape.setdefault(p.shape, []).append(i)

    @torch.no_grad()
    def step(self):
        """One update from the gradients, which are cleared."""
        for (rows, columns), numbers in self.by_shape.items():
            directions = []
            for i in numbers:
                self.buffers[i].lerp_(self.params[i].grad, 1 - self.momentum)
                directions.append(self.params[i].grad.lerp(self.buffers[i], self.momentum))
            updates = orthogonal(torch.stack(directions))                   # (n, rows, columns)
            size = 0.2 * max(rows, columns) ** 0.5
            for i, update in zip(numbers, updates):
                p = self.params[i]
                p.mul_(1 - self.lr * self.weight_decay)
                p.sub_(update, alpha=self.lr * size)
                p.grad = None


def orthogonal(m):
    """(n, rows, columns) -> for each matrix U S V' about U V'.

    One pass of the loop makes a s + b s^3 + c s^5 of each singular value s, and keeps U and V. All
    are below 1 at the beginning, and between 0.7 and 1.2 at the end.
    """
    is_tall = m.shape[1] > m.shape[2]
    x = m.mT if is_tall else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
