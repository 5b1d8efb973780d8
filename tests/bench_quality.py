"""Does KL's 95 % interval hold? Twelve disjoint sets of sixteen prompts, each held against the other eleven.

    python tests/bench_quality.py --model-name FOLDER
    python tests/bench_quality.py --model-name FOLDER --compare int8 int4 --quality-tokens 512

The flags are the script's. For each set, answers are sampled at T = 1 from the unquantized model and a
precision's KL along them is computed by plain transformers: a prefill of each answer, log-softmax in float64.
A set's interval (Student's t over its prompts, as in the report) covers if it holds the mean of the other
sets, which has an error of its own: 94 % is what perfect intervals would reach. Beside it, the interval that
takes all positions for independent.
"""

import statistics
import sys
from dataclasses import replace

import torch
import conftest  # noqa: F401 (it puts the script on the path)
from prompt_sets import SETS

import qwquanto as q

Answer = tuple[int, list[int], list[int]]  # number of its prompt, the prompt's token ids, its own


def load(s: q.Settings, folder: str, weights: str) -> torch.nn.Module:
    s = replace(s, weights=None if weights == "none" else weights)
    return q.load_model(s, folder, q.make_meta_model(s, folder), q.choose_devices(s.device)[0][:1])


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
        options |= {"max_new_tokens": max(left.values()), "pad_token_id": 0, "attention_mask": mask.to(device)}
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


def held_against(reference: torch.nn.Module, model: torch.nn.Module, answers: list[Answer]) -> dict:
    """Prompt's number -> KL and agreement of each position."""
    found = {}
    for i, prompt, tokens in answers:
        p, r = (log_probabilities(m, prompt, tokens) for m in (reference, model))
        kl, same = found.setdefault(i, ([], []))
        kl += (p.exp() * (p - r)).sum(-1).tolist()
        same += (p.argmax(-1) == r.argmax(-1)).double().tolist()
    return found


def interval(values: list[float]) -> tuple[float, float]:
    half = q.student_t(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def coverage(sets: list[list[list[float]]]) -> str:
    """How often a set's interval holds the mean of the others; a set is a list of a prompt's positions."""
    means = [[statistics.fmean(prompt) for prompt in one] for one in sets]
    centers = [statistics.fmean(one) for one in means]
    others = [statistics.fmean(centers[:i] + centers[i + 1 :]) for i in range(len(centers))]
    held = lambda intervals: sum(
        low <= mean <= high for (low, high), mean in zip(intervals, others, strict=True)
    )
    over_prompts = [interval(one) for one in means]
    over_positions = [interval([value for prompt in one for value in prompt]) for one in sets]
    width = statistics.median((high - low) / 2 for low, high in over_prompts)
    return (
        f"mean {statistics.fmean(centers):.4g}, sets {min(centers):.4g} to {max(centers):.4g}, "
        f"± {width:.2g}: covered {held(over_prompts)} of {len(sets)}, "
        f"by positions {held(over_positions)}"
    )


def main(argv: list[str]) -> None:
    s, _ = q.parse(["--compare", "int8", "float8", "int4", *argv])
    if problems := q.check(s):
        sys.exit("\n".join(problems))
    folder = q.download_model(s.model_name, False, True)
    tokenizer = q.load_tokenizer(s.model_name, folder, s.trust_remote_code)
    reference, answers = load(s, folder, "none"), []
    torch.manual_seed(s.seed)
    for prompts in SETS:
        ids = [q.tokenize(replace(s, question=text), tokenizer, reference.config)[0].tolist() for text in prompts]
        answers.append(sample(reference, ids, s.quality_tokens // len(prompts)))
    entropy = statistics.fmean(
        -(p.exp() * p).sum(-1).mean().item()
        for one in answers
        for p in [log_probabilities(reference, *answer[1:]) for answer in one]
    )
    print(f"{len(SETS)} sets of {len(SETS[0])} prompts; entropy {entropy:.3g} nats", flush=True)
    for weights in s.compare:
        model = load(s, folder, weights)
        found = [held_against(reference, model, one) for one in answers]
        for what, index in (("KL", 0), ("same top token", 1)):
            print(f"{weights}: {what} {coverage([[f[index] for f in one.values()] for one in found])}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
