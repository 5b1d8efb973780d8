"""What a precision takes of a device, which cards hold it, and the tables of memory."""

from dataclasses import replace

import pytest
from results import GIB, gpu_comparison, on_gpu, result

from _qwquanto.fit import bytes_per_prompt_token, context_that_fits, device_peak, memory_taken, tensor_peak
from _qwquanto.memory import cache_line, comparison_memory, fit_line, fit_on, memory_table, process_lines
from _qwquanto.results import Result, from_plain

KV = 36 * 1024


def test_the_devices_peak_is_above_what_others_had():
    r = on_gpu("int8", stored=GIB)
    assert device_peak(r) == r.memory["peak of runs"]["cuda:0 used"] - GIB
    assert tensor_peak(r) == r.memory["peak of runs"]["cuda:0 allocated"]
    r.memory["at start"] = {}  # a file of an older version
    assert device_peak(r) is None and memory_taken(r) == tensor_peak(r)
    assert device_peak(result()) == 3 * GIB and tensor_peak(result()) is None
    mps = result(devices=["mps"], memory={"peak of runs": {"mps allocated": 5, "mps reserved": 7, "rss": 9}})
    assert (device_peak(mps), tensor_peak(mps)) == (7, 5)
    assert device_peak(replace(r, memory={})) is None and memory_taken(replace(r, memory={})) is None


def test_a_prompts_token_takes_keys_values_and_activations():
    r = on_gpu("int8", stored=GIB)
    assert bytes_per_prompt_token(r) == pytest.approx(KV + 75 * 1024)
    r.memory["peak of prefill"] = {"cuda:0 allocated": 0}
    assert bytes_per_prompt_token(r) == KV, "never less than keys and values"
    del r.memory["peak of prefill"]
    assert bytes_per_prompt_token(r) == KV


def test_the_context_that_fits_is_what_a_card_has_left():
    """7.6 of 8 GiB: 6 GiB of weights and 0.75 more leave 0.85 GiB, for tokens of 111 KiB."""
    r = on_gpu("none", stored=6 * GIB)
    assert context_that_fits(r, 8 * GIB) == pytest.approx(0.85 * GIB / (111 * 1024), rel=0.001)
    assert context_that_fits(r, 12 * GIB) == 32768 == context_that_fits(r, 24 * GIB)
    assert context_that_fits(r, 7 * GIB) == 0
    r.memory["peak of load"]["cuda:0 used"] = 9 * GIB  # above 1 GiB of others'
    assert context_that_fits(r, 8 * GIB) == 0 < context_that_fits(r, 12 * GIB)
    unknown = {"devices": ["cuda:0", "cuda:1"]}, {"kv_bytes_per_token": None}, {"runs": []}
    assert [context_that_fits(replace(r, **changes), 24 * GIB) for changes in unknown] == [None] * 3
    assert context_that_fits(result(kv_bytes_per_token=9.0), 24 * GIB) is None, "a CPU has no card"
    endless = replace(r, max_positions=None)
    assert context_that_fits(endless, 24 * GIB) > 32768


def test_cards_that_hold_the_same_share_a_place():
    bf16, int8 = on_gpu("none", stored=6 * GIB), on_gpu("int8", stored=int(3.3 * GIB))
    big = on_gpu("none", stored=16 * GIB)
    assert fit_on(8, [bf16, int8]) == "bf16 8,000; int8 all 32,768"
    assert fit_on(8, [big, int8]) == "bf16 none; int8 all 32,768"
    assert fit_line([bf16, int8]) == [
        "Tokens of context that a card has room for (computed). 8 GB: bf16 8,000; int8 all 32,768."
        " 12, 16, 24 GB: bf16, int8 all 32,768."
    ]
    assert fit_line([result("none"), result()]) == []


def test_the_cache_is_told_in_bytes_of_1000_tokens():
    assert cache_line([on_gpu("none"), on_gpu("int8")]) == ["KV cache: 35.2 MiB per 1,000 tokens of context."]
    assert cache_line([result()]) == []


def test_a_process_that_took_more_ram_than_bf16s_is_said_to():
    base = result("none", memory={"peak of runs": {"rss": GIB}})
    (_, line) = process_lines([base, result("int8"), result("int4", memory={"peak of runs": {"rss": GIB}})])
    assert line == "Processes that took more RAM than bf16's (1.00 GiB): int8 3.00."
    assert len(process_lines([result("none"), result("int8")])) == 1 == len(process_lines([result()]))
    assert process_lines([on_gpu("none"), on_gpu("int8")]) == []


def test_the_tables_name_what_their_peak_is_of():
    (title, made, *lines) = comparison_memory(gpu_comparison())
    assert "what the program took of the device" in title and any("KV cache" in line for line in lines)
    assert [c.header for c in made.columns][3:6] == ["peak", "tensors", "load s"]
    (title, made, *_) = comparison_memory([result("none"), result()])
    assert "the whole process (RSS)" in title and [c.header for c in made.columns][3:] == ["peak", "load s"]
    (title, *_) = comparison_memory([result("none", memory={}), result(memory={})])
    assert title == "[bold]### Memory in GiB[/]"
    assert any("KV cache" in str(part) for part in memory_table(on_gpu("int8")))


def test_older_files_have_none_of_it():
    plain = {"settings": vars(result().settings), "weight_bytes": GIB}
    r = from_plain(Result, plain)
    assert (r.kv_bytes_per_token, r.max_positions, r.device_memory_bytes) == (None, None, {})
