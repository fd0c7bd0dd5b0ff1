"""transformers, told to be silent and never to download; other modules take it from here.

A run's model comes from its manifest and its weights from its peers, so the hub of Hugging Face is never
needed, and a machine without internet must not notice that it exists.
"""

from __future__ import annotations

import os

# read once, when huggingface_hub is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import huggingface_hub.constants
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

huggingface_hub.constants.HF_HUB_OFFLINE = True  # where something else imported it before us
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

__all__ = [
    "CONFIG_MAPPING",
    "CONFIG_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForCausalLM",
]
