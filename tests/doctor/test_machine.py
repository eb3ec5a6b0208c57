"""What is said of a machine's memory, files and disk."""

import resource

import pytest

from layup_hf.doctor import machine

GIGABYTE = 2**30
FREE = "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n"


def put(root, **files):
    for path, text in {"proc/meminfo": FREE, "proc/self/cgroup": "0::/\n", **files}.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_without_a_limit_memory_is_that_of_the_machine(tmp_path):
    put(tmp_path, **{"sys/fs/cgroup/memory.stat": "inactive_file 0\n"})
    (found,) = machine.check_memory(2, tmp_path)
    assert found.level == "ok"
    assert found.text.startswith("17 GB for each worker (of 68.7 GB in the machine): room for 1.4 billion parameters")


@pytest.mark.parametrize("place", ["", "/job", "/job/step"])
def test_the_narrowest_control_group_counts(tmp_path, place):
    """Of the second kind; what is cached of files can be given up."""
    put(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/step/memory.current": "0\n",
            f"sys/fs/cgroup{place}/memory.max": f"{8 * GIGABYTE}\n",
            f"sys/fs/cgroup{place}/memory.current": f"{4 * GIGABYTE}\n",
            f"sys/fs/cgroup{place}/memory.stat": f"anon 1\ninactive_file {2 * GIGABYTE}\n",
        },
    )
    (found,) = machine.check_memory(2, tmp_path)
    assert found.text.startswith("3 GB for each worker (limit of the container or job: 8.59 GB)")


def test_control_groups_of_the_first_kind(tmp_path):
    put(
        tmp_path,
        **{
            "proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/job\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GIGABYTE}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GIGABYTE // 2}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        },
    )
    (found,) = machine.check_memory(2, tmp_path)
    assert found.level == "warning"
    assert found.text.startswith("0.3 GB for each of 2 worker(s) on this machine (limit of the container or job: 1.07")
    assert "start fewer workers" in found.remedy


def test_there_is_a_folder_for_shared_memory_or_not(tmp_path):
    (found,) = machine.check_shared_memory_folder(tmp_path / "none")
    assert found.level == "warning"
    assert "cannot be used (No such file or directory)" in found.text


def test_a_directory_that_is_to_be_made(tmp_path):
    wanted = tmp_path / "a/b"
    (found,) = machine.check_disk(wanted)
    assert found.level in ("ok", "warning")  # as this machine's disk is
    assert found.text.startswith(f"{wanted}, which is to be made in {tmp_path}, can be written")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "model").write_text("")
    (found,) = machine.check_disk(tmp_path / "model")
    assert found.level == "error"
    assert found.remedy.startswith("a file is where a folder should be")
    assert found.remedy.endswith("; or choose another `output_dir`")
    assert found.text.endswith("cannot be written: it is a file")


@pytest.mark.parametrize(
    ("limit", "highest", "workers", "level", "remedy"),
    [
        (65536, 65536, 4, "ok", ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 4, "ok", ""),
        (512, 4096, 4, "warning", "`ulimit -n 4096` before the launch"),
        (100, resource.RLIM_INFINITY, 4, "error", "`ulimit -n 65536` before the launch"),
        (512, 512, 64, "error", "let it be 65536: in /etc/security/limits.conf, or `docker run --ulimit nofile=...`"),
        (1024, 4096, 200, "error", "`ulimit -n 4096` before the launch"),
        (1024, 4096, 64, "ok", ""),
    ],
)
def test_open_files(monkeypatch, limit, highest, workers, level, remedy):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, highest))
    (found,) = machine.check_files(workers, has_rdma=False)
    assert (found.level, found.remedy) == (level, remedy)


def test_locked_memory_matters_where_there_is_rdma(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    found = machine.check_files(2, has_rdma=True)[1]
    assert found.level == "warning"
    assert found.text.startswith("only 65.5 kB of memory may be locked")
