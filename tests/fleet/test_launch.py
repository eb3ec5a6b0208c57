"""What is settled before the process group is made: the interface, and whether a worker joins a running job."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from layup_hf import LayupConfig
from layup_hf.fleet.job import Job, start_keeper
from layup_hf.fleet.launch import has_joined, prepare_launch
from layup_hf.fleet.secret import draw_token
from layup_hf.fleet.started import launches
from layup_hf.fleet.store import WORKERS
from layup_hf.trainer.members import Members
from layup_hf.trainer.options import Options
from layup_hf.trainer.state import RunState

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES")


@pytest.fixture
def launcher(monkeypatch):
    """The store of one of several launches, whose process group is not really made: that it would be is noted."""
    server, made = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is put back afterwards
        monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: made.append(options))
    yield SimpleNamespace(store=PrefixStore("layup_hf", server), made=made)
    del server


@pytest.fixture
def job(launcher):
    """One that has begun, as its launcher knows, and has a worker."""
    token = draw_token()
    job = Job(*start_keeper("127.0.0.1", token, is_open=True), workers=3, run="run", lease_seconds=2.0)
    job.announce(token, launcher.store)
    store = job.connect()
    store.add(WORKERS, 1)
    yield job
    del store


@pytest.fixture(autouse=True)
def nothing_is_joined_afterwards():
    yield
    has_joined(SimpleNamespace())


def prepare(**options):
    arguments = SimpleNamespace(**{"join": None, "network_interface": None, "use_cpu": True, **options})
    prepare_launch(arguments)
    return arguments


def is_alone(launcher):
    return [(options["rank"], options["world_size"]) for options in launcher.made] == [(0, 1)]


def test_the_first_launches_join_nothing(launcher):
    assert prepare().job_to_join is None
    assert not launcher.made
    assert len({os.environ[variable] for variable in VARIABLES}) == 1  # but have chosen an interface


def test_a_launch_that_is_repeated_joins_and_is_alone_until_then(launcher, job):
    assert prepare().job_to_join == job
    assert is_alone(launcher)


def test_every_configuration_of_a_process_joins_until_it_has_joined(launcher, job, monkeypatch):
    monkeypatch.delenv("GROUP_WORLD_SIZE")
    place = f"127.0.0.1:{job.port}"
    prepare(join=place)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    second = prepare(join=place)
    assert second.job_to_join == job
    has_joined(second)
    assert second.job_to_join is None
    assert prepare().job_to_join is None


def test_one_more_worker_joins_where_it_is_told(launcher, job, monkeypatch):
    for variable in ("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable)
    assert prepare(join=f"127.0.0.1:{job.port}").job_to_join == job
    assert is_alone(launcher)


def test_a_job_whose_workers_have_left_is_not_joined(launcher, job):
    job.connect().add(WORKERS, -1)
    assert prepare().job_to_join is None
    assert not launcher.made


@pytest.mark.timeout(30)
def test_a_job_whose_store_is_gone_is_not_joined_and_not_waited_for(launcher):
    before, token = set(psutil.Process().children()), draw_token()
    place = start_keeper("127.0.0.1", token, is_open=True)
    Job(*place, workers=3, run="run", lease_seconds=2.0).announce(token, launcher.store)
    (keeper,) = set(psutil.Process().children()) - before
    keeper.kill()
    keeper.wait(10)
    assert prepare().job_to_join is None
    assert not launcher.made


def test_one_launch_asks_nobody(monkeypatch):
    for variable in ("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    assert prepare(network_interface="eth99").job_to_join is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"GROUP_WORLD_SIZE": "3", "SLURM_PROCID": "0", "SLURM_NNODES": "2", "WORLD_SIZE": "6"}, 3),
        ({"SLURM_PROCID": "0", "SLURM_NNODES": "2", "WORLD_SIZE": "4"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "1", "WORLD_SIZE": "4"}, 1),
        ({"SLURM_PROCID": "0", "SLURM_NNODES": "4"}, 1),  # a script alone, in an allocation
        ({"SLURM_NNODES": "4", "WORLD_SIZE": "4"}, 1),  # not by `srun`
    ],
)
def test_who_has_started_the_workers_is_seen(monkeypatch, environment, expected):
    for variable in ("GROUP_WORLD_SIZE", "SLURM_PROCID", "SLURM_NNODES", "SLURM_STEP_NUM_NODES", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert launches() == expected


@pytest.mark.timeout(30)
def test_where_rank_0_keeps_the_store_nobody_waits_for_it_before_there_is_one(launcher, job, monkeypatch):
    """As with `srun python script.py`: the store begins with the process group."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert prepare().job_to_join is None


def test_an_interface_that_is_not_there_is_refused_where_there_are_several_launches(launcher, tmp_path):
    with pytest.raises(ValueError, match=r"network_interface='eth99' is no interface with an IPv4 address.*There are:"):
        LayupConfig(output_dir=str(tmp_path), use_cpu=True, network_interface="eth99")
    assert not any(variable in os.environ for variable in VARIABLES)


def test_joining_comes_before_the_process_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert prepare().job_to_join is None
    with pytest.raises(ValueError, match=r"`join` comes too late.*Create the configuration before"):
        prepare(join="127.0.0.1:7000")


def test_who_joins_cannot_have_a_shard():
    job = SimpleNamespace(workers=3)
    joining = SimpleNamespace(
        args=SimpleNamespace(job_to_join=job), world_size=1, options=Options(shared_batches=False)
    )
    state = RunState()
    members = Members(joining, state)
    with pytest.raises(ValueError, match=r"`shared_batches=False` and joining a running job exclude each other"):
        members.plan()
    joining.options.shared_batches = True
    assert members.plan() is job
    assert members.workers == 3
    assert state.is_outside
    assert state.is_new
