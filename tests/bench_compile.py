"""What does compiling bring? Eager against compiled decode, for every precision, on the machine at hand.

    python tests/bench_compile.py                             # Qwen2.5-3B's shape, random weights
    python tests/bench_compile.py --model-name FOLDER         # a real model; or its shape, --random-weights
    python tests/bench_compile.py --compare none int8 --compare-tokens 2032 --max-seconds 600

The flags are the script's. Each precision in a process of its own, the same tokens eager and compiled in one
process; the ratio of run i's decode rates is shown as median and extremes. "Worst block" is the least ratio
over any 64 positions: at no position should compiled decode be slower. On a GPU, what a user would pick
instead runs too where it is installed: torchao's int8 (weight only), as transformers compiles it by itself.
"""

import importlib.util
import multiprocessing
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import qwquanto as q

BLOCK = 64
PATIENCE_S = 1800  # for torchao to load, compile and run


def block_rates(runs: list[q.Run]) -> list[float]:
    """Median decode tokens/s of each block of positions that all runs reached."""
    reached = min(len(run.inter_token_s) for run in runs)
    gaps = [[g for run in runs for g in run.inter_token_s[i : i + BLOCK]] for i in range(0, reached, BLOCK)]
    return [1 / statistics.median(block) for block in gaps]


def row(r: q.Result) -> str:
    """A line of the table."""
    if r.failure or not r.compiled:
        return f"| {r.label} | {r.failure or 'interrupted'} | | | | | |"
    eager, compiled = r.runs, r.compiled.runs
    ratios = sorted(
        c.decode_tokens_per_s / e.decode_tokens_per_s for e, c in zip(eager, compiled, strict=True)
    )
    blocks = zip(block_rates(eager), block_rates(compiled), strict=False)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    used, seconds = q.percent(r.compiled.bandwidth_utilization), q.format_3g(r.compiled.seconds)
    rates = f"{q.rate_text(eager)} | {q.rate_text(compiled)}"
    return f"| {r.label} | {rates} | {spread} | {min(c / e for e, c in blocks):.2f} | {used} | {seconds} |"


def torchao(s: q.Settings, pipe: Any, device: str = "cuda:0") -> None:
    """Decode rates and MBU of torchao's int8 weight-only model, as transformers compiles it."""
    from torchao.quantization import Int8WeightOnlyConfig  # where it is installed

    # Inductor makes a sum of a matrix-vector product, and fuses it with reading int8, only where it may tune
    # it (torch 2.11: _inductor/decomposition.py:372). torchao would have every combination tried, which had
    # not ended after seven minutes for Qwen2.5-3B on an H100; this is gpt-fast's setting.
    torch._inductor.config.coordinate_descent_tuning = True
    folder = q.download_model(s.model_name, s.random_weights, True)
    meta_model, bandwidth = q.make_meta_model(s, folder), q.memory_bandwidth(device)
    state = q.random_state(meta_model) if s.random_weights else None
    quantization = q.transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    model = type(meta_model).from_pretrained(
        None if s.random_weights else folder,
        config=meta_model.config,
        state_dict=state,
        dtype=meta_model.dtype,
        quantization_config=quantization,
        device_map={"": device},
    )
    tokenizer = None if s.random_weights else q.load_tokenizer(s.model_name, folder, s.trust_remote_code)
    prompt = q.tokenize(s, tokenizer, model.config).to(device)
    bench = q.Bench(s, [device], model=model.eval(), tokenizer=tokenizer, prompt=prompt)
    bench.new_tokens = s.compare_tokens
    bench.compiled = q.CompiledDecode(q.STATIC_CACHE, 0, {"cache_implementation": "static"})
    q.run_once(bench, 0, "compiling")
    q.warmup_runs(bench)
    runs = [q.run_once(bench, i, "run") for i in range(s.runs)]
    rates = [run.decode_tokens_per_s for run in runs]
    share = q.decode_weight_bytes(model) * statistics.median(rates) / bandwidth
    pipe.send((statistics.median(rates), min(rates), max(rates), share, q.graphs_compiled()))


def torchao_row(s: q.Settings) -> str:
    """The line of torchao, with the reason where there is no figure."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=torchao, args=(s, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE_S):
            return f"| torchao int8 | said nothing for {PATIENCE_S} s | | | | | |"
        median, low, high, share, graphs = receiver.recv()
        rate = f"{q.format_3g(median)} ({q.format_3g(low)}–{q.format_3g(high)})"
        name = f"torchao int8 by transformers, {q.plural(graphs, 'graph')}"
        return f"| {name} | – | {rate} | | | {q.percent(share)} | |"
    except EOFError:
        return "| torchao int8 by transformers | failed: run it alone to see why | | | | | |"
    finally:
        child.kill()


def main(argv: list[str]) -> None:
    given, _ = q.parse(argv)
    s = replace(given, compile=True, compare=given.compare or q.PRECISIONS, quality_tokens=0)
    if not argv:
        s = replace(s, random_weights=True)
    if problems := q.check(s):
        sys.exit("\n".join(problems))
    results: dict[str, q.Result] = {}
    view, stop = q.View(), q.Interruption()
    with view.progress:
        q.measure_all(s, lambda r: results.update({r.name: r}), view, stop, debug=False)
    print(f"\n{s.model_name}, {q.plural(s.runs, 'run')} of {s.compare_tokens} new tokens\n")
    print("| weights | eager tok/s | compiled tok/s | ratio (min–max) | worst block | MBU % | compile s |")
    print("|---|---|---|---|---|---|---|", *(row(r) for r in results.values()), sep="\n", flush=True)
    if not stop.seen and torch.cuda.is_available() and importlib.util.find_spec("torchao"):
        print(torchao_row(s), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
