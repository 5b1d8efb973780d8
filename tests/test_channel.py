"""An exception in the user's words."""

import pytest

from _qwquanto import channel
from _qwquanto.channel import describe_error


def raised(error, step="running the model", advice=""):
    """What the user is told of an error raised in a step, and whether it is a lack of the machine."""
    with pytest.raises(type(error)) as found, channel.step(step):
        raise error
    return describe_error(found.value, advice)


def test_a_model_with_code_of_its_own_names_the_flag():
    error = ValueError(
        "The repository contains custom code.\nPlease pass the argument `trust_remote_code=True`"
    )
    assert "--trust-remote-code" in raised(error)[0]


def test_what_this_machine_lacks_is_unavailable_not_failed():
    text, unavailable = raised(RuntimeError("InvalidCxxCompiler: No working C++ compiler found"))
    assert unavailable and "C++ compiler" in text
    text, unavailable = raised(ValueError("odd: see torch.compiler\nsecond line"), "compiling")
    assert (
        not unavailable and text == "ValueError while compiling: odd: see torch.compiler (--debug shows more)"
    )


def test_out_of_memory_comes_with_advice():
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (RuntimeError("CUDA out of memory. Tried"), cublas, MemoryError()):
        told = "out of memory while running the model: take int4"
        assert raised(error, advice="take int4") == (told, False)
