"""Put a plan into a live model and take it out again; the model that selectors probe."""

from morph.families._lookup import family_of
from morph.surgery._calibrate import Start, calibrate, output_errors
from morph.surgery._graft import (
    Graft,
    attention_of,
    base_of,
    context,
    decode_bytes,
    exact_prefix,
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
from morph.surgery._memo import Memo
from morph.surgery._modes import CHEAP, FULL, Fixed, Mode, Nudge, Patched, Soft
from morph.surgery._morphable import Batch, Morphable, Run, mixer_state, morphable
from morph.surgery._owners import Drop, Owners, choose_owners, follow, sharing, with_owners
from morph.surgery._streaming import StreamedLayers, refuse_streaming
from morph.surgery._trace import (
    Trace,
    answer_losses,
    answer_rows,
    answer_tokens,
    predicting,
    together,
)

__all__ = [
    "CHEAP",
    "FULL",
    "Batch",
    "Drop",
    "Fixed",
    "Graft",
    "Memo",
    "Mode",
    "Morphable",
    "Nudge",
    "Owners",
    "Patched",
    "Run",
    "Soft",
    "Start",
    "StreamedLayers",
    "Trace",
    "answer_losses",
    "answer_rows",
    "answer_tokens",
    "attention_of",
    "base_of",
    "calibrate",
    "choose_owners",
    "context",
    "decode_bytes",
    "exact_prefix",
    "family_of",
    "follow",
    "geometry_of",
    "graft",
    "group_cost",
    "hybrid_layers",
    "inform",
    "layers_of",
    "mixer_parameters",
    "mixer_state",
    "morphable",
    "output_errors",
    "own_parameter_names",
    "predicting",
    "refuse_streaming",
    "resolve_costs",
    "sharing",
    "together",
    "with_owners",
]
