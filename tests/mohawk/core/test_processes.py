"""A process of a run that hangs is noticed by the others within the time set for it; one that works is waited for."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from mohawk.core import collectives, processes
from mohawk.core.stopping import StopRequest
from mohawk.errors import UserError, line_for
from mohawk.launchers import hear_mpi
from mohawk.runs.sharding import parts_of
from mohawk.schema.base import Sharding
from mohawk.training.pipeline import make_stage
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training, fork, free_port, wait  # noqa: F401

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def two_processes(tmp_path, work, minutes):
    """`work(rank)` in two processes; their pids. What each ends with stands in the file of its rank."""
    port = str(free_port())

    def body(rank):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            MOHAWK_TIMEOUT_MINUTES=str(minutes),
        )  # fmt: skip
        try:
            with processes.joined("cpu"):
                said = work(rank)
        except UserError as error:
            said = str(error)
        except RuntimeError as error:
            said = line_for(error)
        (tmp_path / str(rank)).write_text(str(said))

    return [fork(lambda rank=rank: body(rank)) for rank in range(2)]


def end(pid):
    os.kill(pid, signal.SIGKILL)
    wait(pid)


@pytest.mark.parametrize("grouped", [False, True])
def test_one_that_hangs_in_a_step(grouped, tmp_path):
    def work(rank):
        group = processes.own_group([[0, 1]]) if grouped else None
        collectives.total(torch.ones(3), group)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        collectives.total(torch.ones(3), group)

    first, second = two_processes(tmp_path, work, 0.05)
    try:
        assert wait(first) == 0
        said = (tmp_path / "0").read_text()
        assert said.startswith("another process of this run has ended or answers no more (Timed out waiting 3000ms")
    finally:
        end(second)


def test_the_first_that_hangs_while_the_others_wait_for_its_work(tmp_path):
    def work(rank):
        collectives.total(torch.ones(3))
        processes.on_first(lambda: os.kill(os.getpid(), signal.SIGSTOP))

    first, second = two_processes(tmp_path, work, 0.05)
    try:
        assert wait(second) == 0
        said = (tmp_path / "1").read_text()
        assert said.startswith("process 0 has shown no sign of life for 0.05 minutes (MOHAWK_TIMEOUT_MINUTES)")
    finally:
        end(first)


def test_long_work_of_the_first_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "BEAT", 0.2)

    def work(rank):
        return processes.from_first(lambda: time.sleep(4.0) or "done")

    for pid in two_processes(tmp_path, work, 0.025):
        assert wait(pid) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["done", "done"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of a parent's end")
def test_workers_whose_launcher_is_gone_are_asked_to_save(tmp_path, monkeypatch):
    """torchrun dies of a signal that it does not hand on, such as SIGUSR1."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as it sets it

    def work(rank):
        request, end = StopRequest(says=False), time.monotonic() + 30.0
        with request.caught():
            (tmp_path / f"at work {rank}").touch()
            while request.number is None and time.monotonic() < end:
                time.sleep(0.01)
        return request.number

    def launcher():
        two_processes(tmp_path, work, 1.0)
        while True:
            signal.pause()

    def until(there):
        end = time.monotonic() + 30.0
        while not there():
            assert time.monotonic() < end
            time.sleep(0.01)

    pid, said = fork(launcher), [tmp_path / "0", tmp_path / "1"]
    until(lambda: all((tmp_path / f"at work {rank}").exists() for rank in range(2)))
    os.kill(pid, signal.SIGUSR1)
    assert wait(pid) == -signal.SIGUSR1
    until(lambda: all(path.exists() and path.read_text() for path in said))
    assert [path.read_text() for path in said] == [str(signal.SIGTERM.value)] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of a parent's end")
