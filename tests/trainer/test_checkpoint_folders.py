"""Whose folder a checkpoint is written into: one that all workers share, or one of each machine."""

import shutil
import time
from types import SimpleNamespace

import pytest
from fleet import gather_between_threads, together

from layup_hf.trainer.folders import UNFINISHED, SharedFolder, clear, publish
from layup_hf.trainer.restoring import Restoring
from layup_hf.trainer.state import RunState


def write_and_compare(folders, late=0.0):
    """Workers write a file each, and then see whether rank 0 has them all; the last one writes `late` seconds later."""
    for_rank = gather_between_threads(len(folders))

    def work(rank):
        host = SimpleNamespace(args=SimpleNamespace(should_save=rank == 0), rank=rank, is_first=rank == 0)
        folder = SharedFolder(host, SimpleNamespace(gather=for_rank(rank)))
        aside = folders[rank] / UNFINISHED / "checkpoint-5"
        aside.mkdir(parents=True, exist_ok=True)
        if rank == len(folders) - 1:
            time.sleep(late)
        (aside / f"optimizer_{rank}.pt").touch()
        apart = folder.require(aside)
        return folder.has_warned, apart

    return together([lambda rank=rank: work(rank) for rank in range(len(folders))])


def written(folder):
    return {path.name for path in (folder / UNFINISHED).rglob("*.pt")}


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_a_folder_that_all_share_keeps_what_each_has_written(tmp_path, late):
    assert write_and_compare([tmp_path] * 3, late) == [(False, [])] * 3
    assert written(tmp_path) == {"optimizer_0.pt", "optimizer_1.pt", "optimizer_2.pt"}


def test_what_lies_apart_from_rank_0_is_said_and_cleared_away(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    assert write_and_compare([here, here, there]) == [(True, [2]), (False, [2]), (False, [2])]
    assert written(here) == {"optimizer_0.pt", "optimizer_1.pt"}
    assert not (there / UNFINISHED).exists()


def test_a_worker_that_joins_leaves_alone_what_the_others_are_writing(tmp_path):
    (tmp_path / UNFINISHED / "checkpoint-5").mkdir(parents=True)
    state = RunState(is_outside=True)
    host = SimpleNamespace(args=SimpleNamespace(should_save=True), output_dir=lambda trial: str(tmp_path))
    restoring = Restoring(host, state, collectives=None)
    restoring.resume(None, None)
    assert (tmp_path / UNFINISHED / "checkpoint-5").exists()
    state.is_outside = False
    restoring.resume(None, None)
    assert not (tmp_path / UNFINISHED).exists()


def test_what_is_being_cleared_away_gets_no_name_any_more(tmp_path, monkeypatch):
    """The worker that was to complete it is only slow, and comes in the middle."""
    (tmp_path / UNFINISHED / "checkpoint-5").mkdir(parents=True)
    remove, late = shutil.rmtree, []

    def interrupted(folder, **options):
        late.append(folder)
        with pytest.raises(FileNotFoundError):
            publish(tmp_path, "checkpoint-5")
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    clear(tmp_path)
    assert late == [tmp_path / UNFINISHED]
    assert list(tmp_path.iterdir()) == []
