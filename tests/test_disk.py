"""What is said when a file cannot be written is what is wrong there: real file systems, where this may mount them."""

import errno
import os
import resource
import subprocess
from contextlib import contextmanager

import pytest
import torch
from mounting import can_mount, mounted
from safetensors.torch import save_file

from layup_hf.disk import nearest, remedy, try_to_write, why_not_written

needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
LARGE = {"weight": torch.zeros(1 << 19)}  # 2 MiB
WRITERS = {
    "torch": lambda file: torch.save(LARGE, file),
    "safetensors": lambda file: save_file(LARGE, file),
    "Python": lambda file: file.write_bytes(bytes(1 << 21)),
}


@needs_mounts
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("options", "said"), [("size=512k", "the disk is full"), ("ro", "the file system is read-only")]
)
def test_a_file_system_says_why_it_takes_nothing(tmp_path, writer, options, said):
    with mounted(tmp_path / "disk", options) as folder:
        with pytest.raises(Exception) as error:  # noqa: PT011 # each library has its own
            WRITERS[writer](folder / "file")
        assert why_not_written(error.value, folder).startswith(said)
        assert why_not_written(error.value, folder / "to" / "be" / "made").startswith(said)


@needs_mounts
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_system_without_room_for_another_file_is_full(tmp_path, writer):
    with mounted(tmp_path / "disk", "nr_inodes=2") as folder:
        (folder / "first").write_text("")
        with pytest.raises(Exception) as error:  # noqa: PT011
            WRITERS[writer](folder / "file")
        assert "`df -i`" in why_not_written(error.value, folder)


@contextmanager
def limited(kind, number):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_too_many_open_files(tmp_path):
    with limited(resource.RLIMIT_NOFILE, 8), pytest.raises(OSError, match="Too many open files") as error:
        _ = [(tmp_path / str(number)).open("w") for number in range(1000)]
    assert why_not_written(error.value, tmp_path) == remedy(errno.EMFILE)
    assert "ulimit -n" in remedy(errno.EMFILE)


def test_a_file_that_may_not_be_so_large(tmp_path):
    with limited(resource.RLIMIT_FSIZE, 1 << 16), pytest.raises(OSError, match="File too large") as error:
        WRITERS["Python"](tmp_path / "file")
    assert why_not_written(error.value, tmp_path).startswith("a file there may not be so large")


@pytest.fixture
def other_user():
    """For the time of the test this process has no privilege, if it had any."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield
    if os.getuid() == 0:
        os.seteuid(0)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_of_another_user(tmp_path, request, writer):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for above in (tmp_path, *tmp_path.parents[:2]):
        above.chmod(0o755)
    folder.chmod(0o555)
    request.getfixturevalue("other_user")
    with pytest.raises(Exception) as error:  # noqa: PT011
        WRITERS[writer](folder / "file")
    assert why_not_written(error.value, folder).startswith("this user may not write there")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to protect a file")
def test_a_protected_folder(tmp_path):
    folder = tmp_path / "protected"
    folder.mkdir()
    if subprocess.run(["chattr", "+i", folder], check=False, capture_output=True).returncode != 0:
        pytest.skip("this file system protects nothing")
    try:
        with pytest.raises(PermissionError) as error:
            (folder / "file").write_text("x")
        assert "`lsattr`" in why_not_written(error.value, folder)
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as error:
        WRITERS["Python"](tmp_path / "file" / "model")
    assert why_not_written(error.value, tmp_path).startswith("a file is where a folder should be")


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EDQUOT, "your share"), (errno.ESTALE, "mount it again"), (errno.EIO, "`dmesg`"), (errno.EPIPE, "Broken")],
)
def test_what_cannot_be_made_here_is_told_by_its_number(tmp_path, number, said):
    assert said in why_not_written(OSError(number, "text"), tmp_path)
    assert said in why_not_written(RuntimeError(f"I/O error: text (os error {number})"), tmp_path)
    error = ValueError("no more")
    error.__cause__ = OSError(number, "text")
    assert said in why_not_written(error, tmp_path)


def test_what_is_not_the_disks_fault_is_not_told_as_such(tmp_path):
    assert why_not_written(ValueError("a callback's"), tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_trial_leaves_nothing_behind(tmp_path):
    try_to_write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert nearest(tmp_path / "a" / "b") == tmp_path
