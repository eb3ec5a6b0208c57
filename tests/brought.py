"""What people bring that a plain model and a plain loop do not show: each trains with the stock Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from stock import gpt2
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from transformers import TrainerCallback

OLD = 40
"""Rows of the embedding that are not to be trained, where gradients are masked."""


@dataclass
class Brought:
    """What goes into a trainer.

    Attributes:
        model: The model.
        bases: Classes before the trainer's own.
        callbacks: For the trainer.
        optimizer: Of the user's own; None for the Trainer's.
        options: Of the configuration.
    """

    model: nn.Module
    bases: tuple[type, ...] = ()
    callbacks: list[TrainerCallback] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def trainer(self, cls: type, args: Any, data: Any) -> Any:
        """A trainer of it.

        Args:
            cls: The trainer's class.
            args: Its configuration.
            data: For training.
        """
        kind = type("Brought", (*self.bases, cls), {}) if self.bases else cls
        optimizers = (self.optimizer, None)
        trainer = kind(model=self.model, args=args, train_dataset=data, callbacks=self.callbacks, optimizers=optimizers)
        for callback in self.callbacks:
            callback.trainer = trainer
        return trainer


# ---- Weights that are used at other times than their modules run ----


class Net(nn.Module):
    """A small stack; subclasses use its weights in their own way."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module] = lambda module: module, where: str = "head") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(50, 16)
        self.first = norm(nn.Linear(16, 16)) if where == "first" else nn.Linear(16, 16)
        layers = [nn.Linear(16, 16) for _ in range(3)]
        self.layers = nn.ModuleList([norm(layer) for layer in layers] if where == "layer" else layers)
        self.head = norm(nn.Linear(16, 50)) if where == "head" else nn.Linear(16, 50)

    def extra(self, h: torch.Tensor, labels: torch.Tensor, number: int) -> torch.Tensor | float:
        return 0.0

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        h, extra = self.first(self.emb(input_ids)), 0.0
        for number, layer in enumerate(self.layers):
            h = h + torch.tanh(layer(h))
            extra = extra + self.extra(h, labels, number)
        logits = self.head(h)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.1 * extra, "logits": logits}


class DetachedHead(Net):
    """An auxiliary loss through the head, which is to train the layers only."""

    def extra(self, h, labels, number):
        return F.cross_entropy(F.linear(h, self.head.weight.detach()).flatten(0, 1), labels.flatten())


class EarlyHead(Net):
    """An auxiliary loss through the head, which trains that, too."""

    def extra(self, h, labels, number):
        return F.cross_entropy((h @ self.head.weight.t()).flatten(0, 1), labels.flatten())


class BorrowedLayer(Net):
    """A layer's weight is used, without a gradient, where an earlier layer has run."""

    def extra(self, h, labels, number):
        return F.linear(h, self.layers[-1].weight.detach()).square().mean()


class OwnLinear(torch.autograd.Function):
    """A product whose gradient the user has written."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class KeptLinear(OwnLinear):
    """As it should not be: the weight is kept where autograd does not see that it changes."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient @ ctx.weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


product, kept_product = OwnLinear.apply, KeptLinear.apply


class OwnFunction(Net):
    """An auxiliary loss through the head, by a function of the user's own."""

    def extra(self, h, labels, number):
        return product(h, self.head.weight).square().mean()


class OwnFunctionDetached(Net):
    def extra(self, h, labels, number):
        return product(h, self.head.weight.detach()).square().mean()


class OwnFunctionKept(Net):
    def extra(self, h, labels, number):
        return kept_product(h, self.head.weight).square().mean()


class OwnLayer(nn.Linear):
    def forward(self, x):
        return product(x, self.weight) + self.bias


class OwnLayers(Net):
    """Layers that compute by it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OwnLayer(16, 16) for _ in range(3)])


class ListOfWeights(nn.Module):
    """Weights in a `ParameterList`, which has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.weights = nn.ParameterList([nn.Parameter(0.1 * torch.randn(16, 16)) for _ in range(2)])

    def forward(self, input_ids, labels):
        h = self.emb(input_ids)
        for weight in self.weights:
            h = h + torch.tanh(h @ weight)
        logits = self.head(h)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def lora(**options: Any) -> nn.Module:
    model = gpt2()
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))


