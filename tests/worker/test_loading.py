"""Bytes, placing and loading, on small models."""

import json

import optimum.quanto
import pytest
import torch
import zoo
from conftest import make_model
from models import load
from results import settings
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, QuantoConfig

from _qwquanto.channel import Failure
from _qwquanto.results import Result
from _qwquanto.settings import BITS
from _qwquanto.verdicts import grave_warnings
from _qwquanto.worker import loading
from _qwquanto.worker.checkpoint import download_model
from _qwquanto.worker.loading import (
    decode_weight_bytes,
    expected_bytes,
    has_experts,
    load_model,
    make_meta_model,
    place_model,
    random_state,
    stored_bytes,
    weight_stats,
)
from _qwquanto.worker.quanto import linear_layers, patch_quanto


def test_one_gpu_if_the_model_fits_it_else_all(monkeypatch, messages):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False, dtype=torch.float32, device="meta"))
    model.get_output_embeddings = lambda: None
    free, total = {"cuda:0": 200, "cuda:1": 1000}, [1000]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], *total))
    model.dtype = torch.float32

    def place():
        placed, _ = place_model(settings(weights=None), list(free), model, 256)
        return placed, "tried all the same" in messages[-1]["log"]

    assert place() == (["cuda:1"], False)
    free["cuda:1"] = 200
    assert place() == (["cuda:0", "cuda:1"], False)
    free["cuda:1"] = 10
    assert place() == (["cuda:0", "cuda:1"], True)
    total[0] = 100
    with pytest.raises(Failure, match="need"):
        place()


def by_hand(config, bits, tied):
    """Stored bytes of the tiny Qwen2 (bf16): from its shape alone."""
    h, m, kv, v, layers = (
        config.hidden_size,
        config.intermediate_size,
        64,
        config.vocab_size,
        config.num_hidden_layers,
    )
    linear = [(h, h), (kv, h), (kv, h), (h, h), (m, h), (m, h), (h, m)]  # out, in
    rest = 2 * (h + kv + kv + 2 * h)  # biases and norms of a layer
    if bits == 16:
        stored = sum(2 * o * i for o, i in linear)
    elif bits == 8:
        stored = sum(o * i + 2 * o for o, i in linear)  # a scale a row
    else:
        stored = sum(
            o * i * bits // 8 + 2 * 2 * o * i // 128 for o, i in linear
        )  # scale and shift a group of 128
    return layers * (stored + rest) + 2 * h + 2 * h * v * (1 if tied else 2)


@pytest.mark.parametrize("tied", [True, False])
def test_stored_bytes_of_every_precision(tmp_path, tied):
    folder = make_model(tmp_path, steps=0, tie=tied)
    config = AutoConfig.from_pretrained(folder)
    for weights, bits in BITS.items():
        model = load(folder, weights)
        stats = weight_stats(model, ["cpu"])
        buffers = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
        assert stats["weight_bytes"] - buffers == by_hand(config, bits, tied), weights
        assert stats["unquantized_bytes"] - buffers == by_hand(config, 16, tied)
        assert (stats["quantized_layers"], stats["linear_layers"]) == (0 if weights == "none" else 14, 15)
        meta_model = make_meta_model(settings(model_name=folder), folder)
        assert expected_bytes(meta_model, weights) == pytest.approx(stats["weight_bytes"], rel=0.01)


def test_tensors_that_share_memory_are_stored_once():
    """Tied weights may be two parameters; what is empty has no address of its own."""
    patch_quanto()
    weight = torch.nn.Parameter(torch.ones(32, 16, dtype=torch.bfloat16), requires_grad=False)
    tied, other = torch.nn.Parameter(weight.data, requires_grad=False), torch.ones(3)
    assert stored_bytes([weight, tied, weight]) == weight.nbytes == 1024
    assert stored_bytes([weight, other, torch.ones(0), torch.ones(0)]) == 1024 + 12
    layer = optimum.quanto.QLinear.from_module(torch.nn.Linear(16, 32), weights=optimum.quanto.qint8)
    layer.freeze()
    again = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert stored_bytes([layer.weight, again]) == 32 * 16 + 32 * 4  # numbers, and a scale a row


def test_an_untied_input_embedding_is_not_read_by_a_decode_step(tmp_path):
    read = {}
    for tied in (True, False):
        (tmp_path / str(tied)).mkdir()
        model = load(make_model(tmp_path / str(tied), steps=0, tie=tied), "int8")
        read[tied] = decode_weight_bytes(model)
    assert read[True] == read[False]