@pytest.mark.parametrize(("words", "stops"), [(["accelerate", "launch"], True), (["bash"], False)])
def test_the_one_process_of_accelerate_launch_is_asked_to_save_when_that_is_gone(tmp_path, words, stops):
    """accelerate dies of SIGTERM and hands it on to nobody. What a shell started outlives the shell."""
    work = (
        "import time; from pathlib import Path\n"
        "from mohawk.core.processes import joined; from mohawk.core.stopping import StopRequest\n"
        f"folder, request = Path({str(tmp_path)!r}), StopRequest(says=False)\n"
        "with joined(), request.caught():\n"
        "    (folder / 'at work').touch()\n"
        f"    end = time.monotonic() + {30 if stops else 0.5}\n"
        "    while request.number is None and time.monotonic() < end:\n"
        "        time.sleep(0.01)\n"
        "(folder / 'writing').write_text(str(request.number and int(request.number)))\n"
        "(folder / 'writing').rename(folder / 'said')\n"
    )
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    launcher = subprocess.Popen([sys.executable, "-c", start, work, *words], cwd=ROOT)

    def until(there):
        end = time.monotonic() + 60.0
        while not there.exists():
            assert time.monotonic() < end
            time.sleep(0.01)

    until(tmp_path / "at work")
    launcher.terminate()
    assert launcher.wait() == -signal.SIGTERM
    until(tmp_path / "said")
    assert (tmp_path / "said").read_text() == str(int(signal.SIGTERM) if stops else None)


def test_a_mistake_of_all_is_the_firsts_also_where_one_comes_late(tmp_path, monkeypatch):
    """Those that came in time wait with it, as a launcher ends all when one ends."""
    monkeypatch.setattr(processes, "HEARING", timedelta(seconds=0.5))
    port = str(free_port())

    def body(rank):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        if rank == 2:
            time.sleep(2.0)
        try:
            with processes.joined():
                if rank == 2:
                    (tmp_path / "late").touch()
                raise UserError("a recipe's")
        except UserError as error:
            said = f"{type(error).__name__}: {error}, {(tmp_path / 'late').exists()}"
        (tmp_path / str(rank)).write_text(said)

    pids = [fork(lambda rank=rank: body(rank)) for rank in range(3)]
    assert [wait(pid) for pid in pids] == [0, 0, 0]
    kinds = ("UserError", "SaidElsewhere", "SaidElsewhere")
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f"{k}: a recipe's, True" for k in kinds]


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_how_long_is_a_number_of_minutes(monkeypatch, given):
    monkeypatch.setenv("MOHAWK_TIMEOUT_MINUTES", given)
    with pytest.raises(UserError, match=f"MOHAWK_TIMEOUT_MINUTES: got '{given}'; allowed: minutes"):
        processes.patience()
    monkeypatch.delenv("MOHAWK_TIMEOUT_MINUTES")
    assert processes.patience().total_seconds() == 30 * 60


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate is set to DEEPSPEED, .* `sharding.kind: full`"),
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate is set to FSDP 1, .* set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "accelerate is set to fsdp_offload_params, which the commands do not know; use more processes",
        ),
    ],
)
def test_what_accelerate_is_set_to_is_refused_before_anything_is_read(monkeypatch, given, said):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        with processes.joined("cpu"):
            pytest.fail("went on")


def test_accelerates_wish_to_shard_is_the_commands(monkeypatch):
    """What it would do itself it does not hear of."""
    monkeypatch.setattr(processes, "_wish", None)
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with processes.joined("cpu"):
        assert processes.wish() == processes.Wish(activation_checkpointing=True)
        assert not any(name in os.environ for name in asked)


