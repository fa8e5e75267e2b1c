"""Other people's checkpoints: read safely, told by what they hold, written as a folder that timm loads."""

from rotation_ssl.convert.folder import NOT_OF_THESE_WEIGHTS, write_config, write_folder
from rotation_ssl.convert.mapping import AUTHORS, FLOATS, Converted, convert, convert_authors, misfits
from rotation_ssl.convert.reading import MAX_BYTES, MAX_MEMBERS, MAX_TUPLES, read_checkpoint

__all__ = [
    "AUTHORS",
    "FLOATS",
    "MAX_BYTES",
    "MAX_MEMBERS",
    "MAX_TUPLES",
    "NOT_OF_THESE_WEIGHTS",
    "Converted",
    "convert",
    "convert_authors",
    "misfits",
    "read_checkpoint",
    "write_config",
    "write_folder",
]
