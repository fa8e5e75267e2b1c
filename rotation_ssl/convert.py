"""Other people's checkpoints -> state dicts of this package's models.

The authors' checkpoints (https://github.com/gidariss/FeatureLearningRotNet) hold ``{'epoch': int, 'network': ...}``,
the network as modules numbered in the order of their definition, without ``num_batches_tracked``.
"""

import re

import torch

_ALEXNET_CONVS = {"0": "conv1", "2": "conv2", "4": "conv3", "5": "conv4", "6": "conv5"}
_ALEXNET_FCS = {"1": "fc6.0", "2": "fc6.1", "4": "fc7.0", "5": "fc7.1"}
_NIN_CONV = re.compile(r"_feature_blocks\.\d+\.Block(\d)_ConvB(\d)\.layers\.(Conv|BatchNorm)\.(\w+)")
_NIN_HEAD = re.compile(r"_feature_blocks\.\d+\.Classifier\.(weight|bias)")
_ALEXNET_CONV = re.compile(r"_feature_blocks\.([02456])\.([01])\.(\w+)")
_ALEXNET_FC = re.compile(r"_feature_blocks\.8\.([1245])\.(\w+)")
_ALEXNET_HEAD = re.compile(r"_feature_blocks\.9\.0\.(weight|bias)")


def convert_authors(network: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of the authors' Network-in-Network (3 to 5 blocks) or AlexNet -> that of ours.

    Args:
        network: ``checkpoint['network']``, keys ``_feature_blocks.*``.

    Returns:
        Keys of :class:`RotNetNIN` or :class:`RotNetAlexNet`; ``num_batches_tracked`` of each batch norm is 0.

    Raises:
        ValueError: a key that belongs to neither network; the error names it.
    """
    converted: dict[str, torch.Tensor] = {}
    for key, value in network.items():
        name = _authors_key(key)
        if name is None:
            raise ValueError(f"{key} is a key of neither network of the authors' release; give checkpoint['network']")
        converted[name] = value
        if name.endswith(".running_mean"):
            counter = f"{name.removesuffix('running_mean')}num_batches_tracked"
            converted.setdefault(counter, torch.zeros((), dtype=torch.int64))
    return converted


def _authors_key(key: str) -> str | None:
    if match := _NIN_CONV.fullmatch(key):
        block, layer, kind, name = match.groups()
        return f"blocks.block{block}.{int(layer) - 1}.{'conv' if kind == 'Conv' else 'bn'}.{name}"
    if match := _ALEXNET_CONV.fullmatch(key):
        block, kind, name = match.groups()
        return f"features.{_ALEXNET_CONVS[block]}.{'conv' if kind == '0' else 'bn'}.{name}"
    if match := _ALEXNET_FC.fullmatch(key):
        return f"head.{_ALEXNET_FCS[match[1]]}.{match[2]}"
    if match := _NIN_HEAD.fullmatch(key) or _ALEXNET_HEAD.fullmatch(key):
        return f"head.fc.{match[1]}"
    return None
