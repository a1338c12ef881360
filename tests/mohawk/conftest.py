"""Tiny models, tokenizers and texts, made here: nothing comes from a network."""

import functools
import os
import subprocess
import sys
import types

import pytest

BEFORE_TRANSFORMERS = "import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, scipy.optimize"


@pytest.fixture(scope="session", autouse=True)
def own_sums(tmp_path_factory):
    """Sums of files in temporary folders are not remembered in the user's cache."""
    from mohawk.core import sums

    folder, memory = tmp_path_factory.mktemp("sums"), sums._memory
    sums._memory = lambda of: folder / memory(of).name
    yield
    sums._memory = memory


@pytest.fixture(scope="session", autouse=True)
def quick_files_and_pictures():
    """Files are left to the system to write, as a test's processes are killed, not its machine; pictures are small,
    and nothing in them is moved to make room."""
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    @functools.wraps(savefig)
    def small(figure, *arguments, **options):
        figure.set_layout_engine("none")
        return savefig(figure, *arguments, **{"dpi": 40, **options})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(Figure, "savefig", small)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_fresh_processes():
    """Exports are tried in forks of a process that knows no package of ours, and has imported of torch what
    transformers needs: but for `fresh_processes_as_shipped`."""
    from mohawk.export import parity
    from tests.helpers import forks

    def run(command, *, cwd, env, **_):
        python, option, source, *arguments = command
        assert (python, option) == (sys.executable, "-c")
        return forks.run(BEFORE_TRANSFORMERS, source, arguments, cwd, env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "subprocess", types.SimpleNamespace(run=run))
        yield


@pytest.fixture
def fresh_processes_as_shipped(monkeypatch):
    from mohawk.export import parity

    monkeypatch.setattr(parity, "subprocess", subprocess)


@pytest.fixture
def pictures_as_shipped(monkeypatch):
    """For tests that look at them."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", Figure.savefig.__wrapped__)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer: 256 bytes, then <bos> 256 and <eos> 257, which it does not add by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    assert (made.bos_token_id, made.eos_token_id) == (256, 257)
    return made


@pytest.fixture(scope="session")
def make_llama():
    """A function that makes a random Llama of a few thousand parameters in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **overrides):
        settings = {
            "vocab_size": 258,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": 256,
            "eos_token_id": 257,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()

    return make
