"""What does compiling bring? Eager against compiled decode, for every precision, on the machine at hand.

    python tests/bench_compile.py                             # Qwen2.5-3B's shape, random weights
    python tests/bench_compile.py --model-name FOLDER         # a real model; --random-weights: its config.json alone
    python tests/bench_compile.py --compare none int8 --compare-tokens 2032 --max-seconds 600

The flags are the script's. Each precision in a process of its own, the same tokens eager and compiled in one process; the
ratio of run i's decode rates is shown as median and extremes. "Worst block" is the least ratio over any 64 positions: at
no position should compiled decode be slower. On a GPU, what a user would pick instead runs too where it is installed:
torchao's int8 (weight only), compiled by transformers itself.
"""

import multiprocessing
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import qwquanto as q

BLOCK = 64
PATIENCE = 1800  # s for torchao to load, compile and run


def block_rates(runs: list[q.Run]) -> list[float]:
    """Median decode tokens/s of each block of positions that all runs reached."""
    reached = min(len(run.inter_token_s) for run in runs)
    gaps = [[g for run in runs for g in run.inter_token_s[i : i + BLOCK]] for i in range(0, reached, BLOCK)]
    return [1 / statistics.median(block) for block in gaps]


def row(r: q.Result) -> str:
    """A line of the table."""
    if r.failure:
        return f"| {r.name} | {r.failure} | | | | |"
    pairs = zip(r.eager_runs, r.runs, strict=True)
    ratios = sorted(c.decode_tokens_per_s / e.decode_tokens_per_s for e, c in pairs)
    blocks = zip(block_rates(r.eager_runs), block_rates(r.runs), strict=False)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    rates = f"{q.digits(q.decode_rate(r.eager_runs))} | {q.digits(q.decode_rate(r.runs))}"
    return f"| {r.name} | {rates} | {spread} | {min(c / e for e, c in blocks):.2f} | {q.percent(r.bandwidth_utilization)} |"


def torchao(s: q.Settings, pipe: "multiprocessing.connection.Connection", device: str = "cuda:0") -> None:
    """Decode rates and MBU of torchao's int8 weight-only model; transformers compiles it where its cache is static."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import StaticCache, TorchAoConfig, logging

    # Inductor makes a sum of a matrix-vector product, and fuses it with reading int8, only where it may tune it
    # (torch 2.11: _inductor/decomposition.py:372). torchao would have every combination tried, which had not ended after
    # seven minutes for Qwen2.5-3B on an H100; this is gpt-fast's setting.
    torch._inductor.config.coordinate_descent_tuning = True

    q.quiet_libraries(debug=False)
    logging.disable_progress_bar()
    folder = q.fetch(s)
    empty = q.skeleton(s, folder)
    bandwidth = q.memory_bandwidth(device)
    quantized = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    options = {"quantization_config": quantized, "device_map": {"": device}}
    state = q.random_state(empty) if s.random_weights else None
    source = None if s.random_weights else folder
    model = type(empty).from_pretrained(
        source, config=empty.config, state_dict=state, dtype=empty.dtype, **options
    )
    tokenizer, prompt = q.prompt_ids(s, folder, model)
    length = prompt.shape[1] + s.compare_tokens
    cache = StaticCache(config=model.config, max_cache_len=length)
    compiled = {"past_key_values": cache}
    room = q.room_after(s, model, prompt.shape[1])
    rig = q.Rig(
        model.eval(), tokenizer, prompt, s.compare_tokens, room, True, [device], {}, compile_options=compiled
    )
    silent = lambda *_, **__: None
    q.run_once(s, rig, 0, silent, "")
    q.warmup_runs(s, rig, silent, "")
    rates = [q.run_once(s, rig, i, silent, "").decode_tokens_per_s for i in range(s.runs)]
    weights, cached = q.bytes_per_token(model, q.weigh(model)["weight_bytes"])
    read = weights + cached * length  # all of a static cache
    share = read * statistics.median(rates) / bandwidth
    pipe.send((statistics.median(rates), min(rates), max(rates), share, q.graphs_compiled()))


def torchao_row(s: q.Settings) -> str:
    """The line of torchao, with the reason where there is no figure."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=torchao, args=(s, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE):
            return f"| torchao int8 | said nothing for {PATIENCE} s | | | | |"
        middle, low, high, share, graphs = receiver.recv()
        rate = f"{q.digits(middle)} ({q.digits(low)}–{q.digits(high)})"
        return f"| torchao int8, {q.counted(graphs, 'graph')} | – | {rate} | | | {q.percent(share)} |"
    except EOFError:
        return "| torchao int8 | failed: run it alone to see why | | | | |"
    finally:
        child.kill()


def main(argv: list[str]) -> None:
    import importlib.util

    import torch

    given, _ = q.parse(argv)
    s = replace(given, compile=True, compare=given.compare or q.PRECISIONS, quality_tokens=0)
    if not argv:
        s = replace(s, random_weights=True)
    if problems := q.check(s):
        sys.exit("\n".join(problems))
    tell, results = lambda text, live=False: None if live else print(text, file=sys.stderr, flush=True), {}
    q.compare(s, tell, lambda r: results.update({r.name: r}))
    print(f"\n{s.model_name}, {q.counted(s.runs, 'run')} of {s.compare_tokens} new tokens\n")
    print("| weights | eager tok/s | compiled tok/s | ratio (min–max) | worst block | MBU % |")
    print("|---|---|---|---|---|---|", *(row(r) for r in results.values()), sep="\n", flush=True)
    if torch.cuda.is_available() and importlib.util.find_spec("torchao"):
        tell("torchao int8: loading and compiling: this takes some minutes")
        print(torchao_row(s), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
