"""What the tests share: a tiny model that has learnt one sentence, and the script as a real process."""

import json
import math
import os
import statistics
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "qwquanto.py"
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a hub

QUESTION = "How is it computed?"
ANSWER = "The determinant of a two by two matrix is the product of its diagonal minus that of the other two "
ANSWER += "entries."


def pytest_configure(config):
    # products of tiny models are ten times faster on one thread, and on a busy machine more than that
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "zoo: the long list of architectures, run by -m zoo alone")


def pytest_collection_modifyitems(config, items):
    """Without a GPU, tests marked `gpu` are skipped; with REQUIRE_GPU=1 that is an error instead."""
    if "zoo" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("zoo")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("REQUIRE_GPU") == "1":
            raise pytest.UsageError("REQUIRE_GPU=1, but torch sees no GPU")
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def make_tokenizer(folder):
    """A byte-level tokenizer of a few hundred tokens that can encode anything, Chinese too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([QUESTION, ANSWER], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)
    return fast


def break_few_bits(model, factor=16.0):
    """Give some columns outliers without changing what the model computes: few bits then lose all the others.

    A norm's channels are divided by a factor that multiplies the weights after it, as in large models.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, after in (
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ):
            norm.weight.data[::16] /= factor
            for linear in after:
                linear.weight.data[:, ::16] *= factor


def make_model(folder, steps=150, tie=True, **options):
    """Train a tiny Qwen2 on CPU for a few seconds until it recites ANSWER after QUESTION, and save it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        **size, num_key_value_heads=2, vocab_size=320, tie_word_embeddings=tie, eos_token_id=0,
        bos_token_id=None, max_position_embeddings=4096,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    ids = torch.tensor([[*tokenizer(QUESTION).input_ids, *tokenizer(ANSWER).input_ids, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    break_few_bits(model)
    model.generation_config.eos_token_id = 0
    model.to(torch.bfloat16).save_pretrained(folder, **options)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the tiny model that recites ANSWER."""
    return make_model(tmp_path_factory.mktemp("tiny"))


def alternate(measured, plain, pairs):
    """Seconds of two jobs, each given its pair's number as seed, in turn; the first pair is left out."""
    measured(0), plain(0)
    times = {measured: [], plain: []}
    for i in range(pairs):
        for job in (measured, plain) if i % 2 else (plain, measured):
            times[job].append(job(i))
    return times[measured], times[plain]


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t by integration: a witness of `student_t`.

    With x = sqrt(freedom) tan(angle) the density becomes a power of the cosine.
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    steps = 200_000
    width = math.pi / 2 / steps
    share = 0.5
    for i in range(steps):
        share += scale * width * math.cos((i + 0.5) * width) ** (freedom - 1)
        if share >= 0.975:
            return math.sqrt(freedom) * math.tan((i + 0.5) * width)
    raise ValueError(freedom)


def paired_interval(values, base):
    """Geometric mean of pairs' ratios, and its 95 % interval: Student's t on logarithms."""
    from _qwquanto.stats import student_t

    logs = [math.log(a / b) for a, b in zip(values, base, strict=True)]
    half = student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    center = statistics.fmean(logs)
    return math.exp(center), math.exp(center - half), math.exp(center + half)


# ------------------------------------------------------------------------------------ the script as a process


@dataclass
class Ended:
    """How a process of the script ended."""

    code: int
    out: str
    err: str
    results: list | None = None

    def __post_init__(self):
        assert "Traceback" not in self.out + self.err, self.out + self.err


def arguments(flags):
    """["--flag", "value", …] of a dict; None and tuples as the script takes them."""
    argv = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            argv += [flag, *value]
        else:
            argv += [flag, str(value)]
    return argv


def wait_for(condition, process, seconds=120):
    """What the condition gives, once that is true; the process must live until then."""
    end = monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and monotonic() < end, "the condition never came true"
        sleep(0.05)
    return found


class Script:
    """Runs the real script, or an edited copy of it, as a process of its own."""

    def __init__(self, folder):
        self.file = folder / "results.json"
        self.temporary = folder / "temporary"  # of the script and of the libraries
        self.temporary.mkdir()

    @property
    def results(self):
        """The results file's content so far."""
        return json.loads(self.file.read_text(encoding="utf-8"))["results"] if self.file.exists() else []

    def start(self, path=SCRIPT, env=None, streams=None, **flags):
        """A started process; with `streams` other ones than pipes for output and errors."""
        self.file.unlink(missing_ok=True)
        flags = {
            "results": self.file,
            "device": "cpu",
            "runs": 2,
            "warmup_runs": 0,
            "max_seconds": 30,
        } | flags
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = os.environ | {"TMPDIR": str(self.temporary)} | (env or {})
        command = [sys.executable, str(path), *arguments(flags)]
        return subprocess.Popen(command, env=env, **pipes | (streams or {}))

    def end(self, process):
        """Wait for a process's end."""
        out, err = process.communicate(timeout=300)
        shown = [(stream or b"").decode("utf-8") for stream in (out, err)]
        return Ended(process.returncode, *shown, self.results)

    def __call__(self, **options):
        return self.end(self.start(**options))


@pytest.fixture
def script(tmp_path):
    """Runs the real script: script(flag=value, …) -> Ended; see `Script`."""
    return Script(tmp_path)


def start(*argv, path=SCRIPT):
    """What became of the script with these arguments, no model in them."""
    return subprocess.run(
        [sys.executable, str(path), *map(str, argv)], capture_output=True, encoding="utf-8", check=False
    )


# ----------------------------------------------------------------------------------------- the worker's rooms


@pytest.fixture
def time(monkeypatch):
    """A clock that only moves when told, in place of the one by which generations are timed."""
    from fake_model import FakeTime

    from _qwquanto.worker import generation

    fake = FakeTime()
    monkeypatch.setattr(generation, "time", fake)
    return fake


@pytest.fixture
def messages(monkeypatch):
    """What the worker says to the program."""
    from _qwquanto.channel import CHANNEL

    said = []
    monkeypatch.setattr(CHANNEL, "send", lambda **message: said.append(message))
    return said


@pytest.fixture
def fresh():
    """Nothing compiled before, and Quanto as the script patches it.

    On one thread, as all tests; Inductor writes other code for several, which test_script's comparison runs.
    """
    import torch

    from _qwquanto.worker.quanto import patch_quanto

    torch._dynamo.reset()
    patch_quanto()


def in_plain_python(code):
    """(exit code, output) of code in a process of its own, in which nothing is patched."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr
