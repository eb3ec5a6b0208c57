"""File systems of a test's own."""

import functools
import os
import subprocess
import tempfile
from contextlib import contextmanager


@functools.cache
def can_mount():
    """Whether this process may."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        mounts = ["mount", "-t", "tmpfs", "tmpfs", folder]
        if subprocess.run(mounts, capture_output=True, check=False).returncode != 0:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@contextmanager
def mounted(folder, options):
    """A file system in memory, with these options, at a folder that is made."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
