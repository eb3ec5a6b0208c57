"""Files that are laid out at once and filled later are those that the libraries would have written."""

import threading
import zipfile

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from layup_hf.blocks import snapshot as snapshots
from layup_hf.blocks import split_into_blocks
from layup_hf.blocks.snapshot import Snapshot, owners_of
from layup_hf.trainer import hollow
from layup_hf.trainer.hollow import Deferral


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(hollow, "_SMALL", 1)
    monkeypatch.setattr(snapshots, "PIECE", 1000)


@pytest.fixture
def folders(tmp_path):
    for name in ("library", "checkpoint"):
        (tmp_path / name).mkdir()
    return tmp_path / "library", tmp_path / "checkpoint"


class Case:
    """A model with its optimizer, and a deferral of what is written to a folder."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(50, 60), nn.BatchNorm1d(60))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.step()
        owners = owners_of(self.model, split_into_blocks(self.model), self.optimizer.state)
        self.snapshot = Snapshot(owners)
        self.deferral = Deferral(folder, folder.parent / "parts", self.snapshot)

    def step(self):
        self.model(torch.randn(3, 50)).sum().backward()
        self.optimizer.step()

    def fill(self):
        """After training has gone on."""
        for block in (0, 1):
            self.snapshot.before_write(block)
        self.step()
        for file in self.deferral.files:
            file.fill(self.snapshot)


def test_a_file_of_safetensors_is_the_librarys_byte_for_byte(folders):
    library, checkpoint = folders
    case = Case(checkpoint)
    tensors = {
        **case.model.state_dict(),
        "b": torch.randn(3).bfloat16(),
        "é": torch.arange(5),
        "empty": torch.empty(0, 3),
    }
    tensors |= {"scalar": torch.tensor(1.5), "mask": torch.tensor([True]), "bytes": torch.arange(7, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, library / "model.safetensors", metadata={"format": "pt"})
    with case.deferral.deferring():
        safetensors.torch.save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert not (checkpoint / "model.safetensors").exists()
    case.fill()
    assert (checkpoint / "model.safetensors").read_bytes() == (library / "model.safetensors").read_bytes()


def test_a_file_of_torch_has_the_same_records_with_their_checksums(folders):
    library, checkpoint = folders
    case = Case(checkpoint)
    weight = case.model[0].weight.detach()
    content = {"optimizer": case.optimizer.state_dict(), "tied": [weight, weight[3:]], "empty": torch.empty(0)}
    content |= {"complex": torch.randn(40, dtype=torch.complex64), "plain": (1, "a")}
    torch.save(content, library / "optimizer.pt")
    with case.deferral.deferring():
        torch.save(content, checkpoint / "optimizer.pt")
    case.fill()
    records = []
    for folder in folders:
        with zipfile.ZipFile(folder / "optimizer.pt") as archive:
            assert archive.testzip() is None
            records.append({name: archive.read(name) for name in archive.namelist() if "serialization_id" not in name})
    assert records[0] == records[1]
    loaded = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert loaded["tied"][0].untyped_storage().data_ptr() == loaded["tied"][1].untyped_storage().data_ptr()
    assert (checkpoint / "optimizer.pt").stat().st_size == (library / "optimizer.pt").stat().st_size


def test_what_is_small_is_written_at_once(folders, monkeypatch):
    monkeypatch.setattr(hollow, "_SMALL", 1 << 20)
    case = Case(folders[1])
    with case.deferral.deferring():
        torch.save(case.optimizer.state_dict(), folders[1] / "optimizer.pt")
        safetensors.torch.save_file(case.model.state_dict(), folders[1] / "model.safetensors")
    assert not case.deferral.files
    torch.load(folders[1] / "optimizer.pt")
    safetensors.torch.load_file(folders[1] / "model.safetensors")


def test_what_is_not_known_goes_to_the_library_at_once(folders):
    library, checkpoint = folders
    case = Case(checkpoint)
    weight = case.model[0].weight.detach()
    with case.deferral.deferring():
        torch.save(weight, library / "elsewhere.pt")
        with (checkpoint / "opened.pt").open("wb") as file:
            torch.save(weight, file)
        torch.save(weight, checkpoint / "old.pt", _use_new_zipfile_serialization=False)
        safetensors.torch.save_file({"w": weight.to(torch.float8_e4m3fn)}, checkpoint / "fp8.safetensors")
        other = threading.Thread(target=torch.save, args=(weight, checkpoint / "thread.pt"))
        other.start()
        other.join()
        with pytest.raises((RuntimeError, SafetensorError), match="share memory"):
            safetensors.torch.save_file({"a": weight, "b": weight}, checkpoint / "tied.safetensors")
        with pytest.raises(ValueError, match="contiguous"):
            safetensors.torch.save_file({"a": weight.T}, checkpoint / "turned.safetensors")
    assert not case.deferral.files
    for place in (library / "elsewhere.pt", *(checkpoint / f"{name}.pt" for name in ("opened", "old", "thread"))):
        assert torch.equal(torch.load(place), weight)


def test_the_last_of_two_files_for_one_place_counts(folders):
    case = Case(folders[1])
    weight, place = case.model[0].weight.detach(), folders[1] / "model.safetensors"
    with case.deferral.deferring():
        safetensors.torch.save_file({"first": weight, "more": torch.zeros(3)}, place)
        safetensors.torch.save_file({"second": weight}, place)
    kept = weight.clone()
    case.fill()
    loaded = safetensors.torch.load_file(place)
    assert list(loaded) == ["second"]
    assert torch.equal(loaded["second"], kept)


def test_the_libraries_are_as_they_were_also_after_an_error(folders):
    before = torch.save, safetensors.torch.save_file
    case = Case(folders[1])

    def fail():
        with case.deferral.deferring():
            assert torch.save is not before[0]
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert (torch.save, safetensors.torch.save_file) == before
