"""Entry points of torch.hub: ``torch.hub.load(REPOSITORY, 'rotnet_nin', trust_repo=True)``."""

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "PIL", "filelock", "tqdm"]

from rotation_ssl.hub import (  # noqa: E402, F401
    rotnet_alexnet,
    rotnet_nin,
    rotnet_nin3,
    rotnet_nin5,
    rotnet_resnet18,
    rotnet_resnet50,
)