class Allocate(TrainerCallback):
    """AdaLoRA moves ranks between layers by their gradients, after the step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.own_steps = getattr(self, "own_steps", 0) + 1  # what it allocates by comes from its own gradients
        model.base_model.update_and_allocate(self.own_steps)


def adalora() -> Brought:
    model = gpt2()
    torch.manual_seed(1)
    ranks = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 6}
    config = AdaLoraConfig(**ranks, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return Brought(get_peft_model(model, config), callbacks=[Allocate()])


# ---- Several backward passes in a step ----


class TwoHalves:
    """A backward for each half of the batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = 0.0
        for half in ({k: v[:2] for k, v in inputs.items()}, {k: v[2:] for k, v in inputs.items()}):
            part = self.compute_loss(model, half) / 2
            self.accelerator.backward(part)
            loss = loss + part.detach()
        return loss


class TwoLosses:
    """A backward for each of two losses of one forward."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        logits = model(**inputs).logits
        first = logits.square().mean()
        second = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
        first.backward(retain_graph=True)
        second.backward()
        return (first + second).detach()


class Adversarial:
    """A second forward and backward with embeddings that have been moved."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        weight = self.model.get_input_embeddings().weight
        old = weight.data.clone()
        weight.data.add_(1e-2 * weight.grad / weight.grad.norm())
        super().training_step(model, inputs, num_items_in_batch)
        weight.data.copy_(old)
        return loss


class BackwardInLoss:
    """Of all parts of a batch but the last."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts = inputs["input_ids"].split(2)
        labels = inputs["labels"].split(2)
        total = 0.0
        for ids, target in zip(parts, labels, strict=True):
            part = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), target.flatten()) / len(parts)
            if ids is not parts[-1]:
                part.backward()  # so that memory holds the activations of one part
                part = part.detach()
            total = total + part
        return total


class CachedLoss(nn.Module):
    """Gradient caching: the loss of the whole batch, and when backward comes to it, one backward for each part."""

    def __init__(self, within=None):
        super().__init__()
        self.within = within

    def forward(self, model, inputs):
        if self.within is not None:
            return self.within(model, inputs)
        parts = inputs["input_ids"].split(2)
        with torch.no_grad():
            logits = torch.cat([model(input_ids=part).logits for part in parts]).requires_grad_()
        loss = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
        gradients = torch.autograd.grad(loss, logits)[0].split(2)

        def learn(scale):
            with torch.enable_grad():
                for part, gradient in zip(parts, gradients, strict=True):
                    (model(input_ids=part).logits * gradient).sum().mul(scale).backward()

        loss = loss.detach().requires_grad_()
        loss.register_hook(learn)
        return loss


class OwnLoss:
    """A loss of the trainer's own, as sentence-transformers' trainers have one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss = CachedLoss(CachedLoss())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss(model, inputs)


# ---- Gradients that are read or changed after backward ----


class MaskInStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.model.get_input_embeddings().weight.grad[:OLD] = 0
        return loss


class ValueInStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        torch.nn.utils.clip_grad_value_(self.model.parameters(), 1e-3)
        return loss


class MaskInCallback(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.get_input_embeddings().weight.grad[:OLD] = 0


class NormsAfterStep(TrainerCallback):
    """Reads gradients when the optimizer has stepped, before they are zeroed."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms.append(sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))


class HooksAfterOurs(TrainerCallback):
    """Hooks of the user that come after the trainer's own."""

    def __init__(self, when: str) -> None:
        self.when, self.norms = when, []

    def _register(self, when: str) -> None:
        if when == self.when:
            for parameter in self.trainer.model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: self.norms.append(float(p.grad.norm())))

    def on_train_begin(self, *args, **kwargs):
        self._register("train")

    def on_step_begin(self, args, state, *rest, **kwargs):
        self._register(f"step {state.global_step}")


class HooksBeforeOurs(TrainerCallback):
    """Hooks of the user that are there before the trainer is made."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: list[float] = []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self.norms.append(float(p.grad.norm())))


# ---- Optimizers that step all at once ----


class Chained(torch.optim.Optimizer):
    """Two optimizers behind one, as Muon for matrices and AdamW for the rest."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    def step(self, closure=None):
        for one in self.optimizers:
            one.step()

    def state_dict(self):
        return {"all": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict):
        for one, state in zip(self.optimizers, state_dict["all"], strict=True):
            one.load_state_dict(state)


