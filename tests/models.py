"""Small models for the tests: loaded as the script does, or compiled and held against themselves."""

import optimum.quanto
import torch
import transformers
from conftest import ANSWER, QUESTION
from results import settings

from _qwquanto.compiled.prepare import graphs_compiled, prepare_compiled_decode
from _qwquanto.worker.loading import load_model, make_meta_model


def load(folder, weights):
    s = settings(model_name=str(folder), weights=None if weights == "none" else weights)
    return load_model(s, str(folder), make_meta_model(s, str(folder)), ["cpu"])


SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
PRECISIONS = ("none", "float8", "int8", "int4", "int2")
KINDS = {name: getattr(optimum.quanto, f"q{name}") for name in PRECISIONS[1:]}


def quantized(model, weights):
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    if weights != "none":
        optimum.quanto.quantize(model, weights=KINDS[weights], exclude="lm_head")
        optimum.quanto.freeze(model)
    return model


def trained(folder, weights):
    return quantized(transformers.AutoModelForCausalLM.from_pretrained(folder), weights)


def beginning(folder, length):
    """The first tokens of what the tiny model recites, [1, length]: what comes next is never a near tie."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor([[*tokenizer(QUESTION).input_ids, *tokenizer(ANSWER).input_ids][:length]])


def random_model(name, weights="none", **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SIZE | options)
    return quantized(transformers.AutoModelForCausalLM.from_config(config), weights)


def logits(model, prompt, length, forced=None, **options):
    """Logits of each new token, [length, vocabulary]; the tokens are `forced`, if given."""
    kept = []

    def keep(ids, scores):
        kept.append(scores[0].clone())
        if forced is not None:
            scores = torch.full_like(scores, -torch.inf)
            scores[0, forced[len(kept) - 1]] = 0
        return scores

    model.generate(
        prompt, max_new_tokens=length, do_sample=False, pad_token_id=0, logits_processor=[keep], **options
    )
    return torch.stack(kept)


def compile_and_compare(model, length=20, max_tokens=64, reference=None):
    """Compile a model; its logits for two prompts must be the eager ones within bf16's rounding.

    The eager ones are the `reference`'s, if given.
    """
    prompts = torch.arange(40, 50)[None], torch.arange(40, 45)[None]
    eager = [logits(reference or model, prompt, length) for prompt in prompts]
    done = prepare_compiled_decode(model, max_tokens)
    graphs, any_clear = graphs_compiled(), False
    for prompt, wanted in zip(prompts, eager, strict=True):
        found = logits(model, prompt, length, wanted.argmax(-1).tolist(), **done.options)
        top = wanted.topk(2).values
        clear = top[:, 0] - top[:, 1] > 0.03 * top[:, 0].abs()  # several times the rounding of bfloat16
        any_clear = any_clear or clear.any().item()
        assert (found.argmax(-1) == wanted.argmax(-1))[clear].all()
        assert (found - wanted).norm() / wanted.norm() < 0.02
    assert any_clear and graphs_compiled() == graphs
    return done
