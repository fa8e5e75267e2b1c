"""The backbones, one file each; importing a file registers its models with timm."""

from rotation_ssl.backbones import alexnet, nin, resnets  # noqa: F401