class ByHeart(torch.optim.Optimizer):
    """Steps what it was given once, whatever its groups say now. Holds no optimizer."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.known = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.known:
            if parameter.grad is not None:
                parameter.data -= 0.05 * parameter.grad


def chained(model: nn.Module) -> Chained:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    return Chained([torch.optim.SGD(matrices, lr=2e-2, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)])


# ---- Parameters that come and go, or are beside the model ----


class Unfreeze(TrainerCallback):
    """Layers that are frozen at first, and unfrozen in the second epoch; or the other way round."""

    def __init__(self, low: list[nn.Parameter], freezes: bool = False) -> None:
        self.low, self.freezes = low, freezes

    def on_epoch_begin(self, args, state, control, **kwargs):
        if round(state.epoch or 0) == 1:
            for parameter in self.low:
                parameter.requires_grad = not self.freezes


class UnfreezeInStep(TrainerCallback):
    """Layers that are unfrozen one after the other, at the beginning of a step."""

    def __init__(self, layers: list[list[nn.Parameter]]) -> None:
        self.layers = layers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= 2 and self.layers:
            for parameter in self.layers.pop():
                parameter.requires_grad = True


def gradually_unfrozen() -> Brought:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    layers = [list(layer.parameters()) for layer in model.transformer.h]
    for parameter in (p for layer in layers for p in layer):
        parameter.requires_grad = False
    return Brought(model, callbacks=[UnfreezeInStep(layers)], optimizer=optimizer)


def partly_frozen(frozen: bool = True) -> Brought:
    model = gpt2()
    low = [p for name, p in model.named_parameters() if ".h.0." in name or "wpe" in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for parameter in low:
        parameter.requires_grad = not frozen
    callbacks = [Unfreeze(low, freezes=not frozen)]
    return Brought(model, callbacks=callbacks, optimizer=optimizer, options={"max_steps": -1, "num_train_epochs": 2})


class ZeroBeside(TrainerCallback):
    """The stock Trainer zeroes the model's gradients alone."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.weight.grad = None


class WeightedLoss:
    """A loss with a parameter of its own, which the model does not have."""

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        if not hasattr(self, "weight"):
            self.weight = nn.Parameter(torch.zeros(()))
            optimizer.add_param_group({"params": [self.weight]})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss * torch.exp(-self.weight) + self.weight


# ---- Methods that need one model, written by the user ----


class Noting:
    """Notes the weights that each of the user's own methods finds."""

    def note(self, where: str) -> None:
        weights = float(sum(p.detach().double().sum() for p in self.model.parameters()))
        self.noted = [*getattr(self, "noted", []), (where, weights)]


class NoteSteps(TrainerCallback):
    """Notes the weights after each step, which differ between workers; predicts and saves at the end of an epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.note("step")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.predict(self.trainer.eval_dataset)
        self.trainer.save_model(f"{args.output_dir}/own")


def evaluating_itself(cls: type) -> type:
    """As transformers' example of question answering does."""

    class EvaluatesItself(Noting, cls):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            self.note("evaluate")
            loader = self.get_eval_dataloader(eval_dataset)
            output = self.evaluation_loop(loader, description="Evaluation", metric_key_prefix=metric_key_prefix)
            self.log(output.metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, output.metrics)
            return output.metrics

    return EvaluatesItself


def around_ours(cls: type) -> type:
    """All methods that need one model, each with something of the user's before ours."""

    class AroundOurs(Noting, cls):
        def evaluate(self, *args, **kwargs):
            self.note("evaluate")
            return super().evaluate(*args, **kwargs)

        def predict(self, *args, **kwargs):
            self.note("predict")
            return super().predict(*args, **kwargs)

        def evaluation_loop(self, *args, **kwargs):
            self.note("evaluation_loop")
            return super().evaluation_loop(*args, **kwargs)

        def save_model(self, *args, **kwargs):
            self.note("save_model")
            return super().save_model(*args, **kwargs)

        def _save_checkpoint(self, *args, **kwargs):
            self.note("_save_checkpoint")
            return super()._save_checkpoint(*args, **kwargs)

    return AroundOurs


def further_below(cls: type) -> type:
    """A subclass of such a subclass, with the method in between."""
    return type("FurtherBelow", (evaluating_itself(cls),), {})


def mixed_in_before(cls: type) -> type:
    """The methods come from a class that knows nothing of the trainer."""

    class Mixin(Noting):
        def evaluate(self, *args, **kwargs):
            self.note("evaluate")
            return super().evaluate(*args, **kwargs)

        def _save_checkpoint(self, *args, **kwargs):
            self.note("_save_checkpoint")
            return super()._save_checkpoint(*args, **kwargs)

    return type("MixedInBefore", (Mixin, cls), {})


