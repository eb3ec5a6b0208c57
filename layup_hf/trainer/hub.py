"""What goes to the Hub: from snapshots, in the background, and again if it did not arrive."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers.trainer
from huggingface_hub import CommitInfo
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from .report import RunFacts, add_to_card

logger = logging.get_logger(__name__)

_SNAPSHOT = "_push-"  # the Trainer uploads nothing whose name begins with an underscore
_OWN = ("repo_id", "folder_path", "run_as_future")  # arguments of `upload_folder` that are chosen here
_LARGE = (".safetensors", ".pt")


@dataclass(frozen=True)
class _Upload:
    """A folder that is to be on the Hub.

    Attributes:
        folder: What is uploaded.
        checkpoint: A checkpoint whose files `folder` has, too; None if there is none.
        options: For `HfApi.upload_folder`.
    """

    folder: Path
    checkpoint: Path | None
    options: dict[str, Any]

    @classmethod
    def of(cls, call: dict[str, Any], checkpoint: Path | None = None) -> _Upload:
        """What the Trainer wants to upload by this call of `upload_folder`."""
        options = {name: value for name, value in call.items() if name not in _OWN}
        return cls(Path(call["folder_path"]), checkpoint, options)

    @property
    def place(self) -> str:
        """Where in the repository; empty for the model itself."""
        return self.options.get("path_in_repo") or ""

    def snapshot(self, parent: str) -> tempfile.TemporaryDirectory:
        """The folder as it is now. Training goes on to write there, and deletes old checkpoints, during the upload.

        The large files of a checkpoint are linked: they are only ever deleted or replaced, never written to.
        """
        snapshot = tempfile.TemporaryDirectory(prefix=_SNAPSHOT, dir=parent)
        walk = os.walk(self.folder)  # minds no folder that another thread deletes meanwhile, such as a snapshot
        files = [os.path.relpath(Path(root, name), self.folder) for root, _, names in walk for name in names]
        ignored = [*self.options.get("ignore_patterns", []), *DEFAULT_IGNORE_PATTERNS]
        for file in filter_repo_objects(files, ignore_patterns=ignored):
            target = Path(snapshot.name, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.checkpoint is not None and file.endswith(_LARGE):
                with contextlib.suppress(OSError):  # not in the checkpoint, or the file system has no links
                    os.link(self.checkpoint / file, target)
                    continue
            shutil.copy(self.folder / file, target)
        return snapshot


class HubPushes:
    """How a `Trainer` pushes to the Hub without letting the Hub disturb training. To be mixed in before it.

    What is pushed when, under which name and with which message is the Trainer's. What differs:

    - What is uploaded in the background is a snapshot, so that every commit holds one step.
    - A push that fails is reported at once, and made up for by the next one, with every checkpoint that is still on
      disk; after the last step of training once without being asked. No failure ends training.
    - A repository that cannot be created when the trainer is made is created by the next push.
    - The model card has a section about the workers.
    """

    hub_model_id: str | None
    push_in_progress: PushInProgress | None = None
    _ends_early = False  # the machine is about to be taken away
    _facts: RunFacts | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._missed: dict[str, _Upload] = {}  # by place: what did not arrive, and is not on its way again
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or say that it could not be created: every push tries again.

        Raises:
            HFValidationError: No repository can have this name.
        """
        if not self.is_world_process_zero():
            return
        for left in Path(self.args.output_dir).glob(f"{_SNAPSHOT}*"):  # by a run that was killed
            hf_api().run_as_future(shutil.rmtree, left, ignore_errors=True)  # after what this process still uploads
        self._repo_options = {
            "token": self.args.hub_token if token is None else token,
            "private": self.args.hub_private_repo if private is None else private,
        }
        try:
            self._create_repo()
        except HFValidationError:
            raise
        except Exception as error:
            logger.warning(
                f"The repository {self._repo_name} cannot be created: {_one_line(error)} Training goes on, and every "
                f"push tries again.{_advice(error, self._repo_name)}"
            )

    @property
    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _create_repo(self) -> None:
        self.hub_model_id = hf_api().create_repo(self._repo_name, exist_ok=True, **self._repo_options).repo_id

    # ---- When to push ----

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a complete checkpoint from rank 0 in the background, as `hub_strategy` has it."""
        started: dict[str, Future] = {}

        def start(**call: Any) -> Future:
            upload = _Upload.of(call, Path(checkpoint_folder))
            started[upload.place] = self._start(upload)
            return started[upload.place]

        with _uploading_by(start):
            super()._push_from_checkpoint(checkpoint_folder)
        if started:
            self.push_in_progress.jobs.extend(self._start_missed(superseded=started))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> CommitInfo | Future | None:
        """As the Trainer's, and with what earlier pushes did not bring.

        Raises:
            Exception: Whatever kept the model from the Hub, with `blocking=True`. It is saved in `output_dir` then.
        """

        def send(**call: Any) -> CommitInfo | Future:
            upload = _Upload.of(call)
            if call["run_as_future"]:
                return self._start(upload)
            try:
                return self._send(upload, upload.folder)
            except Exception as error:
                error.add_note(f"The model is saved in {upload.folder}. Call push_to_hub() again to push it.")
                raise

        with _uploading_by(send):
            pushed = super().push_to_hub(*args, **kwargs)
        if self.is_world_process_zero():
            jobs = [pushed] if isinstance(pushed, Future) else []
            self.push_in_progress = PushInProgress([*jobs, *self._start_missed(superseded={""})])
            if not jobs:
                self._finish_current_push()
        return pushed

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)  # waits for the push in progress
        if self._missed and not self._ends_early:
            self.push_in_progress = PushInProgress(self._start_missed())
            self._finish_current_push()
        return output

    # ---- How to push ----

    def _start(self, upload: _Upload) -> Future:
        """Upload a snapshot in the background, after all others that were started before."""
        self._missed.pop(upload.place, None)
        try:
            snapshot = upload.snapshot(self.args.output_dir)
        except OSError as error:
            self._remember(upload, error)
            job = Future()
            job.set_exception(error)
            return job
        return hf_api().run_as_future(self._send_snapshot, upload, snapshot)

    def _start_missed(self, superseded: Collection[str] = ()) -> list[Future]:
        """Upload what earlier pushes did not bring, but for the places that are being pushed anyway."""
        jobs = []
        for place, upload in sorted(self._missed.items()):  # the model first
            if place in superseded:
                continue
            if upload.folder.is_dir():
                jobs.append(self._start(upload))
            else:
                self._missed.pop(place)
                logger.warning(
                    f"{upload.folder} has been deleted before it could be pushed to {self._repo_name}. Raise "
                    "`save_total_limit` if every checkpoint is to be on the Hub."
                )
        return jobs

    def _send_snapshot(self, upload: _Upload, snapshot: tempfile.TemporaryDirectory) -> CommitInfo | None:
        with snapshot:
            if upload.place and "" in self._missed:  # the model has just failed, and been reported
                self._missed[upload.place] = upload
                return None
            try:
                return self._send(upload, snapshot.name)
            except Exception as error:
                self._remember(upload, error)
                raise

    def _send(self, upload: _Upload, folder: str | Path) -> CommitInfo:
        if self.hub_model_id is None:
            self._create_repo()
        info = hf_api().upload_folder(repo_id=self.hub_model_id, folder_path=folder, **upload.options)
        self._missed.pop(upload.place, None)
        return info

    def _remember(self, upload: _Upload, error: Exception) -> None:
        self._missed[upload.place] = upload
        kept = [folder for folder in (upload.checkpoint, upload.folder) if folder is not None and folder.is_dir()]
        safe = f"It is safe on disk, in {kept[0]}. " if kept else ""
        logger.warning(
            f"{upload.place or 'The model'} could not be pushed to {self._repo_name} "
            f"({upload.options['commit_message']}): {_one_line(error)} {safe}The next push, by the next save or by "
            f"push_to_hub(), brings everything that is missing.{_advice(error, self._repo_name)}"
        )

    # ---- The model card ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with a section about the workers if there has been training."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self._facts is not None:
            card = Path(self.args.output_dir, "README.md")
            card.write_text(add_to_card(card.read_text(encoding="utf-8"), self._facts), encoding="utf-8")


@contextlib.contextmanager
def _uploading_by(upload_folder: Callable[..., CommitInfo | Future]) -> Iterator[None]:
    """Let what the Trainer uploads go through this function, which gets the arguments of `HfApi.upload_folder`."""
    original = transformers.trainer.hf_api
    transformers.trainer.hf_api = lambda: SimpleNamespace(upload_folder=upload_folder)
    try:
        yield
    finally:
        transformers.trainer.hf_api = original


def _one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text += f" ({error.__cause__})"
    return " ".join(text.split()).removesuffix(".") + "."


def _advice(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status not in (401, 403):
        return ""
    return f" The Hub denies the token: check that `hub_token`, or HF_TOKEN, may write to {repo}."
