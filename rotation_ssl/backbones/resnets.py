"""timm's ResNets under our own names, with a head for the four rotations; no weights are published for them.

VISSL and mmselfsup published ResNet-50s pretrained by predicting rotations. They are not tags here: VISSL's model zoo
gives no licence for its weights (the MIT licence of its repository covers the code), and we did not check mmselfsup's
terms. If you have such a file, convert it with ``rotation-ssl convert FILE -o FOLDER`` and load it with
``timm.create_model('local-dir:FOLDER', pretrained=True)``.
The keys are those of timm's ``resnet18`` and ``resnet50``, which load the same folder.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from rotation_ssl import zoo
from rotation_ssl.backbones.about import ROTNET_CFG, NetworkFacts

CFG = {**ROTNET_CFG, "pool_size": (7, 7), "first_conv": "conv1", "classifier": "fc"}
FACTS = {
    "rotnet_resnet18": NetworkFacts(timm_name="resnet18"),
    "rotnet_resnet50": NetworkFacts(timm_name="resnet50"),
}

default_cfgs = generate_default_cfgs(
    {name: CFG | published for model in FACTS for name, published in zoo.published_cfgs(model).items()}
)


@register_model
def rotnet_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with RotNet's head of four rotations, 11.2 M parameters."""
    return zoo.build_model(ResNet, "rotnet_resnet18", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def rotnet_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 with RotNet's head of four rotations, 23.5 M parameters."""
    return zoo.build_model(ResNet, "rotnet_resnet50", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)
