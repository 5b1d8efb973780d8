"""An independent witness of KL: a saved comparison's figures, computed again by plain transformers.

    python qwquanto.py --model-name FOLDER --compare --compile --results saved.json
    python tests/witness_quality.py saved.json

The same token ids by a prefill of each answer, where the script decodes them one by one; log-softmax in
float64. They should agree within 5 % of KL plus the floor, and within .02 of the same top token. The floor is
rounding: the unquantized model's KL between prefill and decoding, or between its eager and its compiled step.
Exit code 1 where they do not agree.
"""

import statistics
import sys
from pathlib import Path

import conftest  # noqa: F401 (it puts the script on the path)
import torch
from bench_quality import Answer, compare, load, log_probabilities

from _qwquanto.results import from_json
from _qwquanto.worker.checkpoint import download_model


@torch.no_grad()
def decoded(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of each token of an answer, decoded one by one with a cache, in float64."""
    ids, cache, rows = torch.tensor([prompt], device=model.device), None, []
    for token in tokens:
        output = model(ids, past_key_values=cache, use_cache=True)
        rows.append(output.logits[0, -1].double().log_softmax(-1))
        ids, cache = torch.tensor([[token]], device=model.device), output.past_key_values
    return torch.stack(rows)


def means(found: dict[int, tuple[list[float], list[float]]]) -> list[float]:
    """Mean over prompts of the prompts' means, of KL and of agreement."""
    return [statistics.fmean(statistics.fmean(one[i]) for one in found.values()) for i in (0, 1)]


def main(file: str) -> int:
    results, wrong = from_json(Path(file).read_text(encoding="utf-8")).results, 0
    known = next(r for r in results if r.is_reference)
    folder = download_model(known.settings.model_name, False, True)
    reference = load(known.settings, folder, known.name)
    answers: list[Answer] = [(one.part, one.prompt, one.tokens) for one in known.passages]
    truth = [log_probabilities(reference, *answer[1:]) for answer in answers]
    floor, same = means(compare(answers, truth, [decoded(reference, *answer[1:]) for answer in answers]))
    print(f"floor of {known.label}: prefill against decoding, KL {floor:.3g}, same top token {same:.3f}")
    if known.compiled and known.compiled.quality:
        floor = max(floor, known.compiled.quality.kl_divergence)
        print(
            f"floor of {known.label}: eager against compiled, KL {known.compiled.quality.kl_divergence:.3g}"
        )
    for r in results:
        if not r.quality:
            continue
        model = load(known.settings, folder, r.name)
        kl, same = means(
            compare(answers, truth, [log_probabilities(model, *answer[1:]) for answer in answers])
        )
        print(f"{r.label}: witness KL {kl:.4g}, same top token {same:.3f}")
        for kind, judged in (("eager", r.quality), ("compiled", r.compiled and r.compiled.quality)):
            if judged:
                agrees = abs(judged.kl_divergence - kl) <= 0.05 * kl + floor
                agrees &= abs(judged.same_top_token - same) <= 0.02
                wrong += not agrees
                figures = f"KL {judged.kl_divergence:.4g}, same top token {judged.same_top_token:.3f}"
                print(f"{r.label}: {kind} {figures}: {'agrees' if agrees else 'DIFFERS'}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
