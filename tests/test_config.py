"""Every option that cannot work is refused by name, with a remedy; everything else is accepted."""

import contextlib
import copy
import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from stock import CHECKPOINTING
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from layup_hf.config import LayupConfig, LayupOptions
from layup_hf.trainer.checks import check_options, check_sharing
from layup_hf.trainer.suitability import check_data, check_model, check_runtime, has_several_workers


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """An interface that is chosen is noted in the environment, and is to be forgotten."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES"):
        monkeypatch.setenv(name, "lo")


@pytest.fixture
def arguments(tmp_path):
    """Builds a config that trains on the CPU."""

    def build(kind=LayupConfig, **options):
        return kind(output_dir=str(tmp_path), use_cpu=True, **options)

    return build


# ---- The options alone ----

REFUSED = {
    "deepspeed": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "stock `Trainer`"),
    "fsdp": ({"fsdp": "full_shard"}, "stock `Trainer`"),
    "use_reentrant": ({f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, "Set `use_reentrant` to False"),
    "peers_per_step=0": ({"peers_per_step": 0}, "Leave it unset"),
    "peers_per_step=-1": ({"peers_per_step": -1}, "Leave it unset"),
    "windows='network'": ({"windows": "network"}, "use 'auto', 'shared' or 'nixl'"),
    "clip='always'": ({"clip": "always"}, "'estimate' or 'exact'"),
    "windows=''": ({"windows": ""}, "use 'auto', 'shared' or 'nixl'"),
    "wire_dtype='fp8'": ({"wire_dtype": "fp8"}, "use 'fp32', 'bf16', 'int8' or 'int4'"),
    "`wire_dtype='bf16'` and `windows='shared'`": (
        {"wire_dtype": "bf16", "windows": "shared"},
        "Leave `wire_dtype` unset, or use windows='auto' or 'nixl'",
    ),
    "merge_at='once'": ({"merge_at": "once"}, "use 'boundary', 'backward' or 'arrival'"),
    "second_moment='theirs'": ({"second_moment": "theirs"}, "use 'auto', 'mean' or 'own'"),
    "`second_moment='mean'` and `windows='nixl'`": (
        {"second_moment": "mean", "windows": "nixl"},
        "Leave one of the two at 'auto'",
    ),
    "nesterov='yes'": ({"nesterov": "yes"}, "use 'auto', 'on' or 'off'"),
    "offer_every=0": ({"offer_every": 0}, "Use 1 or more"),
    "offer_every=-2": ({"offer_every": -2}, "Use 1 or more"),
    "lease_seconds=0.5": ({"lease_seconds": 0.5}, "Use at least 1 second"),
    "lease_seconds=inf": ({"lease_seconds": float("inf")}, "Use at least 1 second"),
    "lease_seconds=nan": ({"lease_seconds": float("nan")}, "Use at least 1 second"),
    "join='7000'": ({"join": "7000"}, "give HOST:PORT, as the job's log says"),
    "join='127.0.0.1:1'": ({"join": "127.0.0.1:1"}, "it has ended or is not reached from here"),
    "network_interface='eth99'": ({"join": "127.0.0.1:1", "network_interface": "eth99"}, "There are: "),
    "speed=2": ({"straggler": "rank=3,speed=2"}, "with a name of rank, compute"),
    "rank=x": ({"straggler": "rank=x,compute=1"}, "`all` or a rank"),
    "compute=-1": ({"straggler": "compute=0.1; compute=-1"}, "`compute` must be seconds, finite and not negative"),
    "shared_batches='sometimes'": ({"shared_batches": "sometimes"}, "use True or False"),
    "shared_batches=2": ({"shared_batches": 2}, "use True or False"),
    "shared_batches=None": ({"shared_batches": None}, "use True or False"),
    "offer_every=True": ({"offer_every": True}, "use a whole number"),
    "offer_every=1.5": ({"offer_every": 1.5}, "use a whole number"),
    "offer_every=None": ({"offer_every": None}, "use a whole number"),
    "peers_per_step='many'": ({"peers_per_step": "many"}, "use a whole number, or None"),
    "lease_seconds=False": ({"lease_seconds": False}, "use a number, or None"),
    "windows=None": ({"windows": None}, "use text"),
    "join=7000": ({"join": 7000}, "use text, or None"),
    "clip=False": ({"clip": False}, "use text"),
}


@pytest.mark.parametrize("named", REFUSED)
def test_an_impossible_option_is_refused_when_the_config_is_made(named, arguments):
    options, remedy = REFUSED[named]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        arguments(**options)
    assert named in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize("option", ["deepspeed", "fsdp", "parallelism_config"])
def test_an_excluded_option_of_plain_arguments_is_refused(option):
    with pytest.raises(ValueError, match=rf"`{option}` and LayUp exclude each other.*stock `Trainer`"):
        check_options(SimpleNamespace(**{option: True}))


def test_parallelism_is_refused(arguments):
    parallelism = pytest.importorskip("accelerate.parallelism_config")  # since accelerate 1.10
    with pytest.raises(ValueError, match=r"`parallelism_config` and LayUp exclude.*stock `Trainer`"):
        arguments(parallelism_config=parallelism.ParallelismConfig())


def test_reentrant_checkpointing_is_refused_under_its_older_name(arguments):
    with pytest.raises(ValueError, match=r"`gradient_checkpointing_kwargs=.*'use_reentrant': True"):
        arguments(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_reentrant_checkpointing_is_refused_in_parsed_arguments(arguments):
    """On the command line it is a string, parsed after LayUp's first check; the trainer checks again."""
    config = arguments(**{f"{CHECKPOINTING}_kwargs": '{"use_reentrant": true}'})
    with pytest.raises(ValueError, match=rf"{CHECKPOINTING}_kwargs.*Set `use_reentrant` to False"):
        check_options(config)


