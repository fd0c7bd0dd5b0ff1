"""The programs that a machine runs: the daemon of a node, its worker, and the local multi-peer harness."""
