"""Where a checkpoint file keeps its softmax attention, one file per architecture.

`read` says what every row of every tensor is for, from config.json and the headers alone. The
families of `morph/families` and our own `morph_<base>` hybrids need no file here. No torch.
"""

from morph.layouts._layout import ROLES, Layout, Rows
from morph.layouts._lookup import layout, model_types, read
from morph.layouts._read import PREFIXES, Reading
from morph.layouts._shapes import Heads, Rotary

__all__ = [
    "PREFIXES",
    "ROLES",
    "Heads",
    "Layout",
    "Reading",
    "Rotary",
    "Rows",
    "layout",
    "model_types",
    "read",
]
