"""Tiny random models of every family, for tests and for kernels from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from morph import registry


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a random causal LM of a family's `tiny_config`, in eval mode, float32.

    Weights are drawn large enough that attention is far from uniform, so that a wrong mask shows.
    """
    family = registry.load("families", model_type).FAMILY
    config = family.part(family.config_class)(**{**family.tiny_config, **overrides})
    config._attn_implementation = "eager" if config.model_type == "gemma2" else "sdpa"
    generator = torch.Generator().manual_seed(seed)
    model = family.part(family.causal_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 2.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()
