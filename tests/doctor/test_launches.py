"""The command as it is typed: one process, `accelerate launch`, two machines. All of it runs at once."""

import re
import subprocess
import sys

import pytest
from launching import environment_of, processes_with

from recipes.measure.common import lab as lab_module
from recipes.measure.common.lab import Lab

LACKS_A_SEAM = "import transformers.trainer, transformers.trainer_utils as utils\ndel utils.sort_checkpoints\n"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(exit code, output) of each launch, by name."""
    folder = tmp_path_factory.mktemp("launches")
    (folder / "lacking").mkdir()
    (folder / "lacking/sitecustomize.py").write_text(LACKS_A_SEAM)
    environment = environment_of(folder.name, folder, folder)
    lacking = {**environment, "PYTHONPATH": f"{folder / 'lacking'}:{environment['PYTHONPATH']}"}
    doctor = ["-m", "layup_hf", f"--output_dir={folder}"]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    running, logs = {}, {}

    def start(name, command, environment=environment):
        logs[name] = folder / f"{name}.txt"
        with logs[name].open("w") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": folder}
            running[name] = subprocess.Popen([sys.executable, *command], env=environment, **options)

    try:
        start("lacking", doctor, lacking)
        start("two", [*launcher, *doctor])
        if lab_module.missing() is None:
            with Lab(2, "100mbit") as lab:
                for host in lab.hosts:
                    logs[host.index] = folder / f"{host.index}.txt"
                    with logs[host.index].open("w") as log:
                        options = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": folder, "hosts": [host]}
                        given = {**environment, "LAYUP_TOKEN": "a secret"}
                        (running[host.index],) = lab.launch(
                            "layup_hf", [f"--output_dir={folder}"], env=given, **options
                        )
                return wait(running, logs)
        return wait(running, logs)
    finally:
        for process in processes_with("LAYUP_TEST_RUN", folder.name):
            process.kill()


def wait(running, logs):
    codes = {name: process.wait(120) for name, process in running.items()}
    return {name: (code, logs[name].read_text(errors="replace")) for name, code in codes.items()}


def test_one_process_that_lacks_a_seam(launched):
    """The package cannot be imported, and the rest is looked at all the same."""
    code, output = launched["lacking"]
    assert code == 1
    assert output.startswith("LayUp, looked at by one process (for several,")
    assert "Traceback" not in output
    assert "ERROR   versions   layup_hf does not work with transformers" in output
    assert re.search(r"  ok      disk       \S+ can be written", output)
    assert output.rstrip().endswith("Training would not work here: see versions.")


def test_two_workers(launched):
    code, output = launched["two"]
    assert code == 0, output
    assert output.count("LayUp, looked at by 2 workers on 1 host(s), started by 1 launch(es):") == 1
    assert "ok      exchange   peers read each other's memory in place: offered, merged, mass exact" in output
    assert "ok      store      answers in" in output


@pytest.mark.skipif(lab_module.missing() is not None, reason=str(lab_module.missing()))
def test_two_machines(launched):
    code, output = launched[0]
    assert code == 0, output
    assert launched[1][0] == 0, launched[1][1]
    assert "LayUp, looked at by 2 workers on 2 host(s), started by 2 launch(es):" in output
    assert "looked at" not in launched[1][1]
    assert "ok      interface  rank 0: e0 (10.199.0.1)" in output
    assert "ok      interface  rank 1: e0 (10.199.0.2)" in output
    assert "ok      secret     LAYUP_TOKEN is set, and the same everywhere" in output
    assert "a secret" not in output.replace("same secret", "")
    assert "ok      exchange   peers send each other blocks by NIXL: offered, merged, mass exact" in output
    rate = float(re.search(r"network    (\S+) Mbit/s", output)[1])
    assert 40 < rate < 130  # of 100; it crosses the cable of the lab, not memory