# ---- Handing out batches ----


@pytest.mark.parametrize("shared_batches", [True, False])
@pytest.mark.parametrize("kind", [LayupConfig, TrainingArguments])
@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("dispatch_batches", "every worker reads the data set itself"),
        ("split_batches", "set `per_device_train_batch_size`"),
    ],
)
def test_batches_that_all_workers_would_take_together_are_refused(option, remedy, kind, shared_batches, arguments):
    own = {"shared_batches": shared_batches} if kind is LayupConfig else {}
    with pytest.raises(
        ValueError, match=rf"'{option}': True}}` and LayUp with several workers exclude.*Remove `{option}`.*{remedy}"
    ):
        check_sharing(arguments(kind, accelerator_config={option: True}, **own))


def test_batches_that_are_not_taken_together_are_accepted(arguments):
    check_sharing(arguments(accelerator_config={"dispatch_batches": False, "split_batches": False}))
    check_sharing(arguments(accelerator_config={"dispatch_batches": None}))


def test_shards_need_a_sampler_that_every_worker_can_seed(arguments):
    unseeded = {"use_seedable_sampler": False}
    with pytest.raises(ValueError, match=r"'use_seedable_sampler': False.*`shared_batches=False` exclude.*Remove one"):
        check_sharing(arguments(accelerator_config=unseeded, shared_batches=False))
    check_sharing(arguments(accelerator_config=unseeded))
    check_sharing(arguments(TrainingArguments, accelerator_config=unseeded))
    check_sharing(arguments(shared_batches=False))


def test_batches_made_for_each_worker_in_advance_are_refused_where_they_are_shared(arguments):
    with pytest.raises(ValueError, match=r"'batch_rebalance'` and `shared_batches=True` exclude each other"):
        check_sharing(arguments(TrainingArguments, train_sampling_strategy="batch_rebalance"))
    check_sharing(arguments(train_sampling_strategy="batch_rebalance", shared_batches=False))


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_other_orders_are_accepted_shared_or_not(strategy, arguments):
    for shared_batches in (True, False):
        check_sharing(arguments(train_sampling_strategy=strategy, shared_batches=shared_batches))


# ---- Optimizers, and what is possible ----

STEP_THEMSELVES = [name for name in OptimizerNames if any(k in name for k in ("layerwise", "lomo", "schedule_free"))]


