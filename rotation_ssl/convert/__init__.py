"""Other people's checkpoints: read safely, told by what they hold, written as a folder that timm loads."""

from rotation_ssl.convert.folder import NOT_OF_THESE_WEIGHTS, write_config, write_folder
from rotation_ssl.convert.mapping import AUTHORS, Converted, convert, convert_authors, misfits
from rotation_ssl.convert.reading import MAX_BYTES, read_checkpoint

__all__ = [
    "AUTHORS",
    "MAX_BYTES",
    "NOT_OF_THESE_WEIGHTS",
    "Converted",
    "convert",
    "convert_authors",
    "misfits",
    "read_checkpoint",
    "write_config",
    "write_folder",
]
