"""RotNet backbones for timm and torch.hub: importing this package registers its models with timm.

Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018,
https://arxiv.org/abs/1803.07728.
"""

from rotation_ssl import backbones  # noqa: F401  registers the models with timm
from rotation_ssl.pretraining import pretrain
from rotation_ssl.rotations import rotate_all, rotation_labels, rotation_loss

__version__ = "0.1.0.dev0"

__all__ = ["pretrain", "rotate_all", "rotation_labels", "rotation_loss"]