@pytest.mark.parametrize("optim", STEP_THEMSELVES)
@pytest.mark.parametrize("as_text", [False, True])
def test_an_optimizer_that_steps_itself_is_refused(optim, as_text):
    with pytest.raises(ValueError, match=rf"`optim='{optim.value}'` and LayUp exclude each other.*'adamw_torch'"):
        check_options(SimpleNamespace(optim=optim.value if as_text else optim))


def test_optimizers_that_step_themselves_are_known():
    assert {"lomo", "adalomo", "schedule_free_adamw", "galore_adamw_layerwise"} <= {n.value for n in STEP_THEMSELVES}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "galore_adamw"])
def test_an_optimizer_that_can_be_stepped_by_block_is_accepted(optim, arguments):
    assert arguments(optim=optim).optim == optim


@pytest.mark.parametrize("kind", [LayupConfig, TrainingArguments, Seq2SeqTrainingArguments])
def test_defaults_are_accepted(kind, arguments):
    check_options(arguments(kind))


def test_possible_options_are_accepted(arguments):
    config = arguments(
        peers_per_step=1,
        windows="shared",
        second_moment="mean",
        nesterov="on",
        wire_dtype="fp32",
        offer_every=4,
        lease_seconds=1.0,
        network_interface="lo",
        bf16=True,
        gradient_accumulation_steps=4,
        straggler="rank=3,compute=0.4; rank=all,communication=0.05",
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    )
    check_options(config)
    assert (config.peers_per_step, config.windows) == (1, "shared")


@pytest.mark.parametrize("windows", ["auto", "nixl"])
def test_blocks_may_be_sent_in_bf16_where_they_are_sent(windows, arguments, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert arguments(wire_dtype="bf16", windows=windows).wire_dtype == "bf16"


def test_windows_over_a_network_need_their_package(arguments, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "nixl" else original(name, *of))
    assert arguments().windows == "auto"
    with pytest.raises(ValueError, match=r"windows='nixl' needs the package nixl: pip install 'layup_hf\[nixl\]'"):
        arguments(windows="nixl")


# ---- Where the options come from ----


def test_the_config_is_parsed_from_the_command_line(tmp_path):
    (config,) = HfArgumentParser(LayupConfig).parse_args_into_dataclasses(
        [
            *("--output_dir", str(tmp_path), "--use_cpu", "--max_steps", "5"),
            *("--peers_per_step", "3", "--windows", "shared", "--shared_batches", "False"),
            *("--straggler", "rank=0,compute=1", "--offer_every", "2", "--lease_seconds", "2.5"),
            *("--network_interface", "lo", "--wire_dtype", "fp32"),
            *("--second_moment", "own", "--merge_at", "arrival", "--nesterov", "off"),
        ]
    )
    assert isinstance(config, TrainingArguments)
    assert (config.peers_per_step, config.windows, config.max_steps) == (3, "shared", 5)
    assert (config.shared_batches, config.straggler) == (False, "rank=0,compute=1")
    assert (config.offer_every, config.lease_seconds) == (2, 2.5)
    assert (config.network_interface, config.wire_dtype) == ("lo", "fp32")
    assert (config.second_moment, config.merge_at, config.nesterov) == ("own", "arrival", "off")


def test_the_command_line_has_the_defaults(tmp_path):
    (config,) = HfArgumentParser(LayupConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])
    assert (config.peers_per_step, config.windows) == (None, "auto")
    assert (config.shared_batches, config.straggler) == (True, None)
    assert (config.wire_dtype, config.offer_every) == ("fp32", 1)
    assert (config.second_moment, config.merge_at, config.nesterov) == ("auto", "boundary", "auto")
    assert (config.lease_seconds, config.network_interface, config.join, config.job_to_join) == (None,) * 4


VALUES = {
    "shared_batches": [
        (False, False),
        ("off", False),
        ("False", False),
        ("no", False),
        (0, False),
        ("on", True),
        (1, True),
    ],
    "peers_per_step": [(2, 2), ("2", 2), (2.0, 2), (None, None), ("None", None), ("null", None), (np.int64(2), 2)],
    "bias_every": [(0, 0), ("10", 10), (1e2, 100)],
    "lease_seconds": [(3, 3.0), ("2.5", 2.5), ("none", None), (np.float32(2.5), 2.5)],
    "nesterov": [(True, "on"), (False, "off"), ("auto", "auto")],
    "straggler": [(None, None), ("rank=0,compute=1", "rank=0,compute=1")],
}


