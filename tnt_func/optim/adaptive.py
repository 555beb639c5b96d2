"""Native optimizers that divide the gradient by a running size of it: adam, adamw, rmsprop, adagrad.

In the formulas g is the gradient, negated where `maximize`, p the parameter, t the number of its updates, this one
counted. Arguments that are numbers are leaves of the state (`set_hyperparameters`); `lr` and `weight_decay` may be a
`Schedule` of the updates done. The others shape the state or the code, and stay as they are given.

Example:
    >>> optimizer = adamw(0.1)
    >>> params = {"w": torch.tensor([1.0, -2.0])}
    >>> optimizer.update({"w": torch.tensor([0.5, 0.5])}, optimizer.init(params), params)[0]
    {'w': tensor([ 0.8990, -2.0980])}
"""

from typing import Any

import torch
from torch import Tensor

from tnt_func.factories import factory
from tnt_func.optim.base import Optimizer
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


@factory
def adam(
    lr: Hyperparameter = 1e-3,
    *,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Adam: steps of about lr, whatever the scale of the gradient.

        g <- g + weight_decay p;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        p <- p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        lr: step size.
        betas: how much of the averages m and v is kept in an update.
        eps: added to the root, for stability.
        weight_decay: L2 penalty, part of the gradient.
        amsgrad: whether the largest v so far is used.
        maximize: whether to climb.

    Raises:
        UsageError: a number is negative, or a beta not below 1.

    Example:
        >>> optimizer, w = adam(0.1), torch.tensor(1.0)
        >>> optimizer.update(torch.tensor(50.0), optimizer.init(w), w)[0]
        tensor(0.9000)

    References:
        Kingma and Ba 2015, https://arxiv.org/abs/1412.6980; torch.optim.Adam.
    """
    return _adam(lr, betas, eps, weight_decay, amsgrad, maximize, decoupled=False)


@factory
def adamw(
    lr: Hyperparameter = 1e-3,
    *,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Adam whose weight decay does not go through the averages.

        p <- (1 - lr weight_decay) p, and then as `adam` without weight decay

    Args:
        lr: step size.
        betas: how much of the averages of g and g^2 is kept in an update.
        eps: added to the root, for stability.
        weight_decay: the part of a parameter that lr = 1 would take away in an update.
        amsgrad: whether the largest average of g^2 so far is used.
        maximize: whether to climb.

    Raises:
        UsageError: a number is negative, or a beta not below 1.

    Example:
        >>> optimizer, w = adamw(0.1, weight_decay=0.5), torch.tensor(1.0)
        >>> optimizer.update(torch.tensor(50.0), optimizer.init(w), w)[0]
        tensor(0.8500)

    References:
        Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; torch.optim.AdamW.
    """
    return _adam(lr, betas, eps, weight_decay, amsgrad, maximize, decoupled=True)


def _adam(
    lr: Hyperparameter,
    betas: tuple[Number, Number],
    eps: Number,
    weight_decay: Hyperparameter,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
) -> Optimizer:
    check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
    check_betas(betas)

    def numbers(h: Numbers, t: Any) -> Numbers:
        beta1, beta2 = h["betas"]
        return {
            **h,
            "t": t,
            "beta1": beta1,
            "beta2": beta2,
            "size": h["lr"] / (1 - beta1**t),
            "root": (1 - beta2**t) ** 0.5,
            "shrink": 1 - h["lr"] * h["weight_decay"],
        }

    def leaf(n: Numbers, p: Tensor, g: Tensor, m: Tensor, v: Tensor, *top: Tensor) -> tuple[Tensor, ...]:
        g = -g if maximize else g
        p, g = (n["shrink"] * p, g) if decoupled else (p, decayed(g, p, n))
        m = torch.lerp(m, g, 1 - n["beta1"])
        v = n["beta2"] * v + (1 - n["beta2"]) * g * g
        top = tuple(torch.maximum(old, v) for old in top)
        return p - n["size"] * m / ((top[0] if top else v).sqrt() / n["root"] + n["eps"]), m, v, *top

    def leaves(n: Numbers, p: Any, g: Any, m: Any, v: Any, *top: Any) -> None:
        t = torch.scalar_tensor(n["t"], dtype=torch.float32, device=p[0].device)
        update = kernels._fused_adamw_ if decoupled else kernels._fused_adam_
        update(
            p,
            g,
            m,
            v,
            *(top or [[]]),
            [t] * len(p),
            lr=n["lr"],
            beta1=n["beta1"],
            beta2=n["beta2"],
            weight_decay=n["weight_decay"],
            eps=n["eps"],
            amsgrad=amsgrad,
            maximize=maximize,
        )

    slots = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * amsgrad]
    return leafwise(
        Settings(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        Rule(slots=dict.fromkeys(slots, torch.zeros_like), numbers=numbers, leaf=leaf, leaves=leaves, elementwise=True),
    )


@factory
def rmsprop(
    lr: Hyperparameter = 1e-2,
    *,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """RMSprop: the gradient over the root of its mean square.

        g <- g + weight_decay p;  v <- alpha v + (1 - alpha) g^2;  b <- momentum b + g / (sqrt(v) + eps);  p <- p - lr b

    With `centered`, the square of the mean gradient is taken from v: what is left is the variance.

    Args:
        lr: step size.
        alpha: how much of the average v is kept in an update.
        eps: added to the root, for stability.
        weight_decay: L2 penalty.
        momentum: the part of the buffer b that is kept; with 0, there is none, nor such a hyper-parameter.
        centered: whether to divide by the standard deviation.
        maximize: whether to climb.

    Raises:
        UsageError: a number is negative.

    Example:
        >>> optimizer, w = rmsprop(0.1), torch.tensor(3.0)
        >>> optimizer.update(torch.tensor(50.0), optimizer.init(w), w)[0]
        tensor(2.)

    References:
        Hinton 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; torch.optim.RMSprop.
    """
    check_not_negative(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)

    def leaf(n: Numbers, p: Tensor, g: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        g = decayed(-g if maximize else g, p, n)
        v = n["alpha"] * v + (1 - n["alpha"]) * g * g
        average = [torch.lerp(more[0], g, 1 - n["alpha"])] if centered else []
        below = (v - average[0] * average[0] if centered else v).sqrt() + n["eps"]
        if not momentum:
            return p - n["lr"] * (g / below), v, *average
        b = n["momentum"] * more[-1] + g / below
        return p - n["lr"] * b, v, *average, b

    def leaves(n: Numbers, p: Any, g: Any, v: Any, *more: Any) -> None:
        g = decayed_all(kernels._foreach_neg(g) if maximize else g, p, n)
        kernels._foreach_mul_(v, n["alpha"])
        kernels._foreach_addcmul_(v, g, g, 1 - n["alpha"])
        if centered:
            kernels._foreach_lerp_(more[0], g, 1 - n["alpha"])
        below = kernels._foreach_sqrt(kernels._foreach_addcmul(v, more[0], more[0], -1) if centered else v)
        kernels._foreach_add_(below, n["eps"])
        if not momentum:
            kernels._foreach_addcdiv_(p, g, below, -n["lr"])
            return
        kernels._foreach_mul_(more[-1], n["momentum"])
        kernels._foreach_addcdiv_(more[-1], g, below)
        kernels._foreach_add_(p, more[-1], alpha=-n["lr"])

    slots = ["square_avg", *["grad_avg"] * centered, *["momentum_buffer"] * bool(momentum)]
    inertia = {"momentum": momentum} if momentum else {}
    return leafwise(
        Settings(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, **inertia),
        Rule(
            slots=dict.fromkeys(slots, torch.zeros_like),
            numbers=lambda h, t: h,
            leaf=leaf,
            leaves=leaves,
            elementwise=True,
        ),
    )


@factory
def adagrad(
    lr: Hyperparameter = 1e-2,
    *,
    lr_decay: Number = 0.0,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: Number = 0.0,
    eps: Number = 1e-10,
    maximize: bool = False,
) -> Optimizer:
    """Adagrad: the gradient over the root of the sum of its squares.

        g <- g + weight_decay p;  s <- s + g^2;  p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)

    Args:
        lr: step size.
        lr_decay: how fast the step size falls.
        weight_decay: L2 penalty.
        initial_accumulator_value: the first s.
        eps: added to the root, for stability.
        maximize: whether to climb.

    Raises:
        UsageError: a number is negative.

    Example:
        >>> optimizer, w = adagrad(0.1), torch.tensor(1.0)
        >>> optimizer.update(torch.tensor(50.0), optimizer.init(w), w)[0]
        tensor(0.9000)

    References:
        Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html; torch.optim.Adagrad.
    """
    check_not_negative(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps)
    check_not_negative(initial_accumulator_value=initial_accumulator_value)

    def numbers(h: Numbers, t: Any) -> Numbers:
        return {**h, "size": h["lr"] / (1 + (t - 1) * h["lr_decay"])}

    def leaf(n: Numbers, p: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        g = decayed(-g if maximize else g, p, n)
        s = s + g * g
        return p - n["size"] * g / (s.sqrt() + n["eps"]), s

    def leaves(n: Numbers, p: Any, g: Any, s: Any) -> None:
        g = decayed_all(kernels._foreach_neg(g) if maximize else g, p, n)
        kernels._foreach_addcmul_(s, g, g)
        below = kernels._foreach_sqrt(s)
        kernels._foreach_add_(below, n["eps"])
        kernels._foreach_addcdiv_(p, g, below, -n["size"])

    def first(p: Tensor) -> Tensor:
        both = complex(initial_accumulator_value, initial_accumulator_value)
        return torch.full_like(p, both if p.is_complex() else initial_accumulator_value)

    return leafwise(
        Settings(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps),
        Rule(slots={"sum": first}, numbers=numbers, leaf=leaf, leaves=leaves, elementwise=True),
    )
