"""Network-in-Network of RotNet, with 3, 4 or 5 blocks.

Gidaris et al. 2018 (https://arxiv.org/abs/1803.07728), section 4.1, and the authors' code
(https://github.com/gidariss/FeatureLearningRotNet, ``architectures/NetworkInNetwork.py``).
A block is three convolutions without bias, each followed by batch norm and ReLU; the first two blocks end in a pooling
of stride 2. Features of a block are taken after its pooling: block1 is 96 x 16 x 16 for a 32-pixel image, the others
192 x 8 x 8.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from timm.layers import ClassifierHead, ConvNormAct, get_device_dtype
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from rotation_ssl import zoo
from rotation_ssl.backbones.about import ROTNET_CFG, NetworkFacts

__all__ = ["RotNetNIN", "rotnet_nin", "rotnet_nin3", "rotnet_nin5"]


class RotNetNIN(nn.Module):
    """Network-in-Network: images (N, in_chans, H, W) -> logits (N, num_classes).

    Args:
        depth: number of blocks, 3 to 5.
        num_classes: width of the classifier; 0 for none. The published weights have 4, the rotations.
        in_chans: channels of the images.
        global_pool: timm's pooling type before the classifier; '' for none.
        drop_rate: dropout before the classifier.
        device: where the parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: the depth is not 3, 4 or 5.
    """

    def __init__(
        self,
        depth: int = 4,
        num_classes: int = 4,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if depth not in (3, 4, 5):
            raise ValueError(f"depth must be 3, 4 or 5 blocks, got {depth}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False

        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        blocks["block1"] = _block((in_chans, 192, 160, 96), 5, nn.MaxPool2d(3, stride=2, padding=1), **dd)
        blocks["block2"] = _block((96, 192, 192, 192), 5, nn.AvgPool2d(3, stride=2, padding=1), **dd)
        for index in range(3, depth + 1):
            blocks[f"block{index}"] = _block((192, 192, 192, 192), 3, None, **dd)
        self.blocks = nn.Sequential(blocks)
        self.feature_info = [
            {"num_chs": 96 if name == "block1" else 192, "reduction": 2 if name == "block1" else 4,
             "module": f"blocks.{name}"}
            for name in blocks
        ]  # fmt: skip

        self.num_features = 192
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Normal convolutions of standard deviation sqrt(2 / (k * k * out)).

        The authors' NetworkInNetwork.py defines the same, but their code never calls it: their networks start from the
        defaults of their PyTorch, 0.2.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, as timm's other models have them."""
        if coarse:
            return {"stem": r"^blocks\.block1", "blocks": r"^blocks\.block(\d+)"}
        return {"stem": r"^blocks\.block1\.0", "blocks": r"^blocks\.block(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute a block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer: Linear(num_features, num_classes), or Identity when num_classes is 0."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; ``global_pool=None`` keeps the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of several blocks in one pass.

        Args:
            x: (N, in_chans, H, W).
            indices: the blocks, counted from 0: a list, the last n, or all (None).
            norm: unused; there is no final norm.
            stop_early: stop after the last block asked for.
            output_fmt: only 'NCHW'.
            intermediates_only: return the list alone.

        Returns:
            The final features and the list of maps, (N, 96 or 192, H/2 or H/4, ...) each; or the list alone.

        Raises:
            ValueError: another output format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        blocks = self.blocks[: max_index + 1] if stop_early else self.blocks
        intermediates = []
        for index, block in enumerate(blocks):
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            if index in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one asked for, and the classifier; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or self.num_features != self.head.in_features:
            self.head.in_features = self.num_features
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Unpooled features of the last block: (N, 192, H/4, W/4)."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify; with ``pre_logits`` the pooled features (N, 192)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _block(channels: tuple[int, ...], kernel_size: int, pool: nn.Module | None, **dd: Any) -> nn.Sequential:
    layers: list[nn.Module] = [
        ConvNormAct(channels[i], channels[i + 1], kernel_size if i == 0 else 1, **dd) for i in range(3)
    ]
    return nn.Sequential(*layers) if pool is None else nn.Sequential(*layers, pool)


CFG = {
    **ROTNET_CFG,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    # of CIFAR-10's training images, as in the authors' code: 125.3, 123.0, 113.9 and 63.0, 62.1, 66.7 of 255
    "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255),
    "std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
    "first_conv": "blocks.block1.0.conv",
    "classifier": "head.fc",
}
FACTS = dict.fromkeys(
    ("rotnet_nin", "rotnet_nin3", "rotnet_nin5"),
    NetworkFacts(recommended_layer="block2", paper_epochs=100, paper_images=50_000, authors_size=32),
)

default_cfgs = generate_default_cfgs(
    {name: CFG | published for model in FACTS for name, published in zoo.published_cfgs(model).items()}
)


def _create_nin(variant: str, depth: int, pretrained: bool, **kwargs: Any) -> RotNetNIN:
    return zoo.build_model(
        RotNetNIN,
        variant,
        pretrained,
        depth=depth,
        feature_cfg=dict(out_indices=tuple(range(depth)), flatten_sequential=True, **kwargs.pop("feature_cfg", {})),
        **kwargs,
    )


@register_model
def rotnet_nin(pretrained: bool = False, **kwargs: Any) -> RotNetNIN:
    """RotNet's Network-in-Network of 4 blocks, 1.4 M parameters; the paper's best features are block2's."""
    return _create_nin("rotnet_nin", 4, pretrained, **kwargs)


@register_model
def rotnet_nin3(pretrained: bool = False, **kwargs: Any) -> RotNetNIN:
    """RotNet's Network-in-Network of 3 blocks."""
    return _create_nin("rotnet_nin3", 3, pretrained, **kwargs)


@register_model
def rotnet_nin5(pretrained: bool = False, **kwargs: Any) -> RotNetNIN:
    """RotNet's Network-in-Network of 5 blocks."""
    return _create_nin("rotnet_nin5", 5, pretrained, **kwargs)
