"""What a user would pick instead of this script's compiled step: torchao's int8 (weight only), on a GPU.

    python tests/bench_torchao.py                        # Qwen2.5-3B's shape, random weights
    python tests/bench_torchao.py --model-name FOLDER    # a real model

As transformers compiles it by itself, with the script's clock and flags; silent while it compiles. Beside it:
`python qwquanto.py --compare none int8 --compile` with the same flags.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import transformers
from results import parse

from _qwquanto.compiled.prepare import STATIC_CACHE, CompiledDecode, graphs_compiled
from _qwquanto.settings import Settings, check
from _qwquanto.stats import decode_rate
from _qwquanto.text import percent, plural, rate_text
from _qwquanto.worker.checkpoint import download_model, load_tokenizer
from _qwquanto.worker.devices import memory_bandwidth
from _qwquanto.worker.generation import Bench, run_once, warmup_runs
from _qwquanto.worker.loading import decode_weight_bytes, make_meta_model, random_state
from _qwquanto.worker.measure import tokenize


def load_model(s: Settings, folder: str | None, device: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig  # where it is installed

    # Inductor makes a sum of a matrix-vector product, and fuses it with reading int8, only where it may tune
    # it (torch 2.11: _inductor/decomposition.py:372). torchao would have every combination tried, which had
    # not ended after seven minutes for Qwen2.5-3B on an H100; this is gpt-fast's setting.
    torch._inductor.config.coordinate_descent_tuning = True
    meta_model = make_meta_model(s, folder)
    quantization = transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    model = type(meta_model).from_pretrained(
        None if s.random_weights else folder,
        config=meta_model.config,
        state_dict=random_state(meta_model) if s.random_weights else None,
        dtype=meta_model.dtype,
        quantization_config=quantization,
        device_map={"": device},
    )
    return model.eval()


def main(argv: list[str], device: str = "cuda:0") -> None:
    given, _ = parse(argv)
    s = replace(given, compare=["int8"], random_weights=given.random_weights or not argv)
    if problems := check(s):
        sys.exit("\n".join(problems))
    if not (torch.cuda.is_available() and importlib.util.find_spec("torchao")):
        sys.exit("this needs a GPU and torchao: pip install torchao")
    folder = download_model(s.model_name, s.random_weights, True)
    bandwidth = memory_bandwidth(device)
    model = load_model(s, folder, device)
    tokenizer = None if s.random_weights else load_tokenizer(s.model_name, folder, s.trust_remote_code)
    prompt = tokenize(s, tokenizer, model.config).to(device)
    bench = Bench(s, [device], model=model, tokenizer=tokenizer, prompt=prompt)
    bench.new_tokens = s.compare_tokens
    bench.compiled = CompiledDecode(STATIC_CACHE, 0, {"cache_implementation": "static"})
    run_once(bench, 0, "compiling")
    warmup_runs(bench)
    runs = [run_once(bench, i, "run") for i in range(s.runs)]
    share = decode_weight_bytes(model) * decode_rate(runs) / bandwidth
    made = f"{plural(s.runs, 'run')} of {s.compare_tokens} tokens, {plural(graphs_compiled(), 'graph')}"
    print(f"torchao int8: {rate_text(runs)} tokens/s, MBU {percent(share)} % ({made})")


if __name__ == "__main__":
    main(sys.argv[1:])
