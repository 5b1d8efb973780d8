"""Bytes, loading and Quanto's oddities, on small models."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import QUESTION, make_model
from optimum.quanto.library.extensions import extension
from optimum.quanto.tensor.weights.marlin.fp8.qbits import MarlinF8QBytesLinearFunction
from results import settings
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, QuantoConfig

from _qwquanto import channel
from _qwquanto.channel import Failure, describe_error
from _qwquanto.results import Result
from _qwquanto.settings import BITS
from _qwquanto.verdicts import grave_warnings
from _qwquanto.worker import loading
from _qwquanto.worker.checkpoint import check_checkpoint, download_model, load_tokenizer
from _qwquanto.worker.generation import Bench, run_once
from _qwquanto.worker.loading import (
    decode_weight_bytes,
    expected_bytes,
    has_experts,
    load_model,
    make_meta_model,
    place_model,
    weight_stats,
)
from _qwquanto.worker.measure import tokenize
from _qwquanto.worker.quality import measure_quality
from _qwquanto.worker.quanto import linear_layers, patch_quanto


def load(folder, weights):
    s = settings(model_name=str(folder), weights=None if weights == "none" else weights)
    return load_model(s, str(folder), make_meta_model(s, str(folder)), ["cpu"])


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


def test_no_extension_is_ever_built_and_unpack_is_quantos(monkeypatch):
    def build(*_, **__):
        raise AssertionError("a compiler was started")

    monkeypatch.setattr(extension, "load", build)
    patch_quanto()
    packed = torch.randint(0, 256, (16, 8), dtype=torch.uint8)
    for bits in (2, 4):
        parts = [(packed // 2**shift) % 2**bits for shift in range(0, 8, bits)]
        assert torch.equal(torch.ops.quanto.unpack(packed, bits), torch.cat(parts))


def test_upstream_float8_marlin_still_drops_the_bias():
    """Once this fails, `patch_quanto` may leave "quanto_cuda" alone: Marlin adds the bias (its docstring)."""
    source = inspect.getsource(MarlinF8QBytesLinearFunction.forward)
    assert source.count("bias") == 1, "the bias is used now"


def test_upstream_int2_still_builds_an_extension(monkeypatch):
    """Once this fails, `patch_quanto` may leave `unpack` alone."""

    class Started(Exception):
        pass

    def build(*_, **__):
        raise Started

    monkeypatch.setattr(extension, "load", build)
    registered = extension._extensions["quanto_cpp"]
    monkeypatch.setattr(registered, "_lib", None)
    with pytest.raises(Started):
        torch.ops.quanto.unpack(torch.zeros(4, dtype=torch.uint8), 2)


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


def test_sharded_and_damaged_checkpoints(tmp_path):
    folder = make_model(tmp_path, steps=0, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    check_checkpoint(settings(), folder, "cpu")
    assert weight_stats(load(folder, "int8"), ["cpu"])["quantized_layers"] == 14
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(Failure, match=f"{shards[1].name} is damaged"):
        check_checkpoint(settings(), folder, "cpu")
    shards[1].unlink()
    with pytest.raises(Failure, match="or a shard of it: download it again"):
        check_checkpoint(settings(), folder, "cpu")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path, steps=0)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("model.layers.1.mlp.down_proj.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for weights in ("none", "int8"):
        with pytest.raises(Failure, match="down_proj"):
            load(folder, weights)


def test_quality_against_an_independent_float64_computation(tiny, tmp_path):
    """KL and same top token of a forced decode, against one full forward pass in float64."""
    s = settings(model_name=tiny, quality_tokens=12, compare=("none", "int4"), dtype="float32")
    models, results, prompt = {}, {}, torch.tensor([[40, 41, 42, 43, 44]])
    for weights in (None, "int4"):
        mine = replace(s, weights=weights)
        models[weights] = load_model(mine, tiny, make_meta_model(mine, tiny), ["cpu"])
        bench, results[weights] = (
            Bench(mine, model=models[weights], prompt=prompt, positions_left=100),
            Result(mine),
        )
        results[weights].quality = measure_quality(bench, results[weights], tmp_path)
    answer = models[None].generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        at = slice(prompt.shape[1] - 1, answer.shape[1] - 1)
        logits = {w: m(answer).logits[0, at].double() for w, m in models.items()}
    p, r = (torch.log_softmax(logits[w], -1) for w in (None, "int4"))
    kl, quality = (p.exp() * (p - r)).sum(-1), results["int4"].quality
    assert results[None].is_reference and results[None].quality is None
    assert quality.positions == answer.shape[1] - prompt.shape[1]
    assert quality.kl_divergence == pytest.approx(kl.mean().item(), rel=1e-3)
    assert quality.kl_standard_error == pytest.approx(kl.std().item() / len(kl) ** 0.5, rel=1e-3)
    assert quality.kl_divergence > 1e-4
    assert quality.same_top_token == pytest.approx((p.argmax(-1) == r.argmax(-1)).double().mean().item())


def test_a_seed_gives_its_answer_again(tiny):
    s = settings(model_name=tiny, question=QUESTION, temperature=5.0)
    model = load(tiny, "int8")
    tokenizer = load_tokenizer(tiny, tiny, False)
    prompt = tokenize(s, tokenizer, model.config)
    bench = Bench(s, model=model, tokenizer=tokenizer, prompt=prompt, new_tokens=20)
    answers = [run_once(bench, seed, "run").text for seed in (3, 4, 3)]
    assert answers[0] == answers[2] != answers[1]


def test_a_question_without_room_is_refused(tiny):
    model, tokenizer = load(tiny, "int8"), load_tokenizer(tiny, tiny, False)
    count = tokenize(settings(), tokenizer, model.config).shape[1]
    assert tokenize(settings(max_length=count + 1), tokenizer, model.config).shape[1] == count
    with pytest.raises(Failure, match=f"has {count} tokens; MAX_LENGTH allows 1 to {count - 1}"):
        tokenize(settings(max_length=count), tokenizer, model.config)
    with pytest.raises(Failure, match="the model allows 1 to 4095"):
        tokenize(settings(question="+" * 9000, compare=("int8",)), tokenizer, model.config)


def test_a_configuration_without_dtype_takes_the_checkpoints(tmp_path):
    folder = make_model(tmp_path, steps=0)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert make_meta_model(settings(model_name=folder), folder).dtype == torch.bfloat16


def raised(error, step="running the model", advice=""):
    """What the user is told of an error raised in a step, and whether it is a lack of the machine."""
    with pytest.raises(type(error)) as found, channel.step(step):
        raise error
    return describe_error(found.value, advice)


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
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), cublas, MemoryError()):
        text = f"out of memory while running the model: {would_fit}"
        assert raised(error, advice=would_fit) == (text, False)


def test_a_model_with_code_of_its_own_names_the_flag():
    error = ValueError(
        "The repository contains custom code.\nPlease pass the argument `trust_remote_code=True`"
    )
    assert "--trust-remote-code" in raised(error)[0]


def test_what_this_machine_lacks_is_unavailable_not_failed():
    text, unavailable = raised(RuntimeError("InvalidCxxCompiler: No working C++ compiler found"))
    assert unavailable and "C++ compiler" in text
    text, unavailable = raised(ValueError("odd: see torch.compiler\nsecond line"), "compiling")
    assert (
        not unavailable and text == "ValueError while compiling: odd: see torch.compiler (--debug shows more)"
    )


def test_quantized_model_is_the_one_that_transformers_gives(tiny):
    mine = load(tiny, "int8")
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny, dtype="auto", quantization_config=QuantoConfig(weights="int8")
    )
    ids = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)
