"""The released models have exactly the numbers of parameters that the authors' code gives."""

from __future__ import annotations

import pytest

from tim_ds.compat.authors import RELEASED
from tim_ds.model.export_folder import meta_network

COUNTS = {
    "t2i_xl": (873_109_408, 864_978_080, 900),
    "c2i_xl_256": (672_259_344, 664_128_016, 613),
    "c2i_xl_512": (672_296_224, 664_164_896, 613),
    "c2i_b_p4": (136_173_120, 128_828_224, 277),
}
"""Total, without projector, tensors of the state dict."""

T2I_XL_PARTS = {
    "x_embedder": 38_016,
    "t_embedder": 1_624_320,
    "delta_embedder": 1_624_320,
    "y_embedder": 15_937_920,
    "blocks": 28 * 30_109_248,
    "projector": 8_131_328,
    "final_layer": 2_694_560,
}


@pytest.mark.parametrize("name", COUNTS)
def test_released_model_has_the_published_number_of_parameters(name: str) -> None:
    network = meta_network(RELEASED[name].model)
    assert network.projector is not None
    total = sum(p.numel() for p in network.parameters())
    projector = sum(p.numel() for p in network.projector.parameters())
    assert (total, total - projector, len(network.state_dict())) == COUNTS[name]
    assert all(p.is_meta for p in network.parameters())


def test_every_entry_of_the_state_dict_is_a_parameter() -> None:
    network = meta_network(RELEASED["t2i_xl"].model)
    assert list(network.state_dict()) == [name for name, _ in network.named_parameters()]


def test_parameters_of_the_text_model_are_where_the_authors_have_them() -> None:
    network = meta_network(RELEASED["t2i_xl"].model)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert parts == T2I_XL_PARTS
    assert {sum(p.numel() for p in block.parameters()) for block in network.blocks} == {30_109_248}


def test_blocks_of_the_class_model_have_the_published_size() -> None:
    network = meta_network(RELEASED["c2i_xl_256"].model)
    assert {sum(p.numel() for p in block.parameters()) for block in network.blocks} == {23_465_376}
