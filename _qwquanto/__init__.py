"""The rooms of qwquanto.py, private to it: `qwquanto` is the public name.

    settings results stats text channel    the ground, for both processes; the standard library alone
    verdicts claims advice fit memory      the program: no torch; rich in `console` only
    answers report console saved supervisor
    chart panels sheet                     its picture, if asked for: matplotlib in `sheet` only
    worker/                                the process that loads and measures: torch, never rich
    compiled/                              the compiled decode step: of this package it knows Failure alone

Imports point downwards: qwquanto -> program -> ground; worker -> compiled and ground (tests/test_walls.py).
"""

__version__ = "3.0.0"
