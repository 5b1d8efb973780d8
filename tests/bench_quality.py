"""Does KL's 95 % interval hold? Twelve disjoint sets of sixteen prompts, each held against the other eleven.

    python tests/bench_quality.py --model-name FOLDER
    python tests/bench_quality.py --model-name FOLDER --compare int8 int4 --quality-tokens 512 --seed 1

The flags are the script's. To each prompt an answer is sampled at T = 1 from the unquantized model, and a
precision's KL along it computed by plain transformers: a prefill, log-softmax in float64. A set's interval
(Student's t over its prompts, as in the report) covers if it holds the mean of the other sets, which has an
error of its own: perfect intervals would reach 94 %. Twelve sets are few, so 500 regroupings of the prompts,
one of each kind a set, follow. Beside it: intervals that take all positions for independent.
"""

import random
import statistics
import sys
from dataclasses import replace

import conftest  # noqa: F401 (it puts the script on the path)
import torch
from prompt_sets import SETS
from results import parse

from _qwquanto.settings import Settings, check
from _qwquanto.stats import student_t
from _qwquanto.worker.checkpoint import download_model, load_tokenizer, token_ids
from _qwquanto.worker.devices import choose_devices
from _qwquanto.worker.loading import load_model, make_meta_model

Answer = tuple[int, list[int], list[int]]  # number of its prompt, the prompt's token ids, its own


def load(s: Settings, folder: str, weights: str) -> torch.nn.Module:
    s = replace(s, weights=None if weights == "none" else weights)
    return load_model(s, folder, make_meta_model(s, folder), choose_devices(s.device)[0][:1])


@torch.no_grad()
def sample(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> list[Answer]:
    """Answers of `tokens` tokens to each prompt, several where one ended earlier; all in one batch."""
    ends, answers = model.generation_config.eos_token_id, []
    ends = set(ends if isinstance(ends, list) else [ends])
    left, device = dict.fromkeys(range(len(prompts)), tokens), model.device
    while left:
        width = max(len(prompts[i]) for i in left)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in left], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in left])
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        options |= {
            "max_new_tokens": max(left.values()),
            "pad_token_id": 0,
            "attention_mask": mask.to(device),
        }
        for i, row in zip(list(left), model.generate(ids, **options)[:, width:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            answers.append((i, prompts[i], row[: min(end, left[i])]))
            left[i] -= len(answers[-1][2])
        left = {i: n for i, n in left.items() if n}
    return answers


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Of each token of an answer, by one prefill, in float64."""
    logits = model(torch.tensor([[*prompt, *tokens]], device=model.device), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def compare(
    answers: list[Answer], reference: list, model: list
) -> dict[int, tuple[list[float], list[float]]]:
    """Prompt's number -> KL and agreement of each position, from two models' log-probabilities."""
    found = {}
    for (i, _, _), p, r in zip(answers, reference, model, strict=True):
        kl, same = found.setdefault(i, ([], []))
        kl += (p.exp() * (p - r)).sum(-1).tolist()
        same += (p.argmax(-1) == r.argmax(-1)).double().tolist()
    return found


def interval(values: list[float]) -> tuple[float, float]:
    half = student_t(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def covered(sets: list[list[float]], intervals: list[tuple[float, float]]) -> int:
    """How many intervals hold the mean of the other sets; a set is a list of its prompts' means."""
    centers = [statistics.fmean(one) for one in sets]
    others = [statistics.fmean(centers[:i] + centers[i + 1 :]) for i in range(len(centers))]
    return sum(low <= mean <= high for (low, high), mean in zip(intervals, others, strict=True))


def regrouped(sets: list[list[float]]) -> list[list[float]]:
    """The same prompts in other sets, one of each kind in each."""
    kinds = [random.sample(kind, len(kind)) for kind in zip(*sets, strict=True)]
    return [list(one) for one in zip(*kinds, strict=True)]


def coverage(positions: list[list[list[float]]], trials: int = 500) -> str:
    """How often a set's interval holds the mean of the others; a set is a list of its prompts' positions."""
    sets = [[statistics.fmean(prompt) for prompt in one] for one in positions]
    intervals = [interval(one) for one in sets]
    naive = [interval([value for prompt in one for value in prompt]) for one in positions]
    made = [regrouped(sets) for _ in range(trials)]
    share = statistics.fmean(covered(one, [interval(prompts) for prompts in one]) for one in made) / len(sets)
    centers, width = (
        [statistics.fmean(one) for one in sets],
        statistics.median(b - a for a, b in intervals) / 2,
    )
    return (
        f"mean {statistics.fmean(centers):.4g}, sets {min(centers):.4g} to {max(centers):.4g}, "
        f"± {width:.2g}: covered {covered(sets, intervals)} of {len(sets)}, "
        f"{100 * share:.0f} % of regroupings; by positions {covered(sets, naive)} of {len(sets)}"
    )


def main(argv: list[str]) -> None:
    s, _ = parse(["--compare", "int8", "float8", "int4", *argv])
    if problems := check(s):
        sys.exit("\n".join(problems))
    folder = download_model(s.model_name, False, True)
    tokenizer = load_tokenizer(s.model_name, folder, s.trust_remote_code)
    reference, answers = load(s, folder, "none"), []
    torch.manual_seed(s.seed), random.seed(s.seed)
    for prompts in SETS:
        ids = [token_ids(s, tokenizer, text)[0].tolist() for text in prompts]
        answers.append(sample(reference, ids, s.quality_tokens // len(prompts)))
    truth = lambda one: [log_probabilities(reference, *answer[1:]) for answer in one]
    entropy = statistics.fmean(-(p.exp() * p).sum(-1).mean().item() for one in answers for p in truth(one))
    print(f"{len(SETS)} sets of {len(SETS[0])} prompts; the model's entropy {entropy:.3g} nats", flush=True)
    for weights in s.compare:
        model = load(s, folder, weights)
        found = [
            compare(one, truth(one), [log_probabilities(model, *answer[1:]) for answer in one])
            for one in answers
        ]
        for what, index in (("KL", 0), ("same top token", 1)):
            positions = [[prompt[index] for _, prompt in sorted(one.items())] for one in found]
            print(f"{weights}: {what} {coverage(positions)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
