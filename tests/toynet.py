"""A backbone as small as one can be: all that a new file of `rotation_ssl/backbones` must have."""

from timm.models import generate_default_cfgs, register_model
from torch import nn

from rotation_ssl import zoo
from rotation_ssl.backbones.about import NetworkFacts


class ToyNet(nn.Module):
    """Two convolutions and a classifier: images (N, in_chans, H, W) -> logits (N, num_classes)."""

    def __init__(self, num_classes=4, in_chans=3):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 8
        self.conv1, self.conv2 = nn.Conv2d(in_chans, 4, 3, stride=2), nn.Conv2d(4, 8, 3, stride=2)
        self.fc = nn.Linear(8, num_classes)
        self.feature_info = [
            {"num_chs": 4, "reduction": 2, "module": "conv1"},
            {"num_chs": 8, "reduction": 4, "module": "conv2"},
        ]

    def forward_features(self, x):
        return self.conv2(self.conv1(x).relu()).relu()

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))


FACTS = {"toynet": NetworkFacts(recommended_layer="conv2")}
CFG = {"num_classes": 4, "input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs({name: CFG | cfg for name, cfg in zoo.published_cfgs("toynet").items()})


@register_model
def toynet(pretrained=False, **kwargs):
    return zoo.build_model(ToyNet, "toynet", pretrained, **kwargs)