@pytest.mark.parametrize(("name", "given", "meant"), [(n, *pair) for n, pairs in VALUES.items() for pair in pairs])
def test_usual_spellings_are_understood(name, given, meant, arguments):
    value = getattr(arguments(**{name: given}), name)
    assert value == meant
    assert type(value) is type(meant)


def test_a_value_that_is_set_later_is_checked_when_the_trainer_is_made(arguments):
    config = arguments()
    config.shared_batches = "off"
    with pytest.raises(ValueError, match=r"shared_batches='off' is of another type.*Set it to False"):
        check_options(config)
    assert config.shared_batches == "off"


ALL = {
    "peers_per_step": 3,
    "windows": "shared",
    "wire_dtype": "fp32",
    "merge_at": "arrival",
    "bias_every": 5,
    "offer_every": 2,
    "lease_seconds": 2.5,
    "network_interface": "lo",
    "shared_batches": False,
    "clip": "exact",
    "second_moment": "own",
    "nesterov": "off",
    "straggler": "rank=0,compute=1",
}


def own(config):
    return {name: getattr(config, name) for name in ALL}


def test_all_options_come_through_dictionaries_files_and_back(tmp_path):
    parser = HfArgumentParser(LayupConfig)
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    (parsed,) = parser.parse_dict(common | ALL)
    assert own(parsed) == ALL
    # YAML reads `off` as a boolean
    lines = [f"{name}: {value}" for name, value in (common | ALL).items()]
    (tmp_path / "all.yaml").write_text("\n".join(lines))
    assert "nesterov: off" in lines
    (from_yaml,) = parser.parse_yaml_file(str(tmp_path / "all.yaml"))
    (tmp_path / "all.json").write_text(json.dumps(common | ALL))
    (from_json,) = parser.parse_json_file(str(tmp_path / "all.json"))
    line = [text for name, value in (common | ALL).items() for text in (f"--{name}", str(value))]
    (from_line,) = parser.parse_args_into_dataclasses(line)
    assert own(from_yaml) == own(from_json) == own(from_line) == ALL
    kinds = {name: type(value) for name, value in ALL.items()}
    for config in (parsed, from_yaml, from_json, from_line):
        assert {name: type(value) for name, value in own(config).items()} == kinds
        assert {name: config.to_dict()[name] for name in ALL} == ALL
        assert {name: json.loads(config.to_json_string())[name] for name in ALL} == ALL
        assert {name: config.to_sanitized_dict()[name] for name in ALL} == ALL
        assert own(dataclasses.replace(config, offer_every="3")) == ALL | {"offer_every": 3}
        assert own(copy.deepcopy(config)) == ALL


def test_an_impossible_option_on_the_command_line_is_refused(tmp_path):
    with pytest.raises(ValueError, match="peers_per_step=0"):
        HfArgumentParser(LayupConfig).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--use_cpu", "--peers_per_step", "0"]
        )


@dataclass
class Seq2SeqConfig(LayupOptions, Seq2SeqTrainingArguments):
    pass


def test_the_options_combine_with_any_subclass_of_the_arguments(arguments):
    config = arguments(Seq2SeqConfig, peers_per_step=2, predict_with_generate=True)
    assert (config.peers_per_step, config.predict_with_generate) == (2, True)
    assert config.device.type == "cpu"  # the post-init of the arguments has run
    with pytest.raises(ValueError, match="deepspeed"):
        arguments(Seq2SeqConfig, deepspeed={"zero_optimization": {"stage": 2}})


def test_the_options_can_stand_alone():
    assert LayupOptions().windows == "auto"
    assert LayupOptions().shared_batches
    with pytest.raises(ValueError, match="peers_per_step=0"):
        LayupOptions(peers_per_step=0)


# ---- What only the running process shows ----


