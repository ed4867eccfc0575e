"""The sizes of the papers' networks, by --template, against the published numbers of parameters."""
import pytest
import torch

import option
from model import fuse, make_model
from template import TEMPLATES

PUBLISHED = {  # millions at each scale, in the published digits
    "EDSR": {2: "40.73", 3: "43.68", 4: "43.09"},
    "EDSR_baseline": {2: "1.370", 3: "1.554", 4: "1.518"},
    "EDSR_DUKD": {2: "2.552", 3: "2.736", 4: "2.699"},
    "EDSR_CSD": {2: "2.552", 3: "2.736", 4: "2.699"},
    "RCAN": {2: "15.44", 3: "15.63", 4: "15.59", 8: "15.74"},
    "RCAN_student": {2: "5.024", 3: "5.208", 4: "5.171", 8: "5.319"},
    "SAN": {2: "15.71", 4: "15.86"},
    "SAN_student": {2: "4.848", 4: "4.996"},
    "SwinIR": {2: "11.75", 3: "11.94", 4: "11.90"},
    "SwinIR_student": {2: "1.088", 3: "1.272", 4: "1.235"},
    "SwinIR_light": {2: "0.910", 3: "0.918", 4: "0.930"},
    "CARN": {2: "0.964", 3: "1.149", 4: "1.112"},
    "CARN_multi": {2: "1.592", 3: "1.592", 4: "1.592"},
    "CARN_M": {2: "0.414787", 3: "0.414787", 4: "0.414787"},
    "RDN_A": {2: "5.54"},
    "RDN_B": {2: "22.12", 3: "22.31", 4: "22.27"},
    "IMDN": {2: "0.694404", 3: "0.703059", 4: "0.715176"},
    "SPAN": {2: "0.481", 4: "0.498"}, "SPAN_S": {2: "0.411", 4: "0.426"}, "SPAN_student": {4: "0.151"},
    "RRDB": {1: "16.723907", 2: "16.703171", 4: "16.697987"}, "RRDB_6B": {4: "4.467779"},
    "NAFNet": {1: "17.111907"}, "NAFNet_student": {1: "2.683059"}, "NAFNet_S": {1: "0.319475"},  # the last not published
    "Restormer": {1: "26.126644"}, "Restormer_student": {1: "3.813230"},
    "Compact_S": {2: "0.042"}, "Compact_M": {2: "0.088"}, "Compact_L": {2: "0.194"},  # not published
}
CASES = [(name, scale) for name, scales in PUBLISHED.items() for scale in scales]


def test_every_template_of_a_network_is_counted():
    assert {name for name, preset in TEMPLATES.items() if "model" in preset} == set(PUBLISHED)


@pytest.mark.parametrize("name, scale", CASES)
def test_parameters_are_the_published_ones(name, scale):
    args = option.parse(["--template", name, "--scale", str(scale)])
    with torch.device("meta"):
        net = fuse(make_model(args.model, args))
    millions = PUBLISHED[name][scale]
    digits = len(millions.partition(".")[2])
    assert f"{sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6:.{digits}f}" == millions
    assert name != "EDSR_CSD" or net.config["res_scale"] == 0.1
