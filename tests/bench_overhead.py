"""What does measuring cost? The script's own timed run against a bare model.generate() of the same tokens.

    python tests/bench_overhead.py MODEL_FOLDER [PAIRS]

Alternating pairs in one process, order swapped every time; prints the median ratio of the times (1.01: measuring costs
1 %) and its 95 % interval from the order statistics of the pairs (a sign test's interval: no assumption on the noise).
"""

import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import qwquanto as q


def main(folder: str, pairs: int = 24, tokens: int = 32) -> None:
    import torch

    s = replace(q.Settings(), model_name=folder)
    devices, _ = q.choose_devices("auto")
    handles, _ = q.nvml_handles(devices[:1])
    q.quiet_libraries(debug=False)
    model = q.load(s, folder, q.skeleton(s, folder), devices[:1])
    tokenizer, prompt = q.prompt_ids(s, folder, model)
    rig = q.Rig(model, tokenizer, prompt, tokens, 4096, True, devices[:1], handles)
    bare = q.options_for(s, rig) | {"attention_mask": torch.ones_like(prompt)}
    synchronize = q.synchronizer(devices[:1])

    def measured(seed: int) -> float:
        with q.peak_memory(devices[:1], handles), q.progress() as tell:  # as `measure` and `main` do
            return q.run_once(s, rig, seed, tell, "run").latency_s

    def plain(seed: int) -> float:
        torch.manual_seed(seed)
        synchronize()
        begin = time.perf_counter()
        model.generate(prompt, **bare)
        synchronize()
        return time.perf_counter() - begin

    measured(0), plain(0)
    ratios = []
    for i in range(pairs):
        jobs = [measured, plain] if i % 2 else [plain, measured]
        times = {job: job(i) for job in jobs}
        ratios.append(times[measured] / times[plain])
        print(f"pair {i + 1}: {ratios[-1]:.4f}", file=sys.stderr, flush=True)
    ratios.sort()
    # 95 % interval of a median: ranks n/2 -+ 1.96 sqrt(n)/2
    off = 1.96 * math.sqrt(pairs) / 2
    low, high = (
        ratios[max(0, math.floor(pairs / 2 - off))],
        ratios[min(pairs - 1, math.ceil(pairs / 2 + off))],
    )
    print(
        f"{pairs} pairs of {tokens} tokens: median ratio {statistics.median(ratios):.4f}, 95 % interval {low:.4f} to {high:.4f}"
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
