"""The compiled decode step: torch, transformers, optimum-quanto and, on a GPU, Triton. One door."""

from _qwquanto.compiled.prepare import compile_decode

__all__ = ["compile_decode"]
