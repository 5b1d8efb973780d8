"""Attention and cache of the compiled decode step, its regions and graphs, and its loop."""

from __future__ import annotations

import copy
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput

from _qwquanto.channel import Failure
from _qwquanto.compiled.kernels import triton
from _qwquanto.compiled.layers import INDUCTOR_OPTIONS, DequantLinear
from _qwquanto.compiled.ops import flash_decode, supports_pdl

BUCKET_TOKENS = 256  # places of the cache that are read are a multiple; on CUDA one graph each


def bucketed_attention(module, query, key, value, mask, scaling=None, **more):
    """Attention over the first mask.shape[-1] places of the cache; heads of a group share keys uncopied.

    transformers' own sdpa copies keys and values for every head, and reads all of a static cache. Refuses the
    variants that it would get wrong.
    """
    unknown = {name for name, value in more.items() if value is not None}
    unknown &= {"softcap", "s_aux", "sliding_window", "position_bias"}
    if unknown or mask is None:
        raise Failure(f"this script's step does not know this attention ({', '.join(unknown) or 'no mask'})")
    batch, heads, length, size = query.shape
    # value.shape: DeepSeek's values are narrower
    if length == 1 and query.is_cuda and triton and value.shape == key.shape:
        out = flash_decode(query.contiguous(), key, value, mask, scaling)
        return out.view(batch, 1, heads, size), None
    key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
    if length == 1:
        query = query.view(batch, key.shape[1], -1, size)
        # sums, not matmuls: Inductor fuses and vectorizes them; in float32 Qwen2's large scores stay exact
        scores = (query[..., None, :].float() * key[:, :, None]).sum(-1) * scaling
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), -1)
        out = (weights[..., None] * value[:, :, None]).sum(-2).to(value.dtype)
    else:
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


class StepLayer(StaticLayer):
    """A layer of the step's cache: all share one tensor with the token's position, and none counts itself."""

    def __init__(self, max_cache_len: int, position: torch.Tensor) -> None:
        super().__init__(max_cache_len)
        self.position = position  # [1]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        """Write a prompt from the first place on, one token at the position; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[-2]
        places = self.position if length == 1 else torch.arange(length, device=self.device)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0  # generate() always begins anew

    def reset(self) -> None:
        self.position.zero_()


def draw_token(scores: torch.Tensor, do_sample: bool, top_k: int | None) -> torch.Tensor:
    """A token [1, 1] by its scores [1, vocabulary]: the best, or one of all, or one of the `top_k` best."""
    if not do_sample:
        return scores.argmax(-1, keepdim=True)
    if not top_k:
        return torch.multinomial(scores.softmax(-1), 1)
    best, tokens = scores.topk(min(top_k, scores.shape[-1]))
    # as torch.multinomial draws, but without the kernels of its checks
    race = best.softmax(-1) / torch.empty_like(best).exponential_()
    return tokens.gather(-1, race.argmax(-1, keepdim=True))


def run_region(region: torch.nn.Module, *args: Any, **inputs: Any) -> Any:
    return type(region).forward(region, *args, **inputs)


def region_key(region: torch.nn.Module) -> str:
    """Equal for modules that do the same with other tensors: all but their numbers and place in the model."""
    kinds = bool, int, float, str, slice, tuple, list, dict, type(None), torch.dtype, types.FunctionType
    found = []
    for name, module in region.named_modules():
        held = {
            k: v for k, v in vars(module).items() if k[0] != "_" and k != "layer_idx" and isinstance(v, kinds)
        }
        tensors = {**module._parameters, **module._buffers}.items()
        forms = [(k, v.shape, v.stride(), v.dtype) for k, v in tensors if v is not None]
        found.append((name, type(module), held, forms))
    return str(found)


