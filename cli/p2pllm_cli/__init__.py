"""The commands of p2pllm and their views. No logic: what a command does is in `p2pllm_peers` and `p2pllm`."""
