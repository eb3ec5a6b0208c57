"""Workers that are started by something else than `accelerate launch`."""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from launching import SCRIPTS, environment_of, processes_with

SCRIPT = str(SCRIPTS / "launched.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def start(tmp_path):
    """Runs commands at the same time, and gives what their workers have to say, in the order of ranks."""
    name, temporary = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="layup-"))

    def run(commands, environments=({},)):
        base = {**environment_of(name, tmp_path, temporary), "LAYUP_TOKEN": "a-secret"}
        logs = [tmp_path / f"log-{number}.txt" for number in range(len(commands))]
        started = []
        for command, log, environment in zip(commands, logs, environments, strict=True):
            with log.open("w") as file:
                whole = base | environment
                started.append(subprocess.Popen(command, env=whole, stdout=file, stderr=subprocess.STDOUT))
        codes = [process.wait(280) for process in started]
        assert codes == [0] * len(commands), "\n----\n".join(log.read_text()[-4000:] for log in logs)
        return [json.loads(file.read_text()) for file in sorted(tmp_path.glob("result-*.json"))]

    yield run
    for process in processes_with("LAYUP_TEST_RUN", name):
        process.kill()
    shutil.rmtree(temporary)


def assert_trained(results, launches):
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        assert result["workers"] == 2
        assert result["launches"] == launches
        assert result["has_lease"] == (launches > 1)  # nobody ends the others then
        assert bool(result["interface"]) == (launches > 1)
        assert result["global_step"] == 8
        assert result["merges"] > 0
        assert result["mass"] == 2.0
        assert result["same"]
    assert len({result["eval_loss"] for result in results}) == 1


def test_the_notebook_launcher(start, tmp_path):
    assert_trained(start([[sys.executable, SCRIPT, str(tmp_path), "notebook", free_port()]]), launches=1)


def test_torchrun_on_each_of_two_nodes_as_in_a_batch_script(start, tmp_path):
    """`srun torchrun --nnodes $SLURM_NNODES --rdzv_backend c10d --rdzv_endpoint $head:$port ...`"""
    place = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=7", "--rdzv_backend=c10d"]
    place += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    command = [*TORCHRUN, *place, SCRIPT, str(tmp_path)]
    environments = [slurm(node) for node in range(2)]
    assert_trained(start([command] * 2, environments), launches=2)


def test_srun_starts_each_worker_itself(start, tmp_path):
    """`export MASTER_ADDR=...; srun python script.py`, with RANK and the others from what Slurm says."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    environments = [slurm(rank) | place | {"RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(2)]
    assert_trained(start([[sys.executable, SCRIPT, str(tmp_path)]] * 2, environments), launches=2)


def test_ray_train_and_its_report_callback(start, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (`.ci/versions Ray` has it)")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}
    results = start([[sys.executable, SCRIPT, str(tmp_path), "ray"]], [quiet])
    assert_trained(results, launches=1)
    reported = json.loads((tmp_path / "reported.json").read_text())
    assert reported["step"] == 8
    assert reported["eval_loss"] == results[0]["eval_loss"]  # of the model that all agree on
    assert {"model.safetensors", "optimizer.pt", "optimizer_1.pt", "trainer_state.json"} <= set(reported["saved"])


def slurm(rank):
    """What `srun` sets for one of two tasks, each on a node of its own."""
    here = {"SLURM_NODEID": str(rank), "SLURM_LOCALID": "0", "SLURM_PROCID": str(rank)}
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"}
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    return {**here, **step, **job}
