"""What the package uses of its libraries that is not a stable interface, and since which version it has this form.

Checked when the package is imported, so that a version which lacks something is named at once, and not by an
`AttributeError` in the middle of a run. What versions do differently is evened out in `compat.py`. `CONTRIBUTING.md`
says how to add a version.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

WORKING = {"transformers": ">=5.4,<6", "accelerate": ">=1.8,<2", "torch": ">=2.8,<3"}
"""The versions that work, as in `pyproject.toml`."""

TESTED = {"transformers": "5.24", "accelerate": "1.15", "torch": "2.15"}
"""The newest that were tested: see `docs/versions.md`. With a newer one the package is imported with a warning."""


_MISSING = object()


@dataclass(frozen=True)
class Seam:
    """A member that is overridden, called, read or set.

    Attributes:
        owner: Where it is: a class, or a module.
        member: Its name.
        since: The first version of the library that has it in this form.
        parameters: Of those that it takes, the ones that are relied on.
        is_optional: The package does without where it is missing.
        is_set: An attribute that only instances have: looked for in the code of their class.
        before: What older versions have in its place, if that will do; `compat.py` knows both.
    """

    owner: str
    member: str
    since: str
    parameters: tuple[str, ...] = ()
    is_optional: bool = False
    is_set: bool = False
    before: str | None = None

    @property
    def library(self) -> str:
        return self.owner.partition(".")[0]

    def fault(self) -> str | None:
        """What is wrong with it in the installed version; None if nothing is."""
        owner = _resolve(self.owner)
        if owner is None:
            return None if self.is_optional else f"{self.owner} is missing"
        member = inspect.getattr_static(owner, self.member, _MISSING)
        if member is _MISSING:
            is_there = (
                self.is_optional
                or (self.is_set and self.member in _names_in(owner))
                or (self.before is not None and hasattr(owner, self.before))
            )
            return None if is_there else f"{self._name} is missing"
        known = _parameters_of(member) if self.parameters else None
        lacking = [name for name in self.parameters if known is not None and name not in known]
        return f"{self._name} takes no {', '.join(map(repr, lacking))}" if lacking else None

    @property
    def _name(self) -> str:
        return f"{self.owner}.{self.member}"


def _of(
    owner: str,
    since: str,
    *members: str | tuple[str, ...],
    is_optional: bool = False,
    is_set: bool = False,
    before: str | None = None,
) -> Iterator[Seam]:
    """Several members of one owner that came at once: names, or a name with the parameters that are relied on."""
    for member in members:
        name, *parameters = (member,) if isinstance(member, str) else member
        yield Seam(owner, name, since, tuple(parameters), is_optional, is_set, before)


_TRAINER = "transformers.trainer.Trainer"

SEAMS = (
    # ---- Methods of the Trainer that LayupMixin overrides ----
    *_of(
        _TRAINER,
        "5.3",
        ("_clip_grad_norm", "model"),
        ("_finalize_training", "trial"),
        ("_get_grad_norm", "model", "grad_norm"),
        ("_init_training_state", "max_steps", "num_update_steps_per_epoch", "num_train_epochs"),
        "_get_num_items_in_batch",
        "_prepare_for_training",
        (
            *("_run_epoch", "model", "epoch", "train_dataloader", "trial", "ignore_keys_for_eval", "start_time"),
            *("resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch"),
        ),
        ("_track_num_input_tokens", "inputs"),
        ("set_initial_training_values", "args", "dataloader"),
    ),
    *_of(_TRAINER, "5.0", "init_hf_repo"),
    *_of(
        _TRAINER,
        "5.0",
        ("_get_dataloader", "dataset", "description", "batch_size", "sampler_fn", "is_training"),
        ("_get_output_dir", "trial"),
        ("_inner_training_loop", "batch_size", "resume_from_checkpoint", "trial"),
        ("_load_from_checkpoint", "resume_from_checkpoint"),
        ("_load_optimizer_and_scheduler", "checkpoint"),
        ("_load_rng_state", "checkpoint"),
        (
            *("_maybe_log_save_evaluate", "tr_loss", "grad_norm", "model", "trial", "epoch"),
            *("ignore_keys_for_eval", "start_time", "learning_rate"),
        ),
        ("_push_from_checkpoint", "checkpoint_folder"),
        ("_save_checkpoint", "model", "trial"),
        ("_save_optimizer_and_scheduler", "output_dir"),
        ("_wrap_model", "model", "training", "dataloader"),
    ),
    # ---- What TrainerHost reads, sets and calls ----
    *_of(_TRAINER, "5.19", "_initial_global_step", is_set=True, is_optional=True),
    *_of(_TRAINER, "5.3", "_initial_num_input_tokens_seen", "_tr_loss", is_set=True),
    *_of(_TRAINER, "5.0", "_globalstep_last_logged", "_total_loss_scalar", "_train_batch_size", is_set=True),
    *_of(_TRAINER, "5.1", "_get_learning_rate"),
    *_of(_TRAINER, "5.0", "_finish_current_push", "_prepare_inputs"),
    *_of(_TRAINER, "5.0", ("_evaluate", "trial", "ignore_keys_for_eval", "skip_scheduler")),
    *_of(_TRAINER, "5.0", ("_determine_best_metric", "metrics", "trial")),
    *_of(_TRAINER, "5.0", "_eval_dataloaders", is_optional=True),
    # ---- Elsewhere in transformers ----
    *_of("transformers.trainer", "5.10", "hf_api", before="upload_folder"),  # replaced while the Trainer uploads
    *_of("transformers.TrainingArguments", "5.0", "_setup_devices", is_optional=True),  # replaced while it loads
    *_of("transformers.utils.hub", "5.0", "PushInProgress"),
    *_of("transformers.optimization", "5.4", "GreedyLR"),
    *_of("transformers.trainer_utils", "5.2", "sort_checkpoints"),
    *_of("transformers.trainer_utils", "5.0", ("check_target_module_exists", "optim_target_modules", "key")),
    # ---- accelerate ----
    *_of("accelerate.Accelerator", "1.3", ("unwrap_model", "keep_torch_compile")),
    *_of("accelerate.Accelerator", "1.1", ("prepare_model", "device_placement", "evaluation_mode")),
    *_of("accelerate.Accelerator", "1.1", "_dataloaders", is_set=True),
    *_of("accelerate.state.AcceleratorState", "1.1", "_shared_state"),
    *_of("accelerate.state.GradientState", "1.1", "_set_sync_gradients"),
    *_of("accelerate.state.PartialState", "1.1", "use_distributed"),
    # ---- torch ----
    *_of("torch.distributed.distributed_c10d", "2.6", "_set_pg_timeout"),
    *_of("torch.distributed", "2.6", "DistError"),
    *_of("torch.nn.modules.batchnorm", "2.6", "_NormBase"),
    *_of("torch.Tensor", "2.6", "_post_accumulate_grad_hooks", "_version"),
    *_of("torch.UntypedStorage", "2.6", "_cdata"),  # by which torch.save tells storages apart
    *_of("torch", "2.6", "_dynamo"),  # whose OptimizedModule is a compiled model
    *_of("torch.nn.Module", "2.6", "_compiled_call_impl"),
    *_of("torch.cuda.memory", "2.6", "_set_allocator_settings"),
    *_of("torch.optim.Optimizer", "2.6", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", is_set=True),
    *_of("torch.optim.AdamW", "2.6", "_step_supports_amp_scaling", is_optional=True),
    *_of("torch.optim.adamw", "2.6", ("adamw", "fused", "grad_scale", "found_inf", "has_complex")),
    *_of(
        *("torch", "2.6", "_foreach_add_", "_foreach_addcmul_", "_foreach_div_", "_foreach_lerp"),
        *("_foreach_lerp_", "_foreach_mul", "_foreach_mul_", "_foreach_norm", "_foreach_sub_"),
    ),
)

OF_GENERATING = ("_buffered_inputs", "_step")
"""What a trainer of TRL that generates keeps: its rollout, and the batches that have been learnt from (0.29 to 1.16).

