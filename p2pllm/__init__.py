"""p2pllm trains one language model on many machines that nobody owns together.

This package is the library: mechanism only; it starts no process at import and prints nothing. The programs
that a machine runs are in `p2pllm_peers`, the commands in `p2pllm_cli`.
"""

__version__ = "0.1.0"
