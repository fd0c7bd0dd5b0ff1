"""Training on one machine: text, tokens, models, gradients, evaluation, generation, export.

Import the modules by name (`from p2pllm.training.data import Corpus`): this package imports nothing itself,
because torch and transformers take seconds to load. What does not live here: anything that knows of other
peers (`network`, `rounds`), and the outer step (`state`).
"""