Looked for when such a trainer is made, as TRL need not be there.
"""


WRITING_TENSORS = (
    ("torch", "save"),
    ("safetensors.torch", "save_file"),
    ("transformers.modeling_utils", "safe_save_file"),
    ("peft.peft_model", "safe_save_file"),
)
"""By what files of tensors are written: the module that calls it, and its name there.

Replaced while a checkpoint is saved with `checkpoints="background"`. What is not imported or has another name writes at
once, as always, so nothing depends on them.
"""


def check_seams() -> None:
    """Make sure that the installed libraries have all of it, and say so if one is newer than what was tested.

    Raises:
        ImportError: One is too old or lacks something; naming it, the installed version, and the versions that work.
    """
    installed = {library: version_of(library) for library in WORKING}
    for library, version in installed.items():
        oldest = WORKING[library].removeprefix(">=").partition(",")[0]
        if _release(version) < _release(oldest):
            raise _error(library, version, f"{oldest} is the oldest that was tested")
    for seam in SEAMS:
        fault = seam.fault()
        if fault is not None:
            why = f"{fault}, which is needed as it is since {seam.library} {seam.since}"
            raise _error(seam.library, installed[seam.library], why)
    _warn_of_newer(installed)


def version_of(library: str) -> str:
    """Of what is imported, which need not be what was installed last."""
    return str(importlib.import_module(library).__version__)


def _error(library: str, version: str, why: str) -> ImportError:
    works = library + WORKING[library]
    return ImportError(
        f"layup_hf does not work with {library} {version}: {why}. Versions that work: {works}. "
        f"Run: pip install '{works}'"
    )


def _warn_of_newer(installed: dict[str, str]) -> None:
    """Once on each machine, for all libraries together."""
    newer = [library for library, version in installed.items() if _release(version)[:2] > _release(TESTED[library])]
    if newer and os.environ.get("LOCAL_RANK", "0") == "0":
        tested = ", ".join(f"{library} {TESTED[library]}" for library in newer)
        present = ", ".join(f"{library} {installed[library]}" for library in newer)
        pins = " ".join(f"'{library}=={TESTED[library]}.*'" for library in newer)
        warnings.warn(
            f"layup_hf was tested up to {tested}; installed: {present}. The members that it relies on are there. If "
            f"something fails all the same, try: pip install {pins}",
            stacklevel=3,
        )


def _release(version: str) -> tuple[int, ...]:
    """Its numbers alone, so that `2.8.0+cpu` and `5.4.0.dev0` count as 2.8.0 and 5.4.0."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match is not None else ()


def _resolve(path: str) -> Any:
    """A module, or a class in one; None if there is none. What else an import finds wrong is not hidden."""
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}.") or not module:
            raise
    parent = _resolve(module)
    return getattr(parent, name, None) if parent is not None else None


def _parameters_of(member: Any) -> set[str] | None:
    """The names of what a function takes; None where that cannot be told, as of what others have put in its place."""
    function = getattr(member, "__func__", member)  # of a static or class method
    try:
        parameters = inspect.signature(inspect.unwrap(function)).parameters
    except (TypeError, ValueError):
        return None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if takes_any else set(parameters)


@functools.cache
def _names_in(owner: Any) -> frozenset[str]:
    """All names of attributes in the code of a class and of those that it inherits from."""
    names: set[str] = set()
    for cls in owner.__mro__:
        for value in vars(cls).values():
            code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
            names.update(code.co_names if code is not None else ())
    return frozenset(names)
