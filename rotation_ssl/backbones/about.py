"""What is known of a network besides its weights: a backbone's file has it in ``FACTS``, beside ``default_cfgs``."""

import sys
from dataclasses import dataclass

from timm.models import is_model, model_entrypoint

#: What the configurations of all networks tell timm. Where they say nothing, timm's defaults hold: images of 224
#: pixels, ImageNet's mean and deviation, bicubic resizing, a centre crop of 0.875.
ROTNET_CFG = {"num_classes": 4, "license": "mit", "paper_ids": "arXiv:1803.07728"}


@dataclass(frozen=True)
class NetworkFacts:
    """What the paper and the authors' code say of a network; '' and 0 where they say nothing.

    ``timm_name`` is the network's name in timm, where timm has it too, with the same keys.
    ``recommended_layer`` has the best features by the paper's tables 1 and 4. The paper pretrains for ``paper_epochs``
    on ``paper_images`` images, each in four rotations. The authors' weights are for images of ``authors_size`` pixels.
    """

    recommended_layer: str = ""
    paper_epochs: int = 0
    paper_images: int = 0
    authors_size: int = 0
    timm_name: str = ""

    @property
    def paper_rotated_images(self) -> int:
        """The paper's budget."""
        return self.paper_epochs * 4 * self.paper_images


def network_facts(name: str) -> NetworkFacts:
    """The facts of a model, or of a ``model.tag``; those of a network that the paper does not have are all unknown.

    Raises:
        ValueError: timm has no such model.
    """
    model = name.split(".", 1)[0]
    if not is_model(model):
        raise ValueError(f"timm has no model {model!r}: timm.list_models() names them")
    facts: dict[str, NetworkFacts] = getattr(sys.modules[model_entrypoint(model).__module__], "FACTS", {})
    return facts.get(model, NetworkFacts())
