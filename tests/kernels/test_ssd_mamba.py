"""mamba-ssm's kernels under the Triton interpreter, against the scan here: no GPU is needed, the package is.

Its wheel without compiled parts installs anywhere:
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm
"""

import importlib.util
import os
import subprocess
import sys

import pytest

PARITY = """
import contextlib, sys, types
for name in ("selective_scan_cuda", "causal_conv1d_cuda"):  # compiled parts that these kernels do not use
    sys.modules[name] = types.ModuleType(name)
import torch, triton
torch.cuda.device = lambda index: contextlib.nullcontext()
properties = types.SimpleNamespace(multi_processor_count=1, major=9, minor=0, name="interpreter")
torch.cuda.get_device_properties = lambda device=None: properties
torch.cuda.get_device_capability = lambda device=None: (9, 0)

class First:
    '''The first configuration of an autotuned kernel, untimed.'''
    def __init__(self, kernel, configs):
        self.kernel, self.configs, self.best_config = kernel, configs, configs[0]
    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            meta = self.best_config.kwargs
            if self.best_config.pre_hook is not None:
                names = self.kernel.arg_names
                self.best_config.pre_hook({**dict(zip(names, args)), **kwargs, **meta})
            return self.kernel[grid](*args, **kwargs, **meta)
        return launch

triton.autotune = lambda configs, key, **rest: lambda kernel: First(kernel, configs)
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mohawk.kernels.ssd import ssd
from mohawk.kernels import ssd_mamba

torch.manual_seed(0)
batch, seq, heads, width, groups, state = 2, 40, 2, 16, 1, 16
ssd_mamba.CHUNK = 16
x = torch.randn(batch, seq, heads, width)
B, C = torch.randn(batch, seq, groups, state), torch.randn(batch, seq, groups, state)
dt, A = torch.rand(batch, seq, heads), -torch.rand(heads)
D, initial = torch.randn(heads), torch.randn(batch, heads, width, state)
worst = 0.0

def compare(mine, theirs):
    global worst
    for a, b in zip(mine, theirs, strict=True):
        worst = max(worst, ((a - b).norm() / b.norm()).item())

def gradients(outputs, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(sum((out * torch.randn_like(out)).sum() for out in outputs), inputs)

# The public function, decay and input scale tied together by dt.
given = [value.requires_grad_() for value in (x, dt, A, B, C, D, initial)]
theirs = mamba_chunk_scan_combined(
    x, dt, A, B, C, 16, D=D, initial_states=initial, return_final_states=True
)
mine = ssd(x, dt * A, B, C, input_scale=dt, D=D, initial_state=initial, return_final_state=True)
compare(mine, theirs)
compare(gradients(mine, given), gradients(theirs, given))

# Its kernels with decay and input scale apart, weak and strong decays, packed documents.
runs = torch.arange(seq).div(11, rounding_mode="floor").expand(batch, seq)
for strength, ids in ((1e-5, None), (1.0, runs), (30.0, None)):
    log_decay = (-torch.rand(batch, seq, heads) * strength).requires_grad_()
    given = [x, log_decay, B, C, dt, D, initial]
    options = dict(input_scale=dt, D=D, initial_state=initial, segment_ids=ids, return_final_state=True)
    theirs = ssd(x, log_decay, B, C, **options, backend="mamba_ssm")
    mine = ssd(x, log_decay, B, C, **options, backend="chunked")
    compare(mine, theirs)
    compare(gradients(mine, given), gradients(theirs, given))
print(worst)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_mamba_ssm_and_the_scan_agree():
    done = subprocess.run(
        [sys.executable, "-c", PARITY],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 2e-5
