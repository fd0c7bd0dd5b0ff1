"""Averaging: how the updates of a group become one aggregate.

An `Exchange` is what a round uses: a dense one computes the exact weighted mean of flat float32 vectors in an
all-reduce, where `codec` names the ways values travel; a sparse one gathers everybody's compressed update. A `Form`
reads what comes out. What does not live here: who is in a group and when (`rounds`), what the vector holds (`state`),
and the network; this package sees only the streams and calls of a `Transport`.
"""

from p2pllm.averaging.codecs import Codec, codec
from p2pllm.averaging.dense import DenseAllReduce
from p2pllm.averaging.exchange import Exchange, Payload, view_of
from p2pllm.averaging.form import Form, Term
from p2pllm.averaging.group import ExchangeResult, Group
from p2pllm.averaging.strategies import exchange_of, form_of

__all__ = [
    "Codec",
    "DenseAllReduce",
    "Exchange",
    "ExchangeResult",
    "Form",
    "Group",
    "Payload",
    "Term",
    "codec",
    "exchange_of",
    "form_of",
    "view_of",
]