def trainer(
    distributed=DistributedType.NO,
    n_gpu=0,
    precision="no",
    scaler=None,
    optim=OptimizerNames.ADAMW_TORCH_FUSED,
    optimizer=None,
    clip="estimate",
    device="cpu",
    workers=1,
    **attributes,
):
    accelerator = SimpleNamespace(distributed_type=distributed, mixed_precision=precision, scaler=scaler)
    args = SimpleNamespace(n_gpu=n_gpu, device=SimpleNamespace(type=device), optim=optim, clip=clip, world_size=workers)
    given = {"optimizer": optimizer, "optimizer_cls_and_kwargs": None, **attributes}
    return SimpleNamespace(args=args, accelerator=accelerator, **given)


@pytest.mark.parametrize("device", ["xpu", "npu", "mps", "meta"])
def test_devices_whose_memory_peers_cannot_read_are_refused_with_several_workers(device):
    check_runtime(trainer(device=device))
    for possible in ("cpu", "cuda"):
        check_runtime(trainer(device=possible, workers=2))
    with pytest.raises(ValueError, match=rf"device '{device}' and LayUp with several workers exclude.*use_cpu=True"):
        check_runtime(trainer(device=device, workers=2))


def test_parameters_that_peers_cannot_read_are_refused_with_several_workers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    check_model(model, SimpleNamespace(world_size=1))
    with pytest.raises(ValueError, match=r"parameter 1.weight is on a device 'meta', which LayUp.*Load the model onto"):
        check_model(model, SimpleNamespace(world_size=2))
    check_model(model.requires_grad_(False), SimpleNamespace(world_size=2))


@pytest.mark.parametrize("several", [{"world_size": 2}, {"world_size": 1, "job_to_join": object()}])
def test_who_joins_others_is_one_of_several(several):
    assert has_several_workers(SimpleNamespace(**several))
    assert not has_several_workers(SimpleNamespace(world_size=1, job_to_join=None))


def test_what_only_several_workers_exclude_is_refused_when_there_are_several():
    given = trainer(workers=2)
    given.args.dataloader_in_order = False
    with pytest.raises(ValueError, match="`dataloader_in_order=False` and `shared_batches=True` exclude"):
        check_runtime(given)
    given.args.world_size = 1
    check_runtime(given)


class Gathering(torch.nn.Module):
    gather_across_devices = True


@pytest.mark.parametrize("loss", [Gathering(), {"a": None, "b": torch.nn.Sequential(Gathering())}])
def test_a_loss_that_gathers_in_every_step_is_refused_with_several_workers(loss):
    check_runtime(trainer(loss=loss))
    check_runtime(trainer(loss=torch.nn.Linear(1, 1), workers=2))
    with pytest.raises(ValueError, match=r"Gathering\(gather_across_devices=True\) and LayUp.*at False"):
        check_runtime(trainer(loss=loss, workers=2))


def test_plain_arguments_and_several_launches_are_refused(monkeypatch, arguments):
    check_runtime(trainer(workers=2))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"A plain SimpleNamespace and workers.*several launches.*Use `LayupConfig`"):
        check_runtime(trainer(workers=2))
    check_runtime(trainer())
    monkeypatch.delenv("GROUP_WORLD_SIZE")
    config = arguments()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(LayupConfig, "world_size", 2)
    given = trainer()
    given.args = config
    check_runtime(given)


def test_an_optimizer_that_cannot_skip_a_block_is_refused_with_loss_scaling():
    check_runtime(trainer(optim=OptimizerNames.SGD))
    scaled = {"precision": "fp16", "scaler": object(), "optim": OptimizerNames.SGD}
    check_runtime(trainer(**scaled, clip="exact"))
    check_runtime(trainer(**scaled, optimizer_cls_and_kwargs=(torch.optim.SGD, {})))  # seen when training begins
    with pytest.raises(ValueError, match=r"`fp16` and optim='sgd' exclude each other.*adamw_torch_fused.*exact.*bf16"):
        check_runtime(trainer(**scaled))


