"""Other ways to train the same model on the same machines, for `systems.py` to compare with.

One program a system (`solo`, `ddp`, `hivemind_optimizer`), started once on each machine. Each file says only what is
particular to its system; what all share is in `peer`, starting them in `fleet`, and their figures in `figures`.
"""
