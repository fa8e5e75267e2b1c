"""Features of millions of images: written in parts, on one machine or on a Ray cluster, and read back."""

from rotation_ssl.embedding.neighbours import embed_images, nearest
from rotation_ssl.embedding.reading import Part, load, read_chunks
from rotation_ssl.embedding.run import Summary, embed

__all__ = ["Part", "Summary", "embed", "embed_images", "load", "nearest", "read_chunks"]
