"""Adapters: only they train, peft reads them, merged they are the same function in the model's own class."""

import copy
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mohawk.loading import lora
from mohawk.losses.layers.attention_match import AttentionMatch, collect_attention
from mohawk.losses.layers.hidden_match import collect_hidden
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.sharding import reshard, shard, whole
from tests.helpers.processes import in_processes
from tests.models.conftest import tiny_teacher

KINDS = ("llama", "mamba2", "discrete_mamba2", "gpt2")
ATTENTION_AND_MLP = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def make(make_llama):
    def make(kind: str):
        if kind == "gpt2":
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                "gpt2", vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                bos_token_id=256, eos_token_id=257,
            )  # fmt: skip
            return AutoModelForCausalLM.from_config(config).eval()
        model = make_llama(num_hidden_layers=3)
        return model if kind == "llama" else hybrid_from_teacher(model, [1], mixer=kind).eval()

    return make


def ids(n=12):
    return torch.randint(0, 258, (2, n), generator=torch.Generator().manual_seed(0))


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


@pytest.mark.parametrize("kind", KINDS)
def test_train_save_load_merge(kind, make, peft, tmp_path):
    model = make(kind)
    plain, before = copy.deepcopy(model), logits(model)
    adapted = lora.add_adapter(model, rank=4)
    assert torch.equal(logits(adapted), before)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    # A and B beside each linear map of the decoder layers, and nothing else
    layers = [m for m in lora._inner(plain) if isinstance(m[1], (torch.nn.Linear, lora.Conv1D))]
    assert len(trained) == 2 * len(layers)

    losses = train(adapted)
    assert losses[-1] < losses[0] and all(p.grad is not None for p in trained.values())
    frozen = dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        if name not in trained:
            own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            assert torch.equal(parameter, frozen.pop(own)) and parameter.grad is None
    assert not frozen
    after = logits(adapted)
    assert (after - before).abs().max() > 0.05

    lora.save_adapter(adapted, tmp_path / "adapter")
    assert {p.suffix for p in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    assert torch.equal(logits(loaded), after)

    merged = lora.merge_adapter(adapted)
    assert type(merged) is type(plain) and not any("lora" in name for name, _ in merged.named_modules())
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=0)


def test_the_product_by_hand(make, peft):
    model = make("llama")
    weight = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    adapted = lora.add_adapter(model, rank=3, alpha=6.0)
    train(adapted)
    parts = {
        name.split(".")[-3]: p.detach()
        for name, p in adapted.named_parameters()
        if "layers.1.self_attn.q_proj.l" in name
    }
    merged = lora.merge_adapter(adapted)
    expected = weight + 6.0 / 3 * parts["lora_B"] @ parts["lora_A"]
    torch.testing.assert_close(merged.model.layers[1].self_attn.q_proj.weight.detach(), expected)


