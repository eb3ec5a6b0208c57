"""GPT-2 many times over in one batch, each with weights and an optimizer of its own, for simulations of workers.

Of a small model nearly all time goes into calling operations. So workers, and seeds, cost little more than one.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.moments import left_of_noise
from layup_hf.optim.matrices import layer_matrices
from layup_hf.optim.muon import orthogonalized

from .local_adam import BETA1, BETA2, CLIP, EPSILON


class Models:
    """GPT-2 many times over, with weights of its own each, computed as one batch.

    Args:
        of_seeds: A model for each seed.
        workers: How many begin with each.

    Attributes:
        flat: All weights, (seeds, workers, numbers); parameters lie in it one after the other.
        places: Of each parameter: where it begins, and its shape.
    """

    def __init__(self, of_seeds: list[nn.Module], workers: int) -> None:
        model: Any = of_seeds[0]
        self.config = model.config
        self.blocks = [list(block.parameters) for block in split_into_blocks(model)]
        ordered = [p for block in self.blocks for p in block]
        names = {id(p): name.removeprefix("transformer.") for name, p in model.named_parameters()}
        begins = itertools.accumulate((p.numel() for p in ordered), initial=0)
        self.places = {names[id(p)]: (begin, p.shape) for begin, p in zip(begins, ordered, strict=False)}
        matrices = {id(p) for p in layer_matrices(model)["whole"]}
        self.matrices = [names[id(p)] for p in ordered if id(p) in matrices]
        rows = [
            torch.cat([dict(m.named_parameters())[f"transformer.{name}"].detach().flatten() for name in self.places])
            for m in of_seeds
        ]
        self.flat = torch.stack(rows).unsqueeze(1).repeat(1, workers, 1)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Of each parameter, for all models: (models, *shape)."""
        flat = flat.flatten(0, 1)
        return {
            name: flat[:, begin : begin + shape.numel()].view(-1, *shape)
            for name, (begin, shape) in self.places.items()
        }

    def loss(self, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """Of each model, for sequences of its own: (models, sequences, tokens)."""
        models, count, length = tokens.shape
        width, heads = self.config.n_embd, self.config.n_head
        own = tokens + (torch.arange(models) * weights["wte.weight"].size(1)).view(-1, 1, 1)
        x = functional.embedding(own, weights["wte.weight"].flatten(0, 1))
        x = (x + weights["wpe.weight"][:, None, :length]).view(models, count * length, width)

        def norm(x: Tensor, name: str) -> Tensor:
            x = functional.layer_norm(x, (width,), eps=self.config.layer_norm_epsilon)
            return torch.addcmul(weights[f"{name}.bias"][:, None], x, weights[f"{name}.weight"][:, None])

        def linear(x: Tensor, name: str) -> Tensor:
            return torch.baddbmm(weights[f"{name}.bias"][:, None], x, weights[f"{name}.weight"])

        for layer in (f"h.{number}" for number in range(self.config.n_layer)):
            qkv = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").view(models * count, length, 3, heads, -1)
            mixed = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
            x = x + linear(mixed.transpose(1, 2).reshape(models, count * length, width), f"{layer}.attn.c_proj")
            hidden = functional.gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc"), approximate="tanh")
            x = x + linear(hidden, f"{layer}.mlp.c_proj")
        logits = torch.bmm(norm(x, "ln_f"), weights["wte.weight"].mT).view(models, count, length, -1)[:, :, :-1]
        losses = functional.cross_entropy(logits.flatten(0, 2), tokens[:, :, 1:].flatten(), reduction="none")
        return losses.view(models, -1).mean(1)

    def gradients(self, tokens: Tensor) -> Tensor:
        """Like `flat`; each model's clipped by its own norm."""
        weights = {name: view.detach().requires_grad_() for name, view in self.views(self.flat).items()}
        found = torch.autograd.grad(self.loss(weights, tokens).sum(), list(weights.values()))
        flat = torch.cat([gradient.flatten(1) for gradient in found], 1).view(self.flat.shape)
        return flat.mul_((CLIP / (flat.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1))


class Optimizer:
    """AdamW of all models, and Muon of their matrices."""

    def __init__(self, models: Models, kind: set[str]) -> None:
        self._models, self._kind = models, kind
        self._first, self._second, self._momentum = (torch.zeros_like(models.flat) for _ in range(3))
        shapes = [shape for _, shape in models.places.values()]
        rows = [shape[0] if len(shape) > 1 else 1 for shape in shapes]
        lengths = [[shape.numel() // count] * count for shape, count in zip(shapes, rows, strict=True)]
        self._lengths = torch.tensor(list(itertools.chain(*lengths)))  # of each row
        self._noise: Tensor | None = None
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Tensor, rate: float) -> None:
        models, kind = self._models, self._kind
        if "ddp" in kind:
            gradients = gradients.mean(1, keepdim=True).expand_as(gradients)
        self.steps += 1
        of_first, of_second = 1 - BETA1**self.steps, 1 - BETA2**self.steps
        self._first.lerp_(gradients, 1 - BETA1)
        seen = gradients.mean(1, keepdim=True).expand_as(gradients) if "exact" in kind else gradients
        self._second.mul_(BETA2).addcmul_(seen, seen, value=1 - BETA2)
        square = self._second / of_second
        if kind & {"rows", "rows2"}:
            square *= self._without_noise(square, 2 if "rows2" in kind else square.size(1), of_second)
        change = self._first / of_first
        if "plain" not in kind:
            change.lerp_(gradients, 1 - BETA1)
        change /= square.sqrt_().add_(EPSILON)
        if "muon" in kind:
            self._momentum.lerp_(gradients, 0.05)
            ahead, into = models.views(gradients.lerp(self._momentum, 0.95)), models.views(change)
            for name in models.matrices:
                matrix = ahead[name]
                is_tall = matrix.size(1) > matrix.size(2)
                made = orthogonalized(matrix.mT if is_tall else matrix, 5)
                into[name].copy_((made.mT if is_tall else made) * (0.2 * math.sqrt(max(matrix.shape[1:]))))
        models.flat.add_(change, alpha=-rate)

    def _by_row(self, numbers: Tensor) -> Tensor:
        sums = torch.cat(
            [
                view.flatten(1).mean(1, keepdim=True) if view.dim() < 3 else view.flatten(2).mean(2)
                for view in self._models.views(numbers).values()
            ],
            1,
        )
        return sums.view(*numbers.shape[:2], -1)

    def _without_noise(self, square: Tensor, workers: int, whole: float) -> Tensor:
        """Part of the second moment that is left when as many average: see `layup_hf.gossip.moments`."""
        others = self._first.roll(1 + self.steps % (square.size(1) - 1), 1)
        noise = self._by_row((self._first - others).square_()) / (2 * left_of_noise(BETA1, self.steps))
        self._noise = noise * (1 - BETA2) if self._noise is None else self._noise.lerp_(noise, 1 - BETA2)
        ratio = (self._noise / whole / self._by_row(square).clamp(min=1e-38)).clamp(max=1)
        return (1 - (1 - 1 / workers) * ratio).repeat_interleave(self._lengths, -1)
