"""Convert other projects' checkpoints: read safely, recognised by content, written as a folder that timm loads."""

from rotation_ssl.convert.folder import UNKNOWN_METADATA, write_config, write_folder
from rotation_ssl.convert.mapping import AUTHORS, Converted, convert, convert_authors, misfits
from rotation_ssl.convert.reading import MAX_BYTES, read_checkpoint

__all__ = [
    "AUTHORS",
    "MAX_BYTES",
    "UNKNOWN_METADATA",
    "Converted",
    "convert",
    "convert_authors",
    "misfits",
    "read_checkpoint",
    "write_config",
    "write_folder",
]
