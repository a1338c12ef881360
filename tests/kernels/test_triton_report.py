"""The kernels compile for GPUs that are not here, nothing spills with the shipped blocks, and no count of what those
GPUs would execute is beyond its bound. After a change that costs what it is worth, write bounds anew, of all cases:

    rm tests/kernels/bounds_kd.json
    python -m mohawk.kernels.kd.triton_report --bounds tests/kernels/bounds_kd.json --record

Without --record and --quick that compiles every case, where the tests compile some of each kernel.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")


@LINUX
@pytest.mark.parametrize("targets", [("sm_80", "sm_90"), ("sm_100", "gfx942")], ids=" and ".join)
@pytest.mark.parametrize(
    "kernel, rows",
    [("kd", 18), pytest.param("mixing", 18, marks=pytest.mark.slow), ("ssd", 11), ("causal_conv1d", 3), ("decode", 4)],
)
def test_nothing_spills_or_goes_beyond_its_bound(kernel, rows, targets):
    """By the quick report."""
    bounds = Path(__file__).with_name(f"bounds_{kernel}.json")
    assert bounds.exists()
    # Its own process: in one where kernels were defined under TRITON_INTERPRET nothing can be compiled.
    command = [sys.executable, "-m", f"mohawk.kernels.{kernel}.triton_report", "--quick", "--bounds", bounds]
    done = subprocess.run(
        [*command, *(part for target in targets for part in ("--target", target))],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("nothing spills\n")
    for target in targets:
        assert done.stdout.count(f"\n| {target} |") == rows, (target, done.stdout)


SPECIALISED = """
from triton.runtime.jit import MockTensor, create_function_from_signature
from triton.compiler.compiler import make_backend
import torch
from mohawk.kernels.common import triton_report
from mohawk.kernels.kd import triton_report as kd

made = {"*bf16": MockTensor(torch.bfloat16), "*fp32": MockTensor(torch.float32), "*i64": MockTensor(torch.int64)}
for kernel in ("statistics", "sums", "gradient"):
    for extras in ("all", "none"):
        function, types, constants = kd.launch_arguments(kernel, "jsd", "bf16", "alike", extras)
        backend = make_backend(triton_report.TARGETS["sm_90"])
        bind = create_function_from_signature(function.signature, function.params, backend)
        passed = {name: 0.5 if kind == "fp32" else made.get(kind, kind) for name, kind in types.items()}
        bound, chosen, options = bind(**passed, **constants)
        _, *launch = function._pack_args(backend, options, bound, chosen, options)
        signature, constexprs, attributes = triton_report.specialized(function, types, constants)
        attributes = {place: attributes.get(place, []) for place in launch[2]}
        assert (signature, constexprs, attributes) == tuple(launch), (kernel, extras, launch)
print("the same")
"""


def test_the_report_compiles_what_a_launch_does():
    """Alignment and constants as triton takes them from the arguments of a launch."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SPECIALISED], capture_output=True, text=True, env=env)
    assert done.stdout == "the same\n", done.stderr


COUNTED = """
import triton
import triton.language as tl
from mohawk.kernels.common import triton_report

@triton.jit
def kernel(x, y, size, MASKED: tl.constexpr):
    for start in range(0, size, 2048):
        at = start + tl.arange(0, 2048)
        if MASKED:
            tl.store(y + at, tl.exp2(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)), mask=at < size)
        else:
            tl.store(y + at, tl.exp2(tl.load(x + at).to(tl.float32)))

for target in ("sm_90", "gfx942"):
    for masked in (False, True):
        types = {"x": "*bf16", "y": "*fp32", "size": 50257}
        options = {"num_warps": 4, "num_stages": 1}
        done = triton_report.compile_for(target, kernel, types, {"MASKED": masked}, options, 2048).work
        rounds = done.special  # as many as the compiler makes one of
        assert rounds in (1, 2, 4) and (done.loaded, done.stored, done.tensor) == (2 * rounds, 4 * rounds, 0), done
        assert done.narrow == (done.loaded if masked else 0) and 1 < done.instructions / rounds < 20, done
print("counted")
"""


@LINUX
def test_counts_of_a_kernel_that_can_be_counted_by_hand(tmp_path):
    """For each number two bytes are read, one exponential taken and four bytes written; without a mask 16 bytes are
    read at a time."""
    path = tmp_path / "counted.py"
    path.write_text(COUNTED)
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=600)
    assert done.stdout == "counted\n", done.stderr[-3000:]


def test_a_count_beyond_its_bound_is_told(tmp_path, monkeypatch, capsys):
    from mohawk.kernels.common import triton_report

    bounds = tmp_path / "bounds.json"

    def beyond(record=False, **numbers):
        return triton_report._beyond(bounds, {"one": numbers}, record)

    assert beyond(record=True, instructions=10.0, tensor=2.0, resident=3) == []
    assert beyond(record=True, instructions=9.0, tensor=3.0, resident=4) == []  # the worst of both is kept
    assert beyond(instructions=10.4, tensor=2.0, resident=3) == []
    slower = beyond(instructions=10.6, tensor=0.0, resident=2)
    assert slower == ["one: instructions 10.6, bound 10", "one: tensor 0, bound 2", "one: resident 2, bound 3"]
    assert beyond(narrow=1.0) == ["one: no bound of narrow"]
    monkeypatch.setattr(triton_report.triton, "__version__", "9.9.0")
    assert beyond(instructions=99.0) == [] and "no bounds of triton 9.9" in capsys.readouterr().out


SPLIT = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   FMUL R4, R4, 2 ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4) ;
        /*00c0*/                   NOP ;
"""


def test_a_loop_of_which_a_compiler_put_a_part_behind_the_end():
    """The loop is four instructions and the two of its part behind the end, without what waits before it."""
    from mohawk.kernels.common import machine_code

    done = machine_code.work(SPLIT, nvidia=True)
    assert done == machine_code.Work(6, special=1, loaded=16, narrow=0, stored=0, tensor=0, barriers=0)
    every = machine_code.work(SPLIT, nvidia=True, whole=True)
    assert (every.instructions, every.loaded, every.narrow, every.stored) == (12, 20, 4, 4)


@pytest.mark.parametrize(
    "target, registers, shared, warps, programs",
    [
        ("sm_90", 255, 0, 8, 1),  # 65,536 registers over 256 x 256
        ("sm_90", 168, 0, 4, 3),  # over 168 x 128
        ("sm_90", 32, 100 << 10, 4, 2),  # 228 KiB of shared memory, 1 of a program the system's
        ("sm_80", 32, 100 << 10, 4, 1),  # 164
        ("sm_100", 24, 0, 8, 8),  # 64 warps
        ("gfx942", 128, 0, 4, 4),  # four units, each with 512 registers a lane
        ("gfx942", 8, 32 << 10, 4, 2),  # 64 KiB
    ],
)
def test_programs_that_a_multiprocessor_holds(target, registers, shared, warps, programs):
    from mohawk.kernels.common import triton_report

    assert triton_report.resident(target, registers, shared, warps) == programs
