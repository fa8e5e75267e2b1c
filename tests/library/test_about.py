"""What is known of a network stands beside it, and fits it."""

import pytest
import timm

from rotation_ssl.backbones.about import NetworkFacts, network_facts
from rotation_ssl.features import layer_modules
from rotation_ssl.zoo import bundled


@pytest.mark.parametrize("name", timm.list_models("rotnet_*"))
def test_the_facts_fit_the_network(name):
    facts = network_facts(name)
    layers = layer_modules(timm.create_model(name, device="meta"))
    assert not facts.recommended_layer or facts.recommended_layer in layers
    assert bool(facts.paper_epochs) == bool(facts.paper_images) == bool(facts.recommended_layer)


def test_the_budgets_of_the_paper():
    assert network_facts("rotnet_nin").paper_rotated_images == 20_000_000
    assert network_facts("rotnet_alexnet.photos").paper_rotated_images == 153_740_040


def test_bundled_weights_have_the_layer_of_their_network():
    for name, entry in bundled().items():
        assert entry["recommended_layer"] == network_facts(name).recommended_layer


def test_other_networks():
    assert network_facts("resnet34") == NetworkFacts()
    with pytest.raises(ValueError, match="timm has no model 'nothing'"):
        network_facts("nothing.at_all")
