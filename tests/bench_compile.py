"""What does compiling bring? Eager against compiled decode, for every precision, on the machine at hand.

    python tests/bench_compile.py                     # Qwen2.5-3B's shape, random weights
    python tests/bench_compile.py MODEL_FOLDER        # a real model
    python tests/bench_compile.py MODEL_FOLDER 64 2032    # new tokens of a run; default: 64

Each precision in a process of its own, the same tokens eager and compiled in one process; the ratio of run i's decode
rates is shown as median and extremes. "Worst block" is the least ratio over any 64 positions: at no position should
compiled decode be slower. On a GPU, torchao's int8 (weight only, compiled the same way) runs too where it is installed.
"""

import multiprocessing
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import qwquanto as q

BLOCK = 64


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


def torchao(s: q.Settings, pipe: "multiprocessing.connection.Connection") -> None:
    """Decode tokens/s of torchao's int8 weight-only model, compiled as the others are."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    q.quiet_libraries(debug=False)
    empty = q.skeleton(s, None if s.random_weights else s.model_name)
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": {"": "cuda:0"}}
    state = q.random_state(empty) if s.random_weights else None
    source = None if s.random_weights else s.model_name
    model = type(empty).from_pretrained(
        source, config=empty.config, state_dict=state, dtype=empty.dtype, **options
    )
    tokenizer, prompt = q.prompt_ids(s, s.model_name, model)
    rig = q.Rig(model.eval(), tokenizer, prompt, s.compare_tokens, 4096, True, ["cuda:0"], {})
    compiled = q.compile_decode(s, rig, lambda *_, **__: None)
    rates = [q.run_once(s, rig, i, lambda *_, **__: None, "").decode_tokens_per_s for i in range(s.runs)]
    pipe.send((statistics.median(rates), min(rates), max(rates), compiled.graphs))


def torchao_row(s: q.Settings) -> str:
    """The line of torchao, with the reason where there is no figure."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=torchao, args=(s, sender), daemon=True)
    child.start()
    sender.close()
    try:
        middle, low, high, _ = receiver.recv() if receiver.poll(400) else (None,) * 4
        return f"| torchao int8 | – | {q.digits(middle)} ({q.digits(low)}–{q.digits(high)}) | | | |"
    except EOFError:
        return "| torchao int8 | failed: run it alone to see why | | | | |"
    finally:
        child.kill()


def main(folder: str | None, *lengths: int) -> None:
    import importlib.util

    import torch

    model = {"model_name": folder} if folder else {"random_weights": True}
    base = replace(q.Settings(), **model, compile=True, compare=q.PRECISIONS, quality_tokens=0, runs=3)
    for tokens in lengths or (64,):
        s, results = replace(base, compare_tokens=tokens), {}
        tell = lambda text, live=False: None if live else print(text, file=sys.stderr, flush=True)
        q.compare(s, tell, lambda r, results=results: results.update({r.name: r}))
        print(f"\n{folder or q.MODEL_NAME}, runs of {tokens} new tokens\n")
        print("| weights | eager tok/s | compiled tok/s | ratio (min–max) | worst block | MBU % |")
        print("|---|---|---|---|---|---|", *(row(r) for r in results.values()), sep="\n", flush=True)
        if torch.cuda.is_available() and importlib.util.find_spec("torchao"):
            print(torchao_row(s), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:2] or [None], *map(int, sys.argv[2:]))
