"""How much do processes that measure the same differ, and can two builds of the script be told apart?

    python tests/bench_reproducibility.py --model-name FOLDER
    python tests/bench_reproducibility.py --random-weights --compile        # a GPU, at its fastest
    python tests/bench_reproducibility.py --against OTHER/qwquanto.py --model-name FOLDER

Starts the script in `--processes` (5) processes, or that many of each build in turn, each a comparison of one
precision (`--weights`, int8); other flags are the script's. Prints, eager and compiled: each process's median
decode rate, on a GPU with the time of its host's yardstick; the s.d. of the logarithm of the rates between
processes (BETWEEN_PROCESSES in _qwquanto/stats.py) less what their runs explain; and for each pair of
processes what `--show` says of it. Of two builds also what all of their processes tell together: a single
pair on a machine that is shared cannot tell builds apart that differ by some percent, or say that they are
the same.
"""

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from conftest import SCRIPT

from _qwquanto.results import Result, from_json
from _qwquanto.saved import speed_change
from _qwquanto.stats import (
    counts,
    decode_rate,
    is_about_one,
    log_mean,
    on_one_basis,
    rates_over_shared_prefix,
    speed_interval,
    welch,
)
from _qwquanto.text import format_3g


def between_processes(groups: list[list[float]]) -> tuple[float, float]:
    """(s.d. between, s.d. within): of the logarithms of rates, a list a process.

    The first is of the processes' means, less what the second leaves in a mean of so many runs.
    """
    logs = [[math.log(rate) for rate in rates] for rates in groups]
    within = statistics.fmean(statistics.variance(log) for log in logs)
    left = statistics.fmean(statistics.variance(log) / len(log) for log in logs)
    means = statistics.variance(statistics.fmean(log) for log in logs)
    return math.sqrt(max(0.0, means - left)), math.sqrt(within)


def measure(script: str, weights: str, flags: list[str]) -> Result:
    """What one process of a build measures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, script, "--compare", weights, "--quality-tokens", "0", *flags]
        ended = subprocess.run([*command, "--results", str(file)], capture_output=True, text=True)
        if not file.exists():
            sys.exit(ended.stderr)
        (result,) = from_json(file.read_text("utf-8")).results
    if result.failure:
        sys.exit(result.failure)
    return result


def tell(interval: tuple[float, float] | None) -> str:
    """What `--show` says of a pair, in a word or two."""
    if interval is None:
        return "unknown"
    if is_about_one(interval):
        return "about the same"
    low, high = interval
    return "faster" if low > 1 else "slower" if high < 1 else "open"


def builds_ratio(groups: list[list[list[float]]]) -> tuple[float, tuple[float, float]]:
    """The second build's decode rate over the first's with its 95 % interval, by Welch's method.

    On the logarithms of the processes' means, so that what differs between processes is in it as it was. Each
    build is a list of processes, each of these a list of its runs' rates.
    """
    means = [[statistics.geometric_mean(rates) for rates in build] for build in groups]
    (first, first_error), (second, second_error) = map(log_mean, means)
    low, high = welch(second - first, [first_error, second_error])
    return math.exp(second - first), (math.exp(low), math.exp(high))


def report(kind: str, builds: list[list[Result]]) -> None:
    """The figures of one kind of runs, of one build or two; of processes with two runs that count."""
    compiled = kind == "compiled"
    runs = lambda r: r.compiled.runs if compiled else r.runs
    every = sum(map(len, builds))
    builds = [[r for r in results if sum(map(counts, runs(r))) > 1] for results in builds]
    if left_out := every - sum(map(len, builds)):
        print(f"{kind}: {left_out} of {every} processes left out, whose runs were disturbed or too short")
    for number, results in enumerate(builds, 1):
        for r in results:
            host_s = r.compiled.host_s if compiled else r.host_s
            host = f", yardstick {1000 * statistics.median(host_s):.1f} ms" if host_s else ""
            print(f"build {number}, {kind}: {format_3g(decode_rate(runs(r)))} tokens/s{host}", flush=True)
        if len(results) > 1:
            groups = rates_over_shared_prefix(*(runs(r) for r in results))
            between, within = (f"{100 * sd:.2f} %" for sd in between_processes(groups))
            print(f"build {number}, {kind}: s.d. between processes {between}, within one {within}")
    pairs = itertools.product(*builds) if len(builds) > 1 else itertools.combinations(builds[0], 2)
    intervals = [speed_interval(b, a, compiled) for a, b in pairs]
    print(f"{kind}: {'; '.join(map(speed_change, intervals))}")
    found = Counter(map(tell, intervals))
    print(f"{kind}, {len(intervals)} pairs: {', '.join(f'{count} {told}' for told, count in found.items())}")
    if len(builds) > 1 and min(map(len, builds)) > 1:
        every = iter(rates_over_shared_prefix(*(runs(r) for results in builds for r in results)))
        ratio, interval = builds_ratio([[next(every) for _ in results] for results in builds])
        ends = " to ".join(map(format_3g, interval))
        print(
            f"{kind}, all processes: build 2 is {format_3g(ratio)} times as fast ({ends}): {tell(interval)}"
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--against", help="the qwquanto.py of another build")
    args, flags = parser.parse_known_args(argv)
    scripts = [str(SCRIPT), *([args.against] if args.against else [])]
    builds: list[list[Result]] = [[] for _ in scripts]
    for _ in range(args.processes):
        for script, results in zip(scripts, builds, strict=True):
            load = ", ".join(f"{n:.1f}" for n in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
            print(f"{script}, load before {load}", file=sys.stderr, flush=True)
            results.append(measure(script, args.weights, flags))
    even = on_one_basis([r for results in builds for r in results])
    builds = [even[i * args.processes : (i + 1) * args.processes] for i in range(len(builds))]
    for kind in ("eager", "compiled") if any(r.compiled for r in even) else ("eager",):
        report(kind, builds)


if __name__ == "__main__":
    main(sys.argv[1:])
