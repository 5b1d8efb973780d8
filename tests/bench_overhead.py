"""What does measuring cost? The script's own timed run against a bare model.generate() of the same tokens.

    python tests/bench_overhead.py --model-name FOLDER
    python tests/bench_overhead.py --random-weights --compile --compare-tokens 128   # a GPU at its fastest

The flags are the script's; a generation has COMPARE_TOKENS tokens, 32 unless told. Alternating pairs in one
process, order swapped every time; prints the mean ratio of the times (1.01: measuring costs 1 %) and its 95 %
interval (Student's t on the logarithms of the pairs' ratios).
"""

import os
import sys
import time

import torch
from conftest import alternate, paired_interval
from results import parse

from _qwquanto.channel import CHANNEL
from _qwquanto.compiled.prepare import prepare_compiled_decode
from _qwquanto.settings import check
from _qwquanto.worker.checkpoint import download_model, load_tokenizer
from _qwquanto.worker.devices import choose_devices, nvml_handles, peak_memory, synchronize
from _qwquanto.worker.generation import Bench, generation_options, run_once
from _qwquanto.worker.loading import load_model, make_meta_model
from _qwquanto.worker.measure import tokenize


def main(argv: list[str], pairs: int = 24) -> None:
    s, _ = parse(["--compare", "--compare-tokens", "32", *argv])
    if problems := check(s):
        sys.exit("\n".join(problems))
    devices = choose_devices(s.device)[0][:1]
    handles, _ = nvml_handles(devices)
    folder = download_model(s.model_name, s.random_weights, True)
    model = load_model(s, folder, make_meta_model(s, folder), devices)
    tokenizer = None if s.random_weights else load_tokenizer(s.model_name, folder, s.trust_remote_code)
    prompt = tokenize(s, tokenizer, model.config).to(devices[0])
    bench = Bench(s, devices, handles, model=model, tokenizer=tokenizer, prompt=prompt)
    bench.new_tokens, bench.positions_left = s.compare_tokens, 4096
    if s.compile:
        bench.compiled = prepare_compiled_decode(model, prompt.shape[1] + s.compare_tokens)
    bare = generation_options(bench) | {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    bare |= bench.compiled.options if bench.compiled else {}
    CHANNEL.file = open(os.devnull, "w")  # noqa: SIM115 (a worker speaks into a pipe)

    def measured(seed: int) -> float:
        with peak_memory(devices, handles):  # as in `timed_runs`
            return run_once(bench, seed, "run").latency_s

    def plain(seed: int) -> float:
        torch.manual_seed(seed)
        synchronize(devices)
        begin = time.perf_counter()
        model.generate(prompt, **bare)
        synchronize(devices)
        return time.perf_counter() - begin

    ratio, low, high = paired_interval(*alternate(measured, plain, pairs))
    tokens = f"{pairs} pairs of {s.compare_tokens} tokens"
    print(f"{tokens}: mean ratio {ratio:.4f}, 95 % interval {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