@pytest.mark.parametrize(
    ("kind", "scales", "options", "message"),
    [
        (
            torch.optim.SGD,
            False,
            {"nesterov": "on"},
            r"`nesterov='on'` and SGD exclude each other.*adamw_torch.*'auto'",
        ),
        (
            torch.optim.SGD,
            False,
            {"second_moment": "mean"},
            r"`second_moment='mean'` and SGD exclude each other.*'auto'",
        ),
        (torch.optim.SGD, True, {}, r"`fp16` and SGD exclude each other with `clip='estimate'`.*exact"),
        (torch.optim.AdamW, False, {"nesterov": "on", "second_moment": "mean"}, None),
        (torch.optim.SGD, True, {"clip": "exact"}, None),
    ],
)
def test_an_optimizer_of_the_users_is_refused_at_construction(kind, scales, options, message):
    scaler = object() if scales else None
    given = trainer(optimizer=kind([torch.zeros(2, requires_grad=True)], lr=0.1), scaler=scaler)
    vars(given.args).update(options)
    refusal = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
    with refusal:
        check_runtime(given)


def test_batches_out_of_order_are_refused_where_they_are_shared(arguments):
    check_sharing(arguments(dataloader_in_order=False, shared_batches=False))
    with pytest.raises(ValueError, match="`dataloader_in_order=False` and `shared_batches=True` exclude"):
        check_sharing(arguments(dataloader_in_order=False))


@pytest.mark.parametrize("distributed", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_full_replicas_are_accepted(distributed):
    check_runtime(trainer(distributed, n_gpu=1))


@pytest.mark.parametrize(
    "distributed",
    [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA],
)
def test_a_launcher_that_shards_is_refused(distributed):
    with pytest.raises(ValueError, match=rf"asks for {distributed.value}, which LayUp excludes.*accelerate launch"):
        check_runtime(trainer(distributed))


def test_a_model_loaded_in_shards_is_refused():
    with pytest.raises(ValueError, match=r"`distributed_config`.*Load it without"):
        check_runtime(trainer(is_distributed_loading_by_transformers=True))


def test_several_devices_in_one_process_are_refused():
    with pytest.raises(ValueError, match=r"4 GPUs .*DataParallel.*accelerate launch --multi_gpu --num_processes 4"):
        check_runtime(trainer(n_gpu=4))


# ---- The data ----


def sizes(batch_size, accumulation, workers, drop_last=False):
    return SimpleNamespace(
        train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        world_size=workers,
        dataloader_drop_last=drop_last,
    )


@pytest.mark.parametrize(
    ("samples", "batch_size", "accumulation", "workers"),
    [(4, 1, 1, 4), (7, 2, 1, 4), (13, 2, 2, 4), (1, 8, 4, 1), (0, 8, 1, 1), (100, 8, 2, 2)],
)
def test_a_step_for_every_worker_is_enough(samples, batch_size, accumulation, workers):
    check_data(Dataset.from_dict({"x": range(samples)}), sizes(batch_size, accumulation, workers))


@pytest.mark.parametrize(
    ("samples", "batch_size", "accumulation", "workers", "steps"),
    [(3, 1, 1, 4, 3), (6, 2, 1, 4, 3), (12, 2, 2, 4, 3), (7, 1, 2, 5, 4), (1, 8, 1, 2, 1), (0, 8, 1, 2, 0)],
)
def test_fewer_steps_than_workers_are_refused(samples, batch_size, accumulation, workers, steps):
    numbers = f"{samples} samples, {steps} steps of {batch_size * accumulation}: fewer than the {workers} workers"
    with pytest.raises(ValueError, match=numbers) as error:
        check_data([None] * samples, sizes(batch_size, accumulation, workers))
    assert f"Start at most {max(1, steps)} workers, lower `per_device_train_batch_size`" in str(error.value)
    assert "`gradient_accumulation_steps`" in str(error.value)


def test_a_batch_that_is_dropped_does_not_count():
    check_data([None] * 7, sizes(2, 1, 4))
    with pytest.raises(ValueError, match="7 samples, 3 steps of 2"):
        check_data([None] * 7, sizes(2, 1, 4, drop_last=True))


def test_a_dataset_of_unknown_length_is_accepted():
    check_data(Dataset.from_dict({"x": [1]}).to_iterable_dataset(), sizes(8, 1, 100))
    check_data(None, sizes(8, 1, 100))
