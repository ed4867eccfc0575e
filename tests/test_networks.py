"""EDSR and RCAN against the authors' own outputs, in every layout."""
import pytest
import torch

from model import load_model

LAYOUTS = ["edsr_x2", "edsr_x3", "edsr_x4", "rcan_x2", "rcan_x4", "fakd_edsr_x4", "fakd_rcan_x4", "basicsr_edsr_x2",
           "basicsr_edsr_x4", "basicsr_rcan_x2", "csd_edsr_x2", "csd_edsr_x4"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_agrees_with_the_authors(golden, name):
    path, x, arrays, about = golden(name)
    net = load_model(path, res_scale=about["config"].get("res_scale"))
    net.rgb_range = about["input_range"][1]
    with torch.no_grad():
        sr, feature_maps = net(x, features=True)
    expected = arrays["width_1" if name.startswith("csd") else "output"]
    assert (sr - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert len(feature_maps) == 4
    for index in range(4):
        if f"feature{index}" in arrays:
            assert torch.allclose(feature_maps[index], arrays[f"feature{index}"], rtol=1e-4, atol=1e-4)
    if "params" in about:
        shifts = 24 if name in ("rcan_x2", "rcan_x4") else 0  # trained in the code of RCAN's authors, constant here
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == about["params"] - shifts
