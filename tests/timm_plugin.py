"""pytest plugin for timm's own tests/test_models.py: its per-model tests see the models of rotation_ssl instead.

Loaded by ``make timm-tests`` (``pytest -p timm_plugin``) before the tests are collected: what timm's tests ask
``list_models`` for, all names or those of some modules, is answered with ours; a filter by name is left to timm.
"""

import timm

import rotation_ssl  # noqa: F401  registers the models with timm

_list_models = timm.list_models


def list_rotnets(filter="", module="", exclude_filters="", include_tags=None, pretrained=False, **kwargs):
    if filter:
        return _list_models(
            filter,
            module=module,
            exclude_filters=exclude_filters,
            include_tags=include_tags,
            pretrained=pretrained,
            **kwargs,
        )
    names = _list_models("rotnet_*", include_tags=include_tags, pretrained=pretrained)
    # what is not in the wheel would be downloaded
    return [name for name in names if timm.get_pretrained_cfg(name).file] if pretrained else names


timm.list_models = list_rotnets
