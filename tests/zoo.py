"""Tiny random models of many architectures, from transformers' configurations; nothing is downloaded."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# What a configuration calls its sizes. From 256 columns on, groups have 128, as in large models.
SIZES = {
    "hidden_size": 256, "n_embd": 256, "d_model": 256, "embedding_size": 256, "word_embed_proj_dim": 256,
    "intermediate_size": 512, "n_inner": 512, "ffn_dim": 512, "ffn_hidden_size": 512, "decoder_ffn_dim": 512,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256, "max_position_embeddings": 256,
    "max_seq_len": 256, "n_positions": 256, "sliding_window": 8, "attention_window": 8,
    "max_window_layers": 1, "rotary_dim": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 160,
    "shared_expert_intermediate_size": 160, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 40, "kv_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "qk_head_dim": 48,
    "v_head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {"head_dim": 16, "num_key_value_heads": 4}  # multi-head latent attention: head_dim is the rotary part's
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64}

DEFAULTS = """
afmoe apertus arcee aria_text axk2 bart biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl cwm
deepseek_v2 deepseek_v32 deepseek_v4 diffllama doge dots3_note_text ernie4_5 ernie4_5_moe exaone4 exaone_moe
falcon falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma4_unified_text glm glm4 glm4_moe
glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa
granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lfm2 llama
llama4_text mamba mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3
mistral mixtral
modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phimoe
qwen2 qwen2_moe qwen3 qwen3_moe rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlstm
"""

# Name -> what differs from SIZES. A name is a model_type, and a remark after a space if there are several.
ZOO: dict[str, dict[str, Any]] = {
    name: {}
    for name in DEFAULTS.split()
} | {
    "axk1": MLA,
    "bailing_hybrid": HYBRID | {"mlp_layer_types": ["dense", "sparse"]},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 256},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "deepseek_v3": MLA,
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "falcon alibi": {"alibi": True},
    "falcon new": {"new_decoder_architecture": True},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 512},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [512, 512], "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 36,
        "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 36,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": HYBRID | {"mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": MLA | {"expert_ffn_hidden_size": 160, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 64, "layer_types": ["mamba", "attention", "mlp"]},
    "phi3": {"rope_parameters": None},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 256},
    "youtu": MLA,
    "zamba": {"num_hidden_layers": 6, "attn_layer_offset": 1, "attn_layer_period": 3},
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_headdim": 64,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
    # sizes that Quanto's kernels do not take
    "qwen2 100": {"hidden_size": 100, "intermediate_size": 200, "head_dim": 26},
    "llama 200": {"hidden_size": 200, "intermediate_size": 300, "head_dim": 50},
    "llama 8": {"hidden_size": 8, "intermediate_size": 36, "head_dim": 2},
    "mistral 36": {"hidden_size": 36, "intermediate_size": 100, "head_dim": 12},
    "llama 384": {"hidden_size": 384, "intermediate_size": 520, "head_dim": 132},
}  # fmt: skip

# What every run of the tests tries, in int8 and int4; all of it in all precisions is for `pytest -m zoo`.
SHORT = (
    "bloom", "cohere2", "deepseek_v3", "exaone4", "falcon", "falcon_h1", "falcon_mamba", "gemma2",
    "gemma3_text", "gemma3n_text", "glm4", "gpt_neox", "gpt_oss", "granite", "jamba", "lfm2", "llama4_text",
    "mamba", "mamba2", "minicpm3", "mistral", "mpt", "nemotron_h", "olmo2", "opt", "phi3", "phimoe",
    "qwen2_moe", "qwen3_next", "recurrent_gemma", "stablelm", "zamba2",
    "qwen2 100", "llama 200", "llama 8", "mistral 36", "llama 384",
)  # fmt: skip
NO_LINEAR = ("gpt2",)  # Conv1D instead: Quanto has nothing to quantize
NOT_WITH_QUANTO = {  # what transformers runs and Quanto does not -> what is said then
    "hrm_text": "issues during automatic conversion",  # integrations/quanto.py:42 takes one tensor of four
    "longcat_flash": "cannot be changed",  # tensor/weights/qbytes.py:294: its router reads float32
}


def make_config(name: str) -> PreTrainedConfig:
    """The configuration of one of the ZOO: of SIZES those that this kind of configuration knows."""
    kind, _, _ = name.partition(" ")
    default = AutoConfig.for_model(kind)
    known, aliases = default.to_dict(), default.attribute_map
    sizes = {key: value for key, value in SIZES.items() if key in known}
    sizes |= {key: value for key, value in SIZES.items() if key in aliases and aliases[key] not in sizes}
    if known.get("num_key_value_heads") == known.get("num_attention_heads"):
        sizes.pop("num_key_value_heads", None)  # no grouped queries in this architecture, or not by default
        sizes |= {"num_key_value_heads": 4} if known.get("num_key_value_heads") else {}
    return AutoConfig.for_model(kind, **sizes | ZOO[name])


def save_model(name: str, folder: str) -> None:
    """Write one of the ZOO to a folder in bfloat16, with weights so large that its answers differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0, 0.07)
    model.to(torch.bfloat16).save_pretrained(folder)


def dequantized(weight):
    """The numbers that a weight of Quanto's stands for, in float32, from its inner tensors."""
    if hasattr(weight, "_scale_shift"):  # TinyGemm: [groups, rows, 2]
        number = weight._data.unpack().float().view(len(weight), len(weight._scale_shift), -1)
        scale, shift = (weight._scale_shift[:, :, i].float().t()[:, :, None] for i in (0, 1))
        return ((number - 8) * scale + shift).flatten(1)
    scale = weight._scale.float()
    if weight._qtype.bits == 8:
        return weight._data.float() * scale
    number, shift = weight._data.unpack().float(), weight._shift
    values = number * scale - shift.float() if shift.is_floating_point() else (number - shift) * scale
    return values.reshape(weight.shape)
