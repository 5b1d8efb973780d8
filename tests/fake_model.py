"""A generate() and a clock that do as they are told."""

from types import SimpleNamespace

import torch
from results import settings

from _qwquanto.worker.generation import Bench


class FakeTime:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class FakeModel:
    """generate() that takes `first` seconds to the first token, `gap` for each other, and gives `tokens`.

    7 and 8 end an answer.
    """

    def __init__(self, time, tokens, gap=0.5, first=2.0):
        self.time, self.tokens, self.gap, self.first, self.calls = time, tokens, gap, first, []

    def generate(self, ids, attention_mask, stopping_criteria, return_dict_in_generate, **options):
        self.calls.append(options | {"seed": torch.initial_seed()})
        for i, token in enumerate(self.tokens[: options["max_new_tokens"]]):
            self.time.now += self.gap if i else self.first
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            stop = [criterion(ids, None) for criterion in stopping_criteria]
            if any(stop) or token in (7, 8):
                break
        self.time.now += 0.25  # what generate() does after the last token
        return SimpleNamespace(sequences=ids, past_key_values=None)


def bench(model, new_tokens=10, **constants):
    prompt = torch.ones(1, 3, dtype=torch.long)
    return Bench(settings(**constants), model=model, prompt=prompt, new_tokens=new_tokens)
