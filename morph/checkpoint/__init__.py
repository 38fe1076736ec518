"""Read, splice, write and verify folders of safetensors weights, byte by byte and without torch.

`Checkpoint.open` believes nothing it reads; `write_checkpoint` makes a folder that is complete or
absent; `verify` compares it with its manifest; `inspect` tells what is in it.
"""

from morph.checkpoint._folder import clean_config, disagreements, text_config
from morph.checkpoint._format import TensorInfo, dump_json, load_json
from morph.checkpoint._hub import resolve
from morph.checkpoint._inspect import inspect
from morph.checkpoint._output import check_output
from morph.checkpoint._patch import Patched, Splice, patch_folder
from morph.checkpoint._read import Checkpoint, refuse_adapter
from morph.checkpoint._staging import Staging
from morph.checkpoint._verify import verify, verify_manifest
from morph.checkpoint._weights import Weights, from_float, to_float
from morph.checkpoint._write import Written, kept_equal, write_checkpoint

__all__ = [
    "Checkpoint",
    "Patched",
    "Splice",
    "Staging",
    "TensorInfo",
    "Weights",
    "Written",
    "check_output",
    "clean_config",
    "disagreements",
    "dump_json",
    "from_float",
    "inspect",
    "kept_equal",
    "load_json",
    "patch_folder",
    "refuse_adapter",
    "resolve",
    "text_config",
    "to_float",
    "verify",
    "verify_manifest",
    "write_checkpoint",
]
