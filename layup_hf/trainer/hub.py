"""What goes to the Hub: from snapshots, in the background, and again if it did not arrive."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .compat import uploading_by
from .host import Host
from .report import add_to_card
from .state import RunState

logger = logging.get_logger(__name__)

_SNAPSHOT = "_push-"  # the Trainer uploads nothing whose name begins with an underscore
_OWN = ("repo_id", "folder_path", "run_as_future")  # arguments of `upload_folder` that are chosen here
_LARGE = (".safetensors", ".pt")


@dataclass(frozen=True)
class Upload:
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
    def of(cls, call: dict[str, Any], checkpoint: Path | None = None) -> Upload:
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
    """Pushes to the Hub without letting the Hub disturb training.

    What is pushed when, under which name and with which message is the Trainer's. What differs:

    - What is uploaded in the background is a snapshot, so that every commit holds one step.
    - A push that fails is reported at once, and made up for by the next one, with every checkpoint that is still on
      disk; after the last step of training once without being asked. No failure ends training.
    - A repository that cannot be created when the trainer is made is created by the next push.
    - The model card has a section about the workers.

    Attributes:
        missed: By place in the repository: what did not arrive, and is not on its way again.
    """

    def __init__(self, host: Host, state: RunState) -> None:
        self._host, self._state = host, state
        self._repo_options: dict[str, Any] = {}
        self.missed: dict[str, Upload] = {}

    # ---- The repository ----

    def find_repo(self, token: str | None, private: bool | None) -> None:
        """Create the repository, or say that it could not be created: every push tries again.

        Raises:
            HFValidationError: No repository can have this name.
        """
        args = self._host.args
        if not self._host.is_first:
            return
        for left in Path(self._host.folder).glob(f"{_SNAPSHOT}*"):  # by a run that was killed
            _api().run_as_future(shutil.rmtree, left, ignore_errors=True)  # after what this process still uploads
        self._repo_options = {
            "token": args.hub_token if token is None else token,
            "private": args.hub_private_repo if private is None else private,
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
        args = self._host.args
        return self._host.hub_model_id or args.hub_model_id or Path(self._host.folder).absolute().name

    def _create_repo(self) -> str:
        repo = _api().create_repo(self._repo_name, exist_ok=True, **self._repo_options)
        self._host.hub_model_id = name = repo.repo_id
        return name

    # ---- When to push ----

    def push_checkpoint(self, checkpoint_folder: str, stock: Callable[[str], None]) -> None:
        """Push a complete checkpoint from rank 0 in the background, as `hub_strategy` has it.

        Args:
            checkpoint_folder: The checkpoint.
            stock: The Trainer's own way to push it.
        """
        started: dict[str, Future] = {}

        def start(**call: Any) -> Future:
            upload = Upload.of(call, Path(checkpoint_folder))
            started[upload.place] = self.start(upload)
            return started[upload.place]

        with uploading_by(start):
            stock(checkpoint_folder)
        if started:
            push = self._host.push_in_progress
            assert push is not None  # the Trainer's own code has just begun it
            push.jobs = [*push.jobs, *self.start_missed(superseded=started)]  # type: ignore[misc] # it is a list

    def push_model(self, stock: Callable[[], CommitInfo | Future | None]) -> CommitInfo | Future | None:
        """As the Trainer's `push_to_hub`, and with what earlier pushes did not bring.

        Raises:
            Exception: Whatever kept the model from the Hub, with `blocking=True`. It is saved in `output_dir` then.
        """

        def send(**call: Any) -> CommitInfo | Future:
            upload = Upload.of(call)
            if call["run_as_future"]:
                return self.start(upload)
            try:
                return self._send(upload, upload.folder)
            except Exception as error:
                error.add_note(f"The model is saved in {upload.folder}. Call push_to_hub() again to push it.")
                raise

        with uploading_by(send):
            pushed = stock()
        if self._host.is_first:
            jobs = [pushed] if isinstance(pushed, Future) else []
            self._host.push_in_progress = _in_progress([*jobs, *self.start_missed(superseded={""})])
            if not jobs:
                self._host.wait_for_pushes()
        return pushed

    def bring_missing(self) -> None:
        """After training: push once more what has not arrived, unless the machine is about to be taken away."""
        if self.missed and not self._state.ends_early:
            self._host.push_in_progress = _in_progress(self.start_missed())
            self._host.wait_for_pushes()

    # ---- How to push ----

    def start(self, upload: Upload) -> Future:
        """Upload a snapshot in the background, after all others that were started before."""
        self.missed.pop(upload.place, None)
        try:
            snapshot = upload.snapshot(self._host.folder)
        except OSError as error:
            self._remember(upload, error)
            job: Future = Future()
            job.set_exception(error)
            return job
        return _api().run_as_future(self._send_snapshot, upload, snapshot, self._host.keepalive())

    def start_missed(self, superseded: Collection[str] = ()) -> list[Future]:
        """Upload what earlier pushes did not bring, but for the places that are being pushed anyway."""
        jobs = []
        for place, upload in sorted(self.missed.items()):  # the model first
            if place in superseded:
                continue
            if upload.folder.is_dir():
                jobs.append(self.start(upload))
            else:
                self.missed.pop(place)
                logger.warning(
                    f"{upload.folder} has been deleted before it could be pushed to {self._repo_name}. Raise "
                    "`save_total_limit` if every checkpoint is to be on the Hub."
                )
        return jobs

    def _send_snapshot(
        self, upload: Upload, snapshot: tempfile.TemporaryDirectory, trainer: object
    ) -> CommitInfo | None:
        with snapshot:  # `trainer` is to live until this has ended
            if upload.place and "" in self.missed:  # the model has just failed, and been reported
                self.missed[upload.place] = upload
                return None
            try:
                return self._send(upload, snapshot.name)
            except Exception as error:
                self._remember(upload, error)
                raise

    def _send(self, upload: Upload, folder: str | Path) -> CommitInfo:
        repo = self._host.hub_model_id or self._create_repo()
        info = _api().upload_folder(repo_id=repo, folder_path=folder, **upload.options)
        self.missed.pop(upload.place, None)
        return info

    def _remember(self, upload: Upload, error: Exception) -> None:
        self.missed[upload.place] = upload
        kept = [folder for folder in (upload.checkpoint, upload.folder) if folder is not None and folder.is_dir()]
        safe = f"It is safe on disk, in {kept[0]}. " if kept else ""
        logger.warning(
            f"{upload.place or 'The model'} could not be pushed to {self._repo_name} "
            f"({upload.options['commit_message']}): {_one_line(error)} {safe}The next push, by the next save or by "
            f"push_to_hub(), brings everything that is missing.{_advice(error, self._repo_name)}"
        )

    # ---- The model card ----

    def add_to_card(self) -> None:
        """Put a section about the workers into the model card, if there has been training."""
        if self._host.is_first and self._state.facts is not None:
            card = Path(self._host.folder, "README.md")
            card.write_text(add_to_card(card.read_text(encoding="utf-8"), self._state.facts), encoding="utf-8")


@functools.cache
def _api() -> HfApi:
    """One for the process: it works off what is done in the background one after the other."""
    return HfApi(library_name="transformers", library_version=transformers.__version__)


def _in_progress(jobs: list[Future]) -> PushInProgress:
    push = PushInProgress()
    push.jobs = jobs
    return push


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
