"""AlexNet of RotNet: a single tower with batch norm.

Gidaris et al. 2018 (https://arxiv.org/abs/1803.07728), section 4.2, and the authors' code
(https://github.com/gidariss/FeatureLearningRotNet, ``architectures/AlexNet.py``).
Five convolutions with bias, each followed by batch norm and ReLU; no grouping, no local response normalisation, no
dropout. Features conv1..conv5 are taken after the ReLU, before the pooling: 64 x 55 x 55, 192 x 27 x 27, 384 x 13 x 13,
256 x 13 x 13, 256 x 13 x 13 for a 224-pixel image.
"""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import ConvNormAct, SelectAdaptivePool2d, get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from rotation_ssl import zoo
from rotation_ssl.backbones.about import ROTNET_CFG, NetworkFacts

__all__ = ["FcHead", "RotNetAlexNet", "rotnet_alexnet"]

POOL_SIZE = 6  # side of pool5's map for a 224-pixel image, the size that fc6 takes


class FcHead(nn.Module):
    """Pooling, fc6, fc7 and the classifier: (N, in_features, H, W) -> (N, num_classes).

    With fc layers the map is pooled to 6 x 6, its size for a 224-pixel image. Without (``fc_size=0``, or no pooling,
    ``pool_type=''``) the classifier takes the globally pooled map, and fc6 and fc7 are Identity.

    Raises:
        ValueError: fc layers with a pooling other than 'avg' or 'max'.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        fc_size: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc_size = fc_size if pool_type else 0
        if self.fc_size:
            if pool_type not in ("avg", "max"):
                raise ValueError(f"fc6 and fc7 take global_pool 'avg' or 'max', got {pool_type!r}; or give fc_size=0")
            self.global_pool = SelectAdaptivePool2d(POOL_SIZE, pool_type=pool_type, flatten=True)
            self.fc6: nn.Module = _fc(in_features * POOL_SIZE**2, fc_size, **dd)
            self.fc7: nn.Module = _fc(fc_size, fc_size, **dd)
            self.num_features = fc_size
        else:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
            self.fc6, self.fc7 = nn.Identity(), nn.Identity()
            self.num_features = in_features * self.global_pool.feat_mult()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits, or with ``pre_logits`` what the classifier takes."""
        x = self.fc7(self.fc6(self.global_pool(x)))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class RotNetAlexNet(nn.Module):
    """AlexNet with batch norm: images (N, in_chans, H, W) -> logits (N, num_classes).

    Args:
        num_classes: width of the classifier; 0 for none. RotNet's has 4, the rotations.
        in_chans: channels of the images.
        fc_size: width of fc6 and fc7; 0: neither, the classifier takes the globally pooled pool5.
        global_pool: pooling before fc6 ('avg' or 'max', to 6 x 6), or timm's pooling type when ``fc_size`` is 0; '' for
            neither pooling nor fc layers.
        drop_rate: dropout before the classifier.
        device: where the parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: a pooling that does not fit the fc layers.
    """

    def __init__(
        self,
        num_classes: int = 4,
        in_chans: int = 3,
        fc_size: int = 4096,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.features = nn.Sequential(
            OrderedDict(
                [
                    ("conv1", ConvNormAct(in_chans, 64, 11, stride=4, padding=2, bias=True, **dd)),
                    ("pool1", nn.MaxPool2d(3, stride=2)),
                    ("conv2", ConvNormAct(64, 192, 5, bias=True, **dd)),
                    ("pool2", nn.MaxPool2d(3, stride=2)),
                    ("conv3", ConvNormAct(192, 384, 3, bias=True, **dd)),
                    ("conv4", ConvNormAct(384, 256, 3, bias=True, **dd)),
                    ("conv5", ConvNormAct(256, 256, 3, bias=True, **dd)),
                    ("pool5", nn.MaxPool2d(3, stride=2)),
                ]
            )
        )
        widths = {"conv1": (64, 4), "conv2": (192, 8), "conv3": (384, 16), "conv4": (256, 16), "conv5": (256, 16)}
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": f"features.{name}"}
            for name, (channels, reduction) in widths.items()
        ]
        self.feature_ends = [0, 2, 4, 5, 6]  # index into features of each entry of feature_info

        self.num_features = 256
        self.head = FcHead(self.num_features, num_classes, fc_size, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, as timm's other models have them."""
        return {"stem": r"^features\.conv1", "blocks": r"^features\.conv(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Not supported: the convolutions are few and their activations small.

        Raises:
            ValueError: on ``enable=True``.
        """
        if enable:
            raise ValueError("gradient checkpointing is not supported by AlexNet")

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer: Linear(head_hidden_size, num_classes), or Identity when num_classes is 0."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        ``global_pool=None`` keeps the pooling and fc6/fc7; '' removes them; another pooling keeps fc6/fc7, if there
        are any.

        Raises:
            ValueError: a pooling that does not fit the fc layers.
        """
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        pool_type = self.head.global_pool.pool_type if global_pool is None else global_pool
        # on meta: only the classifier and the pooling of the new head are kept beside trained fc layers
        head = FcHead(self.num_features, 0, self.head.fc_size, pool_type, self.head.drop.p, device="meta")
        if num_classes > 0:
            head.fc = nn.Linear(head.num_features, num_classes, **dd)
        head.train(self.training)
        if head.fc_size:
            head.fc6, head.fc7 = self.head.fc6, self.head.fc7
        self.head = head
        self.head_hidden_size = head.num_features

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of several of conv1..conv5 in one pass.

        Args:
            x: (N, in_chans, H, W).
            indices: the convolutions, counted from 0: a list, the last n, or all (None).
            norm: unused; there is no final norm.
            stop_early: stop after the last one asked for.
            output_fmt: only 'NCHW'.
            intermediates_only: return the list alone.

        Returns:
            The final features (pool5, unless stopped early) and the list of maps (N, C, H', W'); or the list alone.

        Raises:
            ValueError: another output format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.feature_ends), indices)
        ends = [self.feature_ends[i] for i in take_indices]
        layers = self.features[: self.feature_ends[max_index] + 1] if stop_early else self.features
        intermediates = []
        for index, layer in enumerate(layers):
            x = layer(x)
            if index in ends:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what comes after the last of conv1..conv5 asked for, and the head; returns the indices kept.

        conv5 keeps pool5 after it, so that ``prune_head=False`` leaves the whole model as it was.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_ends), indices)
        if max_index < len(self.feature_ends) - 1:
            self.features = self.features[: self.feature_ends[max_index] + 1]
            self.num_features = self.feature_info[max_index]["num_chs"]
            prune_head = True
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Unpooled features, after pool5: (N, 256, 6, 6) for 224-pixel images.

        Raises:
            ValueError: images of fewer than 63 pixels a side, which leave pool5 nothing.
        """
        _check_size(x)
        return self.features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool, fc6, fc7 and classify; with ``pre_logits`` what the classifier takes, (N, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _check_size(x: torch.Tensor) -> None:
    # a plain number: torch.jit.script knows no constants of modules
    if not torch.jit.is_tracing() and min(x.shape[-2], x.shape[-1]) < 63:
        raise ValueError(f"images of {x.shape[-2]} x {x.shape[-1]} pixels are too small for AlexNet: 63 is the least")


# not traced: what torch.fx traces has no sizes to compare
torch.fx.wrap("_check_size")


def _fc(in_features: int, out_features: int, **dd: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False, **dd),
        nn.BatchNorm1d(out_features, **dd),
        nn.ReLU(inplace=True),
    )


def _pooled_side(pixels: int) -> int:
    """Side of pool5's map: conv1 of 11 pixels, stride 4 and padding 2, then three poolings of 3 pixels and stride 2."""
    side = (pixels + 4 - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


def _cfg(published: dict[str, Any]) -> dict[str, Any]:
    side = _pooled_side(published.get("input_size", (3, 224, 224))[-1])
    names = {"first_conv": "features.conv1.conv", "classifier": "head.fc"}
    return {**ROTNET_CFG, **names, **published, "pool_size": (side, side)}


FACTS = {
    "rotnet_alexnet": NetworkFacts(recommended_layer="conv4", paper_epochs=30, paper_images=1_281_167, authors_size=224)
}

default_cfgs = generate_default_cfgs(
    {name: _cfg(published) for name, published in zoo.published_cfgs("rotnet_alexnet").items()}
)


@register_model
def rotnet_alexnet(pretrained: bool = False, **kwargs: Any) -> RotNetAlexNet:
    """RotNet's AlexNet, 57 M parameters with fc6 and fc7, 2.5 M in the convolutions (``fc_size=0``).

    ``fc_size`` defaults to 0 for weights without fc6 and fc7; if you set it, these layers are initialised randomly.
    """
    feature_cfg = dict(flatten_sequential=True, **kwargs.pop("feature_cfg", {}))
    optional = ("fc_size", ("head.fc6.", "head.fc7."))
    return zoo.build_model(
        RotNetAlexNet, "rotnet_alexnet", pretrained, optional=optional, feature_cfg=feature_cfg, **kwargs
    )