def test_targets(make, peft):
    assert set(lora.linear_names(make("llama"))) == ATTENTION_AND_MLP
    assert set(lora.linear_names(make("mamba2"))) == ATTENTION_AND_MLP | {"in_proj", "out_proj"}
    assert set(lora.linear_names(make("gpt2"))) == {"c_attn", "c_proj", "c_fc"}
    adapted = lora.add_adapter(make("mamba2"), 2, targets=["in_proj", "mlp.up_proj"])
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"in_proj", "up_proj"}
    with pytest.raises(ValueError, match="has an adapter already"):
        lora.add_adapter(adapted)
    for options, words in (
        ({"targets": ["q_proj", "query"]}, "'query'; there are \\['down_proj'"),
        ({"targets": "q_proj"}, "a list of names"),
        ({"targets": []}, "a list of names"),
        ({"rank": 0}, "rank must be a whole number from 1 up, got 0"),
        ({"dropout": 1.0}, "below 1, got 1.0"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"bits": 8}, "bits must be 4 or None, got 8"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            lora.add_adapter(make("llama"), **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter"):
        lora.merge_adapter(make("llama"))


def test_bfloat16(make, peft):
    adapted = lora.add_adapter(make("llama").bfloat16(), 4, dropout=0.1)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    train(adapted)
    after = logits(adapted)
    merged = lora.merge_adapter(adapted)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    exact = logits(copy.deepcopy(merged).float())
    rounding = (logits(merged).float() - exact).norm()  # of bfloat16 itself, in the model's own products
    assert (logits(merged).float() - after.float()).norm() < 4 * rounding


def test_features_and_matrices_reach_through_the_adapter(make, peft):
    """An adapted mixer's matrix is that of its merged weights, with gradients for the adapter."""
    teacher, adapted = make("llama"), lora.add_adapter(make("mamba2"), 4)
    train(adapted)
    match = AttentionMatch([(0, 0), (1, 1)])
    with collect_attention(teacher, [0, 1]) as theirs, torch.no_grad():
        teacher(input_ids=ids())
    values, hidden = [], []
    for merge in (False, True):
        model = lora.merge_adapter(adapted) if merge else adapted
        model.zero_grad()
        with collect_attention(model, [0, 1]) as mine, collect_hidden(model, [0, 2]) as kept:
            model(input_ids=ids())
        losses = match.losses(mine, theirs)
        if not merge:
            losses[1, 1].backward(retain_graph=True)
            grads = [p.grad for n, p in model.named_parameters() if "layers.1.self_attn.in_proj.lora_" in n]
            assert len(grads) == 2 and all(g.abs().sum() > 0 for g in grads)
        values.append(torch.stack(list(losses.values())).detach())
        hidden.append(torch.stack([kept[0], kept[2]]).detach())
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-4)


def test_generate(make, peft):
    adapted = lora.add_adapter(make("mamba2"), 4)
    train(adapted)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    tokens = adapted.generate(input_ids=ids(), **options)
    assert torch.equal(tokens, lora.merge_adapter(adapted).generate(input_ids=ids(), **options))


@pytest.mark.parametrize("kind", ["llama", "mamba2", "discrete_mamba2", "kimi_delta"])
@pytest.mark.parametrize("how", ["loaded", "in memory"])
def test_four_bits(kind, how, make_llama, peft, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = make_llama(hidden_size=64, intermediate_size=128)  # shapes that bitsandbytes can pack
    model = model if kind == "llama" else hybrid_from_teacher(model, [1], mixer=kind).eval()
    model.save_pretrained(tmp_path)
    if how == "loaded":
        config = lora.four_bit_config(torch.float32)
        loaded = type(model).from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"}).eval()
        if kind == "llama":
            logits(loaded)  # bitsandbytes may pack its weights for inference here, which has no gradient
        adapted = lora.add_adapter(loaded, 4)
    else:
        lora._why_no_four_bits.cache_clear()  # the probe runs here
        adapted = lora.add_adapter(copy.deepcopy(model), 4, bits=4)
    assert lora.is_quantised(adapted)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    packed = sum(p.numel() for p in adapted.parameters() if p.dtype == torch.uint8)
    linears = [m for _, m in lora._inner(model) if isinstance(m, torch.nn.Linear)]
    assert packed == sum((m.weight.numel() + 1) // 2 for m in linears)
    losses = train(adapted, 4)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    after = logits(adapted)
    merged = lora.merge_adapter(adapted)
    assert type(merged) is type(model) and not lora.is_quantised(merged)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged), after, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=0)


def test_four_bits_in_memory_are_those_that_are_loaded(make_llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = make_llama(hidden_size=64, intermediate_size=128, attention_bias=True)
    model.save_pretrained(tmp_path)
    config = lora.four_bit_config(torch.float32)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"}).eval()
    lora.keep_unpacked(loaded)
    exact = logits(model)
    quantised = lora.quantise(model)
    assert not torch.equal(logits(quantised), exact)
    torch.testing.assert_close(logits(quantised), logits(loaded), rtol=1e-5, atol=1e-5)


def test_missing_packages_in_one_line(make_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"\(peft\): run pip install '\.\[lora\]' in mohawk's checkout"):
        lora.add_adapter(make_llama())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    lora._why_no_four_bits.cache_clear()
    with pytest.raises(ValueError, match="4 bits on cpu: needs the package bitsandbytes") as caught:
        lora.four_bit_config()
    lora._why_no_four_bits.cache_clear()
    assert "\n" not in str(caught.value)


def test_a_backend_that_does_not_run_in_one_line():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="4 bits on nowhere: bitsandbytes does not run"):
        lora.four_bit_config(device="nowhere")


def test_an_adapter_of_tied_embeddings_is_not_merged_into_both(make_llama, peft):
    """A head of its own takes its adapter; one that is the embedding too would change what the model reads."""
    own = lora.add_adapter(make_llama(1), 4, targets=["lm_head", "q_proj"])
    with torch.no_grad():
        for parameter in (p for p in own.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
        adapted = own(input_ids=ids()).logits
        embedding = own.get_input_embeddings().weight.clone()
        merged = lora.merge_adapter(own)
        torch.testing.assert_close(merged(input_ids=ids()).logits, adapted, rtol=1e-4, atol=1e-4)
        assert torch.equal(merged.get_input_embeddings().weight, embedding)
    tied = make_llama(1, tie_word_embeddings=True)
    for targets in (["lm_head"], ["q_proj", "lm_head"]):
        with pytest.raises(ValueError, match="^LoRA: the output embedding is the input embedding too") as caught:
            lora.add_adapter(tied, 4, targets=targets)
        assert "\n" not in str(caught.value)
    assert torch.equal(tied(input_ids=ids()).logits, make_llama(1, tie_word_embeddings=True)(input_ids=ids()).logits)
    for target in ("lm_head", "embed_tokens"):  # as peft makes one by itself
        adapted = peft.get_peft_model(make_llama(1, tie_word_embeddings=True), peft.LoraConfig(target_modules=[target]))
        with pytest.raises(
            ValueError, match="^LoRA: the adapter is of an embedding that is input and output"
        ) as caught:
            lora.merge_adapter(adapted)
        assert "\n" not in str(caught.value)


def adapted_and_merged(mesh) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits with an adapter that does something, and the weights once it is merged."""
    model = tiny_teacher(vocab_size=258)
    if mesh is not None:
        shard(model, mesh)
    adapted = lora.add_adapter(model, rank=2)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == [
        n for n, _ in adapted.named_parameters() if "lora_" in n
    ]
    with torch.no_grad():
        logits = adapted(ids()).logits
    merged = lora.merge_adapter(adapted)
    reshard(merged)
    return logits, {name: whole(p) for name, p in merged.named_parameters()}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("names", [("parts",), ("replicas", "parts"), None])
def test_an_adapter_of_a_model_in_parts_is_that_of_the_whole(names, peft, tmp_path):
    """Whatever the dimensions of the mesh are called: peft goes by their names, or takes a part's shape."""
    from torch.distributed.device_mesh import init_device_mesh

    def body(rank):
        shape = (1, 2) if names is not None and len(names) == 2 else (2,)
        torch.manual_seed(0)
        return adapted_and_merged(init_device_mesh("cpu", shape, mesh_dim_names=names))

    torch.manual_seed(0)
    logits, weights = adapted_and_merged(None)
    for found, found_weights in in_processes(tmp_path, 2, body):
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
        assert found_weights.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, rtol=1e-5, atol=1e-6)