OVERRIDING: dict[str, tuple[Callable[[type], type], set[str]]] = {
    "evaluates itself": (evaluating_itself, {"evaluate"}),
    "around ours": (
        around_ours,
        {"evaluate", "predict", "evaluation_loop", "save_model", "_save_checkpoint"},
    ),
    "further below": (further_below, {"evaluate"}),
    "mixed in before": (mixed_in_before, {"evaluate", "_save_checkpoint"}),
}
"""Makes a trainer of the user's own out of ours; and its methods that need one model."""


class Tempered:
    """A loss with a temperature, which the user's own optimizer steps."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs).logits * torch.exp(self.weight)
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())


def tempered() -> Brought:
    model, weight = gpt2(), nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}, {"params": [weight], "lr": 0.1}], lr=1e-2)
    kind = type("Tempered", (Tempered,), {"weight": weight})
    return Brought(model, (kind,), callbacks=[ZeroBeside()], optimizer=optimizer)


def with_optimizer(make: Callable[[nn.Module], torch.optim.Optimizer], **options: Any) -> Brought:
    model = gpt2()
    return Brought(model, optimizer=make(model), options=options)


def compiled(how: str) -> nn.Module:
    """A model that the user has compiled, as a whole or in parts."""
    model = gpt2()
    if how == "whole":
        return torch.compile(model, backend="aot_eager")
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager")
        return model
    for part in (model,) if how == "in place" else model.transformer.h:
        part.compile(backend="aot_eager")
    return model


COMPILED: dict[str, Callable[[], Brought]] = {
    how: lambda how=how: Brought(compiled(how), options={"remove_unused_columns": False, "max_steps": 4})
    for how in ("whole", "in place", "layers", "forward")
}
BROUGHT: dict[str, Callable[[], Brought]] = {
    "detached head": lambda: Brought(DetachedHead()),
    "early head": lambda: Brought(EarlyHead()),
    "borrowed layer": lambda: Brought(BorrowedLayer()),
    "own function": lambda: Brought(OwnFunction()),
    "own function, detached": lambda: Brought(OwnFunctionDetached()),
    "own function that keeps": lambda: Brought(OwnFunctionKept()),
    "own layers": lambda: Brought(OwnLayers()),
    "weight norm of the head": lambda: Brought(Net(weight_norm, "head")),
    "weight norm of the first": lambda: Brought(Net(weight_norm, "first")),
    "spectral norm of layers": lambda: Brought(Net(spectral_norm, "layer")),
    "parametrized": lambda: Brought(Net(parametrizations.weight_norm, "first")),
    "list of weights": lambda: Brought(ListOfWeights()),
    "lora on embeddings": lambda: Brought(lora(target_modules=["wte", "c_attn"], modules_to_save=["wpe"])),
    "lora on tokens": lambda: Brought(
        lora(target_modules=["c_attn"], trainable_token_indices={"wte": [1, 2]}, modules_to_save=["wpe"])
    ),
    "adalora": adalora,
    "two losses": lambda: Brought(gpt2(), (TwoLosses,)),
    "two halves": lambda: Brought(gpt2(), (TwoHalves,)),
    "adversarial": lambda: Brought(gpt2(), (Adversarial,)),
    "backward in the loss": lambda: Brought(gpt2(), (BackwardInLoss,)),
    "cached gradients": lambda: Brought(gpt2(), (OwnLoss,)),
    "mask in the step": lambda: Brought(gpt2(), (MaskInStep,), options={"weight_decay": 0.0}),
    "values clipped in the step": lambda: Brought(gpt2(), (ValueInStep,)),
    "mask in a callback": lambda: Brought(gpt2(), callbacks=[MaskInCallback()], options={"weight_decay": 0.0}),
    "norms after the step": lambda: Brought(gpt2(), callbacks=[NormsAfterStep()]),
    "hooks before the trainer": lambda: (lambda model: Brought(model, callbacks=[HooksBeforeOurs(model)]))(gpt2()),
    "hooks at the beginning": lambda: Brought(gpt2(), callbacks=[HooksAfterOurs("train")]),
    "hooks in the middle": lambda: Brought(gpt2(), callbacks=[HooksAfterOurs("step 2")]),
    "two optimizers behind one": lambda: with_optimizer(chained),
    "two optimizers, accumulating": lambda: with_optimizer(chained, gradient_accumulation_steps=2),
    "unfrozen later": partly_frozen,
    "unfrozen in steps": gradually_unfrozen,
    "frozen later": lambda: partly_frozen(frozen=False),
    "a loss with a temperature": tempered,
    "a loss with a parameter": lambda: Brought(gpt2(), (WeightedLoss,), callbacks=[ZeroBeside()]),
}
