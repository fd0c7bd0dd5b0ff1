"""Decoders of what strangers send, fed with what strangers might send.

Each target is a function that gives one input to a decoder, as the program would, and returns whether it was taken; it
raises if the decoder raises anything but the error that it documents, or takes something and contradicts itself. Its
docstring states how much memory one input may cost; `promise` measures that, and the time.

`scripts/fuzz` makes up inputs, guided by coverage; `tests/unit/test_decoders.py` draws some at random with every test
run. What does not live here: tests of what the messages mean.
"""
