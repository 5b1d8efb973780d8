"""What does measuring cost? The script's own timed run against a bare model.generate() of the same tokens.

    python tests/bench_overhead.py --model-name FOLDER
    python tests/bench_overhead.py --random-weights --compile --compare-tokens 128   # a GPU at its fastest

The flags are the script's; a generation has COMPARE_TOKENS tokens, 32 unless told.
Alternating pairs in one process, order swapped every time; prints the median ratio of the times (1.01: measuring costs
1 %) and its 95 % interval from the order statistics of the pairs (a sign test's interval: no assumption on the noise).
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import qwquanto as q


def ratios_of(measured: Callable[[int], float], plain: Callable[[int], float], pairs: int) -> list[float]:
    """Sorted ratios of the seconds that two jobs take, from alternating pairs; each gets the pair's number as seed."""
    measured(0), plain(0)
    ratios = []
    for i in range(pairs):
        jobs = [measured, plain] if i % 2 else [plain, measured]
        times = {job: job(i) for job in jobs}
        ratios.append(times[measured] / times[plain])
        print(f"pair {i + 1}: {ratios[-1]:.4f}", file=sys.stderr, flush=True)
    return sorted(ratios)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the median of sorted values: ranks n/2 -+ 1.96 sqrt(n)/2."""
    n = len(ratios)
    off = 1.96 * math.sqrt(n) / 2
    return ratios[max(0, math.floor(n / 2 - off))], ratios[min(n - 1, math.ceil(n / 2 + off))]


def main(argv: list[str], pairs: int = 24) -> None:
    import torch

    s, _ = q.parse(["--compare-tokens", "32", *argv])
    if problems := q.check(s):
        sys.exit("\n".join(problems))
    devices = q.choose_devices(s.device)[0][:1]
    handles, _ = q.nvml_handles(devices)
    q.quiet_libraries(debug=False)
    folder = q.fetch(s)
    model = q.load(s, folder, q.skeleton(s, folder), devices)
    tokenizer, prompt = q.prompt_ids(s, folder, model)
    rig = q.Rig(model, tokenizer, prompt, s.compare_tokens, 4096, True, devices, handles)
    if s.compile:
        q.compile_decode(s, rig, lambda *_, **__: None)
    bare = q.options_for(s, rig) | {"attention_mask": torch.ones_like(prompt)} | rig.compile_options
    synchronize = q.synchronizer(devices)

    def measured(seed: int) -> float:
        with q.peak_memory(devices, handles), q.progress() as tell:  # as `measure` and `main` do
            return q.run_once(s, rig, seed, tell, "run").latency_s

    def plain(seed: int) -> float:
        torch.manual_seed(seed)
        if rig.compile_options:
            rig.compile_options["past_key_values"].reset()
        synchronize()
        begin = time.perf_counter()
        model.generate(prompt, **bare)
        synchronize()
        return time.perf_counter() - begin

    ratios = ratios_of(measured, plain, pairs)
    low, high = interval(ratios)
    told = f"median ratio {statistics.median(ratios):.4f}, 95 % interval {low:.4f} to {high:.4f}"
    print(f"{pairs} pairs of {s.compare_tokens} tokens: {told}")


if __name__ == "__main__":
    main(sys.argv[1:])