def regions_of(model: Any, cache: StaticCache) -> list[tuple[torch.nn.Module, StaticCache | None]]:
    """What of a model is worth compiling; empty for a decoder that is built otherwise.

    Its layers, each with a cache that is its own at every index, the modules beside them (norms, positions)
    and the output layer.
    """
    output = model.get_output_embeddings()
    for decoder in model.modules():
        children = list(decoder.children())
        layers = next((c for c in children if isinstance(c, torch.nn.ModuleList)), ())
        indices = [{m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for layer in layers]
        if len(layers) != len(cache.layers) or any(found - {i, None} for i, found in enumerate(indices)):
            continue
        found = [(c, None) for c in children if not isinstance(c, torch.nn.ModuleList | torch.nn.Embedding)]
        found += [(output, None)] if isinstance(output, DequantLinear) else []
        for layer, layer_cache in zip(layers, cache.layers, strict=True):
            found.append((layer, copy.copy(cache)))
            found[-1][1].layers = [layer_cache] * len(layers)
        return found
    return []


class DecodeStep:
    """This script's step: what generate() calls for each token after the first, and what that needs."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        self.model = model
        self.graphs = {}
        self.original_attention = model.config._attn_implementation
        sizes = range(BUCKET_TOKENS, max_tokens + BUCKET_TOKENS, BUCKET_TOKENS)
        self.places = torch.arange(sizes[-1], device=model.device)
        self.buckets = {size: self.places[:size].clone() for size in sizes}
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros(1, dtype=torch.long, device=model.device)
        self.ended = torch.zeros(1, dtype=torch.bool, pin_memory=model.device.type == "cuda")
        self.cache = StaticCache(config=model.config, max_cache_len=1)
        # 16 more, so that the cache is never as long as a bucket: equal sizes would be taken for one
        self.cache.layers = [StepLayer(sizes[-1] + 16, self.position) for _ in self.cache.layers]
        self.stepping = False
        self.regions = regions_of(model, self.cache)

    def step(self, bucket: torch.Tensor) -> Any:
        mask = (bucket <= self.position)[None, None, None]
        torch._dynamo.maybe_mark_dynamic(mask, 3)  # one graph serves all buckets
        inputs = {"attention_mask": mask, "position_ids": self.position[None], "past_key_values": self.cache}
        self.stepping = True
        try:
            return self.model.forward(input_ids=self.token, **inputs, use_cache=True)
        finally:
            self.stepping = False

    def agrees(self) -> bool:
        """Whether the model answers the same by this step as by itself, for some prompt and a token.

        Rounding alone can move a nonsense prompt's logits by half, so one prompt suffices; a wrong
        step agrees on none.
        """
        config, device = self.model.config, self.model.device
        vocabulary = config.get_text_config().vocab_size
        try:
            for start in (vocabulary // 2, vocabulary // 3, vocabulary // 5, 2):
                ids = torch.arange(start, start + 9, device=device)[None]
                prompt, mask = ids[:, :-1], self.prompt_mask(ids[:, :-1, None])
                config._attn_implementation = self.original_attention
                wanted = self.model(ids, use_cache=False).logits[0, -2:].float()
                config._attn_implementation = "qwquanto"
                first = self.model(prompt, attention_mask=mask, past_key_values=self.cache, use_cache=True)
                self.token.copy_(ids[:, -1:])
                self.position.fill_(prompt.shape[1])
                then = self.step(self.buckets[BUCKET_TOKENS])
                found = torch.cat([first.logits[0, -1:], then.logits[0, -1:]]).float()
                if (found - wanted).norm() < 0.1 * wanted.norm():
                    return True
        except (Failure, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            pass  # the model asks its attention for something that this one does not know
        config._attn_implementation = self.original_attention
        return False

    def compile(self) -> None:
        """Have the step's regions compiled at their first call, and generate() use the step.

        Regional compilation, as PyTorch's recipe of that name has it: all layers as one graph took two to
        four times as long to compile. A call of a region costs a CPU some 20 us, and a GPU nothing, since its
        graph is replayed.
        """
        options = INDUCTOR_OPTIONS | {
            "triton.enable_pdl": self.model.device.type == "cuda" and supports_pdl()
        }
        # guards on shapes alone: nothing else changes here
        options["guard_filter_fn"] = lambda guards: [guard.guard_type == "SHAPE_ENV" for guard in guards]
        compiled: dict[str, Callable] = {}
        for region, cache in self.regions:
            key = region_key(region)
            if key not in compiled:
                # code of its own: Dynamo files graphs under the code, and no guard tells two regions apart
                code = run_region.__code__.replace(co_name=f"region_{id(self)}_{len(compiled)}")
                function = types.FunctionType(code, globals())
                compiled[key] = torch.compile(function, fullgraph=True, options=dict(options))
            run = functools.partial(self.run, region, region.forward, compiled[key], cache)
            region.forward = run
        self.model.create_masks_for_generate = self.prompt_mask
        # generate() looks its loop up in the class
        kind = type(self.model)
        loop = lambda model, *args, **options: self.sample(*args, **options)
        self.model.__class__ = type(kind.__name__, (kind,), {"_sample": loop, "__module__": kind.__module__})

    def run(
        self,
        region: torch.nn.Module,
        eager: Callable,
        compiled: Callable,
        cache: StaticCache | None,
        *args: Any,
        **inputs: Any,
    ) -> Any:
        """A region's forward: eager for a prompt, compiled in a step, then with the layer's own cache."""
        if not self.stepping:
            return eager(*args, **inputs)
        inputs = {name: cache if value is self.cache else value for name, value in inputs.items()}
        return compiled(region, *args, **inputs)

    def decode(self, token: torch.Tensor, length: int) -> torch.Tensor:
        """Logits [1, 1, vocabulary] after a token [1, 1], the last of `length`; on CUDA till called again."""
        size = -(-length // BUCKET_TOKENS) * BUCKET_TOKENS
        self.token.copy_(token)
        self.position.fill_(length - 1)
        if size not in self.graphs:
            return self.step(self.buckets[size]).logits
        graph, output = self.graphs[size]
        graph.replay()
        return output.logits

    def sample(
        self,
        tokens: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **inputs: Any,
    ) -> Any:
        """generate()'s loop for this step, in place of transformers' own (generation/utils.py, _sample).

        On CUDA the next step is under way before the host knows whether this token was the last: the GPU does
        not wait, and at the end of an answer one step is in vain. With top_k, a token is drawn among those k,
        not among the vocabulary. Both together made int8 10 % faster on an H100.
        """
        config = generation_config
        scores, logits = (), ()
        top_k = logits_processor[-1] if config.do_sample and logits_processor else None
        if not isinstance(top_k, transformers.TopKLogitsWarper) or config.output_scores:
            top_k = None
        processors = type(logits_processor)(logits_processor[:-1]) if top_k else logits_processor
        found = self.model._prefill(tokens, config, inputs, is_first_iteration=True).logits
        while True:
            raw = found[:, -1].to(torch.float32, copy=True)
            processed = processors(tokens, raw)
            token = draw_token(processed, config.do_sample, top_k and top_k.top_k)
            tokens = torch.cat([tokens, token], -1)
            scores += (processed,) * bool(config.output_scores)
            logits += (raw,) * bool(config.output_logits)
            if streamer:
                streamer.put(token[0].cpu())
            ended = stopping_criteria(tokens, scores)
            if tokens.shape[1] >= config.max_length:
                break
            if self.graphs:
                ended = self.ended.copy_(ended, non_blocking=True)
                copied = torch.cuda.current_stream(token.device).record_event()
                found = self.decode(token, tokens.shape[1])
                copied.synchronize()
            elif not ended:
                found = self.decode(token, tokens.shape[1])
            if ended:
                break
        if streamer:
            streamer.end()
        if not config.return_dict_in_generate:
            return tokens
        kept = {"scores": scores or None, "logits": logits or None, "past_key_values": self.cache}
        return GenerateDecoderOnlyOutput(sequences=tokens, **kept)

    @torch.no_grad()
    def capture_graphs(self) -> None:
        """Capture a CUDA graph for each bucket, once the step has been compiled by a first run."""
        pool = torch.cuda.graph_pool_handle()
        for size, bucket in self.buckets.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                output = self.step(bucket)
            self.graphs[size] = graph, output

    def replay_s(self, length: int, times: int = 20) -> float:
        """Seconds that the GPU needs for a step after `length` tokens: of replays in a row."""
        graph, _ = self.graphs[-(-length // BUCKET_TOKENS) * BUCKET_TOKENS]
        self.position.fill_(length - 1)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times

    def prompt_mask(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        length = inputs_embeds.shape[1]
        return (self.places[: -(-length // BUCKET_TOKENS) * BUCKET_TOKENS] <= self.places[:length, None])[
            None, None
        ]


transformers.AttentionInterface.register("qwquanto", bucketed_attention)
