"""Put a plan into a live model and take it out again; the model that selectors probe."""

from morph.families._lookup import family_of
from morph.surgery._graft import (
    Graft,
    attention_of,
    base_of,
    context,
    geometry_of,
    graft,
    group_cost,
    hybrid_layers,
    inform,
    layers_of,
    mixer_parameters,
    own_parameter_names,
    resolve_costs,
)
from morph.surgery._morphable import (
    CHEAP,
    FULL,
    Batch,
    Mode,
    Morphable,
    Trace,
    answer_losses,
    morphable,
)

__all__ = [
    "CHEAP",
    "FULL",
    "Batch",
    "Graft",
    "Mode",
    "Morphable",
    "Trace",
    "answer_losses",
    "attention_of",
    "base_of",
    "context",
    "family_of",
    "geometry_of",
    "graft",
    "group_cost",
    "hybrid_layers",
    "inform",
    "layers_of",
    "mixer_parameters",
    "morphable",
    "own_parameter_names",
    "resolve_costs",
]
