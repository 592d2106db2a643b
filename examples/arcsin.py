"""torch cannot see into numpy's arcsin, yet it differentiates it twice: all it needs is the inverse, torch.sin."""

import numpy as np
import torch

from backsolve import inverse

arcsin = inverse(torch.sin, np.arcsin)

x = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64, requires_grad=True)
(first,) = torch.autograd.grad(arcsin(x).sum(), x, create_graph=True)
(second,) = torch.autograd.grad(first.sum(), x)

print("     x      gradient  1/sqrt(1-x^2)  second derivative  x/(1-x^2)^(3/2)")
for row in torch.stack([x, first, (1 - x**2) ** -0.5, second, x * (1 - x**2) ** -1.5], dim=1).tolist():
    print("{:6.2f}  {:12.9f}   {:12.9f}       {:12.9f}     {:12.9f}".format(*row))
