"""Native optimizers that follow an average of gradients: sgd, lion, muon. See `adaptive` for those that rescale it.

In the formulas g is the gradient, negated where `maximize`, p the parameter, t the number of its updates, this one
counted. Arguments that are numbers are leaves of the state (`set_hyperparameters`); `lr` and `weight_decay` may be a
`Schedule` of the updates done. The others shape the state or the code, and stay as they are given.

Example:
    >>> optimizer = sgd(0.1, momentum=0.9)
    >>> params = {"w": torch.tensor([1.0, -2.0])}
    >>> optimizer.update({"w": torch.tensor([1.0, 1.0])}, optimizer.init(params), params)[0]
    {'w': tensor([ 0.9000, -2.1000])}
"""

from typing import Any, Literal

import torch
from torch import Tensor

from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.optim.base import Optimizer
from tnt_func.optim.layout import Layout, paths
from tnt_func.optim.leafwise import (
    Numbers,
    Rule,
    check_betas,
    check_not_negative,
    decayed,
    decayed_all,
    kernels,
    leafwise,
)
from tnt_func.optim.state import Hyperparameter, Number, Settings
from tnt_func.pytree import describe


@factory
def sgd(
    lr: Hyperparameter,
    *,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Gradient descent, with momentum.

        g <- g + weight_decay p;  b <- momentum b + (1 - dampening) g, at first g;  p <- p - lr b

    With `nesterov`, p <- p - lr (g + momentum b).

    Args:
        lr: step size.
        momentum: the part of the buffer b that is kept; with 0, there is none, nor such a hyper-parameter.
        dampening: the part of a gradient that does not go into the buffer, the first aside.
        weight_decay: L2 penalty.
        nesterov: whether to look ahead.
        maximize: whether to climb.

    Raises:
        UsageError: a number is negative, or `nesterov` has no momentum or is dampened.

    Example:
        >>> optimizer, w = sgd(0.1), torch.tensor(1.0)
        >>> optimizer.update(torch.tensor(2.0), optimizer.init(w), w)[0]
        tensor(0.8000)

    References:
        torch.optim.SGD.
    """
    check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and (momentum == 0 or dampening != 0):
        raise UsageError(
            f"sgd was given nesterov=True with momentum={momentum}, dampening={dampening}; it needs a momentum, and no "
            "dampening. Write sgd(lr, momentum=0.9, nesterov=True)."
        )

    def numbers(h: Numbers, t: Any) -> Numbers:
        return {**h, "keep": 1 - h["dampening"] * (t > 1)} if momentum else dict(h)

    def leaf(n: Numbers, p: Tensor, g: Tensor, *buffer: Tensor) -> tuple[Tensor, ...]:
        g = decayed(-g if maximize else g, p, n)
        if not momentum:
            return (p - n["lr"] * g,)
        b = n["momentum"] * buffer[0] + n["keep"] * g
        return p - n["lr"] * (g + n["momentum"] * b if nesterov else b), b

    def leaves(n: Numbers, p: Any, g: Any, *buffer: Any) -> None:
        g = decayed_all(kernels._foreach_neg(g) if maximize else g, p, n)
        if momentum:
            kernels._foreach_mul_(buffer[0], n["momentum"])
            kernels._foreach_add_(buffer[0], g, alpha=n["keep"])
            g = kernels._foreach_add(g, buffer[0], alpha=n["momentum"]) if nesterov else buffer[0]
        kernels._foreach_add_(p, g, alpha=-n["lr"])

    inertia = {"momentum": momentum, "dampening": dampening} if momentum else {}
    return leafwise(
        Settings(lr=lr, weight_decay=weight_decay, **inertia),
        Rule(
            slots={"momentum_buffer": torch.zeros_like} if momentum else {},
            numbers=numbers,
            leaf=leaf,
            leaves=leaves,
            elementwise=True,
        ),
    )


@factory
def lion(
    lr: Hyperparameter = 1e-4,
    *,
    betas: tuple[Number, Number] = (0.9, 0.99),
    weight_decay: Hyperparameter = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Lion: every element moves by lr, in the direction of an average of gradients.

        p <- (1 - lr weight_decay) p - lr sign(beta1 m + (1 - beta1) g);  m <- beta2 m + (1 - beta2) g

    Args:
        lr: step size; a third to a tenth of Adam's.
        betas: how much of m goes into the direction, and how much is kept.
        weight_decay: the part of a parameter that lr = 1 would take away in an update; three to ten times AdamW's.
        maximize: whether to climb.

    Raises:
        UsageError: a number is negative, or a beta not below 1.

    Example:
        >>> optimizer, w = lion(0.1), torch.tensor(1.0)
        >>> optimizer.update(torch.tensor(50.0), optimizer.init(w), w)[0]
        tensor(0.9000)

    References:
        Chen et al. 2023, https://arxiv.org/abs/2302.06675.
    """
    check_not_negative(lr=lr, weight_decay=weight_decay)
    check_betas(betas)

    def numbers(h: Numbers, t: Any) -> Numbers:
        beta1, beta2 = h["betas"]
        return {"lr": h["lr"], "beta1": beta1, "beta2": beta2, "shrink": 1 - h["lr"] * h["weight_decay"]}

    def leaf(n: Numbers, p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        g = -g if maximize else g
        direction = torch.lerp(m, g, 1 - n["beta1"]).sign()
        return n["shrink"] * p - n["lr"] * direction, torch.lerp(m, g, 1 - n["beta2"])

    def leaves(n: Numbers, p: Any, g: Any, m: Any) -> None:
        g = kernels._foreach_neg(g) if maximize else g
        direction = kernels._foreach_lerp(m, g, 1 - n["beta1"])
        kernels._foreach_sign_(direction)
        kernels._foreach_mul_(p, n["shrink"])
        kernels._foreach_add_(p, direction, alpha=-n["lr"])
        kernels._foreach_lerp_(m, g, 1 - n["beta2"])

    return leafwise(
        Settings(lr=lr, betas=betas, weight_decay=weight_decay),
        Rule(slots={"exp_avg": torch.zeros_like}, numbers=numbers, leaf=leaf, leaves=leaves, elementwise=True),
    )


@factory
def muon(
    lr: Hyperparameter = 1e-3,
    *,
    momentum: Number = 0.95,
    weight_decay: Hyperparameter = 0.1,
    nesterov: bool = True,
    ns_coefficients: tuple[Number, Number, Number] = (3.4445, -4.7750, 2.0315),
    ns_steps: int = 5,
    ns_dtype: torch.dtype = torch.bfloat16,
    eps: Number = 1e-7,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
) -> Optimizer:
    """Muon: momentum, made orthogonal; for the matrices inside a network.

        b <- momentum b + (1 - momentum) g;  p <- (1 - lr weight_decay) p - lr ratio orthogonal(b)

    With `nesterov`, of momentum b + (1 - momentum) g. The ratio is sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows,
    columns)) to match the size of AdamW's steps. Newton and Schulz make all singular values about 1 by steps
    x <- a x + (b x x^T + c (x x^T)^2) x.

    Args:
        lr: step size.
        momentum: the part of the buffer b that is kept.
        weight_decay: the part of a parameter that lr = 1 would take away in an update.
        nesterov: whether to look ahead.
        ns_coefficients: a, b, c.
        ns_steps: how many steps of Newton and Schulz.
        ns_dtype: in which dtype they are made.
        eps: the least norm of the buffer, for stability.
        adjust_lr_fn: the ratio.

    Raises:
        UsageError: a number is negative, or, at `init`, a parameter is no real matrix.

    Example:
        >>> from tnt_func.optim import adamw, grouped
        >>> optimizer = grouped(adamw(3e-4), [(lambda name: "hidden" in name, muon(0.02))])
        >>> params = {"hidden": torch.zeros(2, 2), "bias": torch.zeros(2)}
        >>> grads = {"hidden": torch.eye(2), "bias": torch.ones(2)}
        >>> optimizer.update(grads, optimizer.init(params), params)[0]["bias"]
        tensor([-0.0003, -0.0003])

    References:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, https://arxiv.org/abs/2502.16982;
        torch.optim.Muon.
    """
    check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps)

    def numbers(h: Numbers, t: Any) -> Numbers:
        return {**h, "shrink": 1 - h["lr"] * h["weight_decay"]}

    def check(here: Layout) -> None:
        if any(leaf is not None and (leaf.dim() != 2 or leaf.is_complex()) for leaf in here.leaves):
            bad = [
                f"params{path} is {describe(leaf)}"
                for path, leaf in zip(paths(here), here.leaves, strict=True)
                if leaf is not None and (leaf.dim() != 2 or leaf.is_complex())
            ]
            raise UsageError(
                "\n".join(bad)
                + "\nmuon updates real matrices. Write grouped(adamw(...), [(lambda name: ..., muon(...))]) "
                "with a predicate that holds for those alone."
            )

    def leaf(n: Numbers, p: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        b = torch.lerp(b, g, 1 - n["momentum"])
        step = orthogonal(torch.lerp(g, b, n["momentum"]) if nesterov else b, n["eps"])
        rows, columns = p.shape
        ratio = max(1, rows / columns) ** 0.5 if adjust_lr_fn == "original" else 0.2 * max(rows, columns) ** 0.5
        return n["shrink"] * p - n["lr"] * ratio * step.to(p.dtype), b

    def orthogonal(b: Tensor, eps: Any) -> Tensor:
        first, second, third = ns_coefficients
        wide = b.shape[0] <= b.shape[1]
        x = (b if wide else b.T).to(ns_dtype)
        x = x / x.norm().clamp(min=eps)
        for _ in range(ns_steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
        return x if wide else x.T

    return leafwise(
        Settings(lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps),
        Rule(slots={"momentum_buffer": torch.zeros_like}, numbers=numbers, leaf=leaf, check=check),
    )
