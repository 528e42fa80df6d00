"""Sophia: momentum divided by a cheap estimate of the Hessian's diagonal, clipped in every coordinate.

    m = b1 m + (1 - b1) g                                   every step
    h = b2 h + (1 - b2) hhat                                every k steps, the first included
    theta = (1 - lr * wd) theta - lr * clip(m / max(rho * h, eps), -1, 1)

where coordinates of small or negative curvature take a sign step of size lr. Two estimators of the diagonal of the
Hessian of the mean loss L = (1 / B) sum_i w_i l_i,  B = sum_i w_i  (the tokens, not the sequences):

    G (Gauss-Newton-Bartlett)    labels y_i ~ softmax(logits_i),   ghat = (1 / B) sum_i sqrt(w_i) grad -log p(y_i),
                                 hhat = B * ghat * ghat            needs an objective that is a likelihood
    H (Hutchinson)               u ~ N(0, I),   hhat = u * (Hess L) u          needs attention with a double backward

Both see a ``subset`` of the rows of the step. m and h are float32 whatever the parameters are. Liu et al., arXiv
2305.14342 (rho is the paper's gamma). Against the authors' code: h holds B * ghat^2, not ghat^2, so that the number of
tokens may vary from step to step and both estimators share one update; with B constant the update is theirs.

``win_rate``, logged at every estimate, is the share of coordinates that are not clipped: raise rho if it settles below
0.1, lower it above 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer as TorchOptimizer

from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.optimizers import Optimizer
from gossamer.parts.training_loop import Autocast

CARD = Card(
    title="Sophia: second-order clipped stochastic optimisation",
    paper="2305.14342",
    year=2023,
    claim="reaches a tuned AdamW's best final loss in at most 0.8 of the steps, each at most 10 % slower",
    limits="the paper's factor of two at 125M parameters and more is not shown here",
)


class SophiaConfig(Config):
    """Rate, averages, clipping and the estimator."""

    lr: float = option(3e-4, "learning rate: the largest move of a coordinate in a step", gt=0)
    beta1: float = option(0.965, "decay of the gradient average", ge=0, lt=1)
    beta2: float = option(0.99, "decay of the curvature average, per estimate", ge=0, lt=1)
    rho: float = option(0.04, "curvature is multiplied by it: larger clips fewer coordinates", gt=0)
    weight_decay: float = option(0.1, "decoupled decay of matrices; vectors never decay", ge=0)
    estimator: str = option("G", "Gauss-Newton-Bartlett or Hutchinson", choices=("G", "H"))
    k: int = option(10, "steps from one estimate to the next", ge=1)
    subset: float = option(0.5, "share of a step's rows that an estimate sees", gt=0, le=1)
    eps: float = option(1e-12, "least denominator", gt=0)


class Sophia(Optimizer):
    """Builds :class:`SophiaOptimizer` and the hook that estimates the curvature during training."""

    config_class = SophiaConfig

    def build(self, params: Iterable[Any]) -> SophiaOptimizer:
        c: SophiaConfig = self.config
        return SophiaOptimizer(
            params, c.lr, (c.beta1, c.beta2), c.rho, c.weight_decay, estimator=c.estimator, k=c.k, eps=c.eps
        )

    def callbacks(self, model: nn.Module, objective: Any) -> list[Any]:
        if self.config.estimator == "G" and not getattr(objective, "likelihood", False):
            raise InputError(
                f"{self.name}: estimator G",
                must="have an objective that is a likelihood, whose labels can be sampled",
                got=objective.name,
                do="set estimator: H, or choose another optimizer",
            )
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if self.config.estimator == "H" and attention not in (None, "eager"):
            raise InputError(
                f"{self.name}: estimator H",
                must="have attention that can be differentiated twice",
                got=repr(attention),
                do='load the model with attn_implementation="eager", or set estimator: G',
            )
        return [_CurvatureHook(model, objective, self.config, self.seed)]


class SophiaOptimizer(TorchOptimizer):
    """The update above as an ordinary torch optimizer.

    ``estimator="G"``: every ``k`` steps leave the gradient of the sampled-label mean loss in ``.grad``, call
    ``update_hessian(bs)`` with ``bs`` = B, and clear the gradients. ``estimator="H"``: call ``update_hutchinson``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        estimator: str = "G",
        k: int = 10,
        eps: float = 1e-12,
    ) -> None:
        if k < 1:
            raise InputError("sophia: k", must="be at least 1", got=k)
        self.estimator, self.k, self.eps = estimator, k, eps
        self.count_wins, self.win_rate = False, math.nan
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from ``.grad``; with ``count_wins`` set, ``win_rate`` is that of this step."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        won = total = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                ratio = self._ratio(parameter, group)
                if self.count_wins:
                    won += int((ratio.abs() < 1).sum())
                    total += ratio.numel()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(ratio.clamp_(-1, 1), alpha=-group["lr"])
        if total:
            self.win_rate = won / total
        return result

    @torch.no_grad()
    def update_hessian(self, bs: float) -> None:
        """Average ``bs * grad * grad`` into h: Gauss-Newton-Bartlett, from sampled-label gradients of the mean loss."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    h = self._moments(parameter)["h"]
                    grad = parameter.grad.float()
                    h.mul_(group["betas"][1]).addcmul_(grad, grad, value=(1 - group["betas"][1]) * bs)

    def update_hutchinson(self, losses: Iterable[Callable[[], Tensor]], generator: torch.Generator) -> None:
        """Average ``u * (H u)`` into h, where the sum of the ``losses`` is the mean loss; ``.grad`` is not touched."""
        used = [(p, group["betas"][1]) for group in self.param_groups for p in group["params"] if p.requires_grad]
        parameters = [parameter for parameter, _ in used]
        noise = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in parameters]
        products = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for loss in losses:
            gradients = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
            along = sum((g * u).sum() for g, u in zip(gradients, noise, strict=True) if g is not None)
            second = torch.autograd.grad(along, parameters, allow_unused=True) if isinstance(along, Tensor) else ()
            for product, value in zip(products, second, strict=False):
                if value is not None:
                    product.add_(value.detach())
        with torch.no_grad():
            for (parameter, beta2), u, product in zip(used, noise, products, strict=True):
                self._moments(parameter)["h"].mul_(beta2).addcmul_(u.float(), product, value=1 - beta2)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but m and h keep float32, which torch would cast to the type of the parameters."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            self.state[parameter] = {name: value.to(parameter.device).clone() for name, value in saved.items()}

    def mean_curvature(self) -> float:
        """Mean of h over all coordinates."""
        moments = [state["h"] for state in self.state.values() if "h" in state]
        return float(sum(h.sum() for h in moments)) / max(1, sum(h.numel() for h in moments))

    def _ratio(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """m / max(rho h, eps), after the average took in the gradient; float32, the parameter's shape."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise InputError(
                "sophia", must="get dense gradients", got="a sparse one", do="build the embedding with sparse=False"
            )
        moments = self._moments(parameter)
        moments["m"].lerp_(parameter.grad.float(), 1 - group["betas"][0])
        return moments["m"] / (moments["h"] * group["rho"]).clamp_(min=self.eps)

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            for name in ("m", "h"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
        return state


class _CurvatureHook:
    """Estimates before step 0, k, 2k ... on the rows that the step is about to learn from.

    The draws depend on the seed and the step alone, so that a resumed run makes the same ones.
    """

    def __init__(self, model: nn.Module, objective: Any, config: SophiaConfig, seed: int) -> None:
        self.model, self.objective, self.config, self.seed = model, objective, config, seed

    def before_step(self, step: int, optimizer: Any, batches: Sequence[dict[str, Any]], autocast: Autocast) -> None:
        optimizer.count_wins = step % self.config.k == 0
        if not optimizer.count_wins:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = self._chosen(batches)
        total = sum(self.objective.amount(batch) for batch in chosen)
        if self.config.estimator == "H":
            losses = [lambda batch=batch: self._loss(batch, total, autocast) for batch in chosen]
            optimizer.update_hutchinson(losses, generator)
            return
        for batch in chosen:
            with autocast():
                logits, weights = self.objective.logits(self.model, batch)
            (sampled_nll(logits, weights, generator) / total).backward()
        optimizer.update_hessian(total)
        optimizer.zero_grad(set_to_none=True)

    def after_step(self, step: int, optimizer: Any) -> dict[str, float]:
        if step % self.config.k:
            return {}
        return {"win_rate": optimizer.win_rate, "curvature": optimizer.mean_curvature()}

    def _loss(self, batch: dict[str, Any], total: float, autocast: Autocast) -> Tensor:
        with autocast():
            return self.objective.loss(self.model, {**batch, "normaliser": total}).value

    def _chosen(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A ``subset`` of the step's rows: whole micro-batches, or rows of the only one."""
        if len(batches) == 1:
            return [self.objective.narrow(batches[0], self.config.subset)]
        return list(batches[: max(1, round(self.config.subset * len(batches)))])


def sampled_nll(logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """sum_i sqrt(w_i) * -log p(y_i) with y_i ~ softmax(logits_i): logits [n, V], weights [n] -> scalar float32."""
    logits = logits.float()
    with torch.no_grad():
        # inverse transform on the CPU generator, so that draws are the same on any device
        uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        labels = (cumulative < uniform * cumulative[:, -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return (F.cross_entropy(logits, labels, reduction="none") * weights.float().sqrt()).sum()
