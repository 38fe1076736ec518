"""Read, splice, write and verify folders of safetensors weights, byte by byte and without torch.

`Checkpoint.open` believes nothing it reads; `write_checkpoint` makes a folder that is complete or
absent; `verify` compares it with its manifest; `inspect` tells what is in it.
"""

from morph.checkpoint._folder import clean_config, disagreements
from morph.checkpoint._format import TensorInfo, dump_json, load_json
from morph.checkpoint._hub import resolve
from morph.checkpoint._inspect import inspect
from morph.checkpoint._read import Checkpoint, to_float
from morph.checkpoint._staging import Staging, check_output
from morph.checkpoint._verify import verify, verify_manifest
from morph.checkpoint._write import Written, kept_equal, write_checkpoint

__all__ = [
    "Checkpoint",
    "Staging",
    "TensorInfo",
    "Written",
    "check_output",
    "clean_config",
    "disagreements",
    "dump_json",
    "inspect",
    "kept_equal",
    "load_json",
    "resolve",
    "to_float",
    "verify",
    "verify_manifest",
    "write_checkpoint",
]