def zoo_model(name, **options):
    config = zoo.make_config(name)
    for key, value in options.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_mixture_of_experts_is_known_whatever_its_modules_are_called():
    """A step reads some of the experts: what it reads is unknown, and with it MBU."""
    for name in ("mixtral", "granitemoe", "jetmoe", "dbrx", "qwen2_moe"):
        assert has_experts(zoo_model(name)), name
    assert has_experts(zoo_model("doge", is_moe=True, num_experts=9))  # two embeddings of 9 experts
    granite = zoo_model("granitemoe")
    for layer in granite.model.layers:  # as remote code, or another release, may call them
        layer.mlp = layer.block_sparse_moe
        del layer.block_sparse_moe
        layer.mlp.bank = layer.mlp.experts
        del layer.mlp.experts
    assert not any("expert" in name or "moe" in name for name, _ in granite.named_modules())
    assert has_experts(granite) and decode_weight_bytes(granite) is None


def test_a_dense_model_is_none_though_its_configuration_counts_experts():
    for name in ("qwen2", "falcon_mamba", "gemma4_text", "nemotron_h", "recurrent_gemma", "zamba"):
        assert not has_experts(zoo_model(name)), name
    assert not has_experts(zoo_model("doge", is_moe=False, num_experts=9))


def test_random_weights_have_the_modules_and_bytes_of_a_real_load(tmp_path):
    folder = make_model(tmp_path, steps=0)
    for weights in BITS:
        s = settings(model_name=folder, random_weights=True, weights=None if weights == "none" else weights)
        random, real = load_model(s, folder, make_meta_model(s, folder), ["cpu"]), load(folder, weights)
        assert weight_stats(random, ["cpu"]) == weight_stats(real, ["cpu"])
        assert [(n, type(m)) for n, m in random.named_modules()] == [
            (n, type(m)) for n, m in real.named_modules()
        ]
        head, embedding = random.get_output_embeddings(), random.get_input_embeddings()
        assert head.weight.data_ptr() == embedding.weight.data_ptr(), "still tied"
        assert head.weight.float().std().item() == pytest.approx(0.02, rel=0.1)


def test_the_default_model_needs_no_file_and_has_its_published_size():
    assert download_model("Qwen/Qwen2.5-3B", True, False) is None
    meta_model = make_meta_model(settings(random_weights=True), None)
    assert sum(p.numel() for p in meta_model.parameters()) == 3_085_938_688
    assert expected_bytes(meta_model, "none") / 1e9 == pytest.approx(6.172, abs=0.001)
    assert expected_bytes(meta_model, "int8") / 1e9 == pytest.approx(3.399, abs=0.001)
    assert len(linear_layers(meta_model)) == 252


def test_gpt2_has_nothing_to_quantize_and_the_report_says_so(tmp_path):
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 50}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    stats = weight_stats(load(tmp_path, "int8"), ["cpu"])
    assert stats["quantized_layers"] == 0 and stats["weight_bytes"] == stats["unquantized_bytes"]
    assert "NOTHING WAS QUANTIZED" in " ".join(grave_warnings(Result(settings(), **stats)))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file

    folder = make_model(tmp_path, steps=0)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("model.layers.1.mlp.down_proj.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for weights in ("none", "int8"):
        with pytest.raises(Failure, match="down_proj"):
            load(folder, weights)


def test_a_configuration_without_dtype_takes_the_checkpoints(tmp_path):
    folder = make_model(tmp_path, steps=0)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert make_meta_model(settings(model_name=folder), folder).dtype == torch.bfloat16


def test_out_of_memory_says_what_would_fit(tmp_path, monkeypatch):
    folder = make_model(tmp_path, steps=0)
    meta_model = make_meta_model(settings(model_name=folder), folder)
    sizes = {weights: expected_bytes(meta_model, weights) for weights in BITS}

    def advice(free, weights, stored=None):
        s = settings(model_name=folder, weights=weights)
        monkeypatch.setattr(loading, "memory_of", lambda device: (free, 2**40))
        return place_model(s, ["cpu"], meta_model, stored)[1]

    # what has just failed is no advice
    would_fit = advice(int(sizes["int4"] * 1.2), "float8")
    assert "would fit: int4" in would_fit and "int8" not in would_fit
    assert "fewer tokens" in advice(10**12, "int2")
    assert "fewer tokens" in advice(10**12, None, stored=sizes["int8"])  # quantized already


def test_quantized_model_is_the_one_that_transformers_gives(tiny):
    mine = load(tiny, "int8")
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny, dtype="auto", quantization_config=QuantoConfig(weights="int8")
    )
    ids = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("tie", [True, False])
def test_random_weights(tiny, tie):
    config = AutoConfig.from_pretrained(tiny, tie_word_embeddings=tie)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = random_state(empty)
    options = {"config": config, "state_dict": state, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    model, told = type(empty).from_pretrained(None, **options, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(stored) == len(list(model.parameters())), (
        "parameters share memory: their bytes are counted once"
    )
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(
        weight, type(empty).from_pretrained(None, **options).model.layers[0].mlp.up_proj.weight
    )
    assert (model.model.norm.weight == 1).all()
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
