"""Muon: a momentum step whose directions all have the same length (Jordan et al. 2024).

The momentum of a matrix is replaced by the nearest orthogonal matrix, found by a Newton-Schulz
iteration. torch.optim.Muon does the same one matrix at a time in bf16, which CPUs without bf16
units emulate: there a step of it takes longer than the forward and the backward pass. Here it is
fp32, for all matrices of a shape at once.
"""
import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)     # of the quintic polynomial, as in torch.optim.Muon
ITERATIONS = 5


class Muon:
    """params: matrices. The update is scaled so that its root mean square is that of AdamW's."""

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
    """(n, rows, columns) -> for each matrix about the nearest one with singular values near 1."""
    is_tall = m.shape[1] > m.shape[2]
    x = m.mT if is_tall else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
