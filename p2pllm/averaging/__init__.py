"""Averaging: how the updates of a group become one aggregate.

`DenseAllReduce` computes the exact weighted mean of a flat float32 vector; `codec` names the ways values
travel. What does not live here: who is in a group and when (`rounds`), what the vector holds (`state`), and
the network; this package sees only the streams and calls of a `Transport`.
"""

from p2pllm.averaging.codecs import Codec, codec
from p2pllm.averaging.dense import DenseAllReduce
from p2pllm.averaging.group import ExchangeResult, Group

__all__ = ["Codec", "DenseAllReduce", "ExchangeResult", "Group", "codec"]