def test_small_gradients_are_summed_in_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(collectives, "SMALL", 12)
    sizes = [(3, 4), (12,), (5,), (13,), (7, 2), (6,), (2,)]  # the fourth and fifth by themselves
    whole = torch.arange(1.0, 1 + sum(torch.Size(size).numel() for size in sizes)) % 8  # sums are exact in bfloat16

    def body(rank):
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes[:-1]]
        parameters.append(torch.nn.Parameter(torch.zeros(sizes[-1], dtype=torch.bfloat16)))
        for i, values in enumerate(whole.split([p.numel() for p in parameters])):
            # in other strides, as a transposed product leaves it; one is reached in one process alone, one in none
            values = (values * (1 + rank)).to(parameters[i].dtype)
            values = values.view(4, 3).T if i == 0 else values.view(sizes[i])
            parameters[i].grad = None if i == 5 or (i == 2 and rank == 0) else values.clone()
        sent = []
        sends = torch.distributed.all_reduce
        monkeypatch.setattr(
            torch.distributed, "all_reduce", lambda *given, **more: sent.append(1) or sends(*given, **more)
        )
        collectives.sum_gradients(parameters)
        return [p.grad for p in parameters], len(sent)

    expected = list(whole.split([torch.Size(size).numel() for size in sizes]))
    for gradients, sent in in_processes(tmp_path, 3, body):
        assert sent == 1 + 2 + 2  # who has one; by themselves; float32 and bfloat16 together
        for i, (gradient, values) in enumerate(zip(gradients, expected, strict=True)):
            if i == 5:
                assert gradient is None
                continue
            values = values.view(4, 3).T if i == 0 else values.view(sizes[i])
            assert torch.equal(gradient.float(), values * (5 if i == 2 else 6)), i


def test_groups_of_a_sharded_run_are_those_of_torchs_mesh(tmp_path):
    recipe = SimpleNamespace(sharding=Sharding(kind="full", within=2), device="cpu", precision="float32")

    names = ("replicas", "parts")

    def body(rank):
        torchs = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        meshes = [torchs, parts_of(recipe, True).mesh]
        ranks = [torch.distributed.get_process_group_ranks(mesh.get_group(name)) for mesh in meshes for name in names]
        return [mesh.mesh.tolist() for mesh in meshes], ranks, make_stage(2).group.size()

    for rank, (meshes, ranks, size) in enumerate(in_processes(tmp_path, 4, body)):
        assert meshes == [[[0, 1], [2, 3]]] * 2 and size == 2
        assert ranks == [[rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]] * 2


OF_MPI = [
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
]


@pytest.mark.parametrize("names", OF_MPI, ids=["MPICH", "Open MPI"])
def test_what_mpirun_starts_is_one_program(names, tmp_path):
    """As accelerate launch does on CPUs: without torchrun's variables."""
    port = str(free_port())

    def body(rank):
        of = dict(zip(names, ("2", str(rank), str(rank), "2"), strict=True))
        os.environ.update(of, MASTER_PORT=port)
        with processes.joined("cpu"):
            found = processes.count(), processes.rank(), processes.from_all(rank), os.environ["LOCAL_WORLD_SIZE"]
            (tmp_path / str(rank)).write_text(str(found))
            processes.leave()

    assert [wait(pid) for pid in [fork(lambda rank=rank: body(rank)) for rank in range(2)]] == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [f"(2, {r}, [0, 1], '2')" for r in range(2)]


@pytest.mark.parametrize("given", [{}, {"PMI_SIZE": "1"}, {"PMI_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}])
def test_one_process_or_torchruns_stays_what_it_is(given, monkeypatch):
    for name, value in (dict.fromkeys(OF_MPI[0], "0") | given).items():
        monkeypatch.setenv(name, value)
    hear_mpi()
    assert ("RANK" in given) == ("LOCAL_RANK" in os.environ) and "WORLD_SIZE" not in os.environ


def test_mpirun_on_several_machines_has_to_say_where_the_first_one_is(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in zip(OF_MPI[1], ("4", "2", "0", "2"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_ADDR: is not set, and mpirun has started 2 of 4 processes on this"):
        hear_mpi()


@pytest.mark.parametrize(("port", "lines"), [("29500", 1), (None, 0)])
def test_one_process_where_accelerate_was_told_of_several_is_said(port, lines, monkeypatch, caplog):
    monkeypatch.setattr(processes, "under_accelerate", lambda: True)
    monkeypatch.setattr(processes, "stop_with_parent", lambda: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if port is not None:
        monkeypatch.setenv("MASTER_PORT", port)
    with processes.joined("cpu"):
        said = [record.getMessage() for record in caplog.records if "accelerate launch" in record.getMessage()]
    assert len(said) == lines and all("has started one process" in line for line in said)
